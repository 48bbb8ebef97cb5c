"""Random policies in CIL from a seed: valid ones, with everything that decisions depend on."""

from __future__ import annotations

from random import Random

from attrs import define, field

PERMISSIONS = "read write open append create getattr setattr lock link map execute relabel ioctl".split()


@define
class RandomPolicy:
    """A policy as text, and the names in it."""

    rng: Random
    mls: bool = True
    lines: list[str] = field(factory=list)
    classes: dict[str, list[str]] = field(factory=dict)
    types: list[str] = field(factory=list)
    attributes: list[str] = field(factory=list)
    roles: list[str] = field(factory=list)
    users: list[str] = field(factory=list)
    bounds: dict[str, str] = field(factory=dict)
    names: dict[str, str] = field(factory=dict)
    booleans: dict[str, bool] = field(factory=dict)
    sensitivities: list[str] = field(factory=list)
    categories: list[str] = field(factory=list)

    @property
    def text(self) -> str:
        """The policy."""
        return "\n".join(self.lines) + "\n"

    @property
    def bare(self) -> str:
        """The policy without its bounds, where each role may have each type: the rules and constraints alone."""
        lines = [line for line in self.lines if not line.startswith("(typebounds")]
        return "\n".join(lines + [f"(roletype {role} {name})" for role in self.roles for name in self.types]) + "\n"

    def add(self, line: str) -> None:
        """One more statement."""
        self.lines.append(line)

    def some(self, names: list[str], least: int = 1) -> list[str]:
        """A few of *names*."""
        return self.rng.sample(names, self.rng.randint(least, max(least, min(len(names), 4))))

    def identity(self) -> str:
        """A type, or an attribute."""
        return self.rng.choice(self.types + self.attributes)

    def permissions(self, tclass: str | None = None) -> str:
        """``(CLASS (PERMISSIONS))`` in one of its forms."""
        tclass = tclass or self.rng.choice(list(self.classes))
        names = self.some(self.classes[tclass])
        form = self.rng.random()
        if form < 0.1:
            return f"({tclass} (all))"
        if form < 0.2:
            return f"({tclass} (not ({' '.join(names[:-1] or names)})))" if len(names) < 3 else f"({tclass} (all))"
        return f"({tclass} ({' '.join(names)}))"

    def level(self, sensitivity: str | None = None) -> str:
        """A level as text of contexts; often one that is not valid."""
        names = self.some(self.categories, 0) if self.categories else []
        form = self.rng.random()
        if names and form < 0.3:
            first, last = sorted((self.rng.choice(names), self.rng.choice(self.categories)), key=self.categories.index)
            names = [f"{first}.{last}"] if first != last else [first]
        sensitivity = sensitivity or self.rng.choice(self.sensitivities)
        return f"{sensitivity}:{','.join(names)}" if names else sensitivity

    def context(self, role: str | None = None) -> str:
        """A context, usually valid."""
        role = role or self.rng.choice(self.roles)
        name = "other_name" if self.rng.random() < 0.02 else self.rng.choice(self.types)
        text = f"{self.rng.choice(self.users)}:{role}:{name}"
        if not self.mls:
            return text
        low = self.level(self.sensitivities[0] if self.rng.random() < 0.6 else None)
        form = self.rng.random()
        if form < 0.4:
            return f"{text}:{low}"
        if form < 0.8:
            return f"{text}:{self.sensitivities[0]}-{self.level()}"
        return f"{text}:{low}-{self.level()}"


def random_policy(seed: int) -> RandomPolicy:
    """The policy of a seed. Its bounds and conditions are arbitrary, so that compiling needs ``secilc -N``."""
    rng = Random(seed)
    policy = RandomPolicy(rng, mls=rng.random() < 0.75)
    _classes(policy)
    _levels(policy)
    _types(policy)
    _identities(policy)
    _rules(policy)
    _constraints(policy)
    _objects(policy)
    return policy


def _classes(policy: RandomPolicy) -> None:
    rng = policy.rng
    policy.add(f"(mls {'true' if policy.mls else 'false'})")
    policy.add(f"(handleunknown {rng.choice(('allow', 'deny'))})")
    common = rng.sample(PERMISSIONS, 4)
    policy.add(f"(common shared ({' '.join(common)}))")
    for name in ("process", "file", "socket", "dir")[: rng.randint(2, 4)]:
        own = [one for one in rng.sample(PERMISSIONS, rng.randint(1, 5)) if one not in common]
        if name == "process":
            own += rng.sample(("transition", "dyntransition"), rng.randint(0, 2))
        own = own or ["only"]
        policy.add(f"(class {name} ({' '.join(own)}))")
        policy.classes[name] = own
        if rng.random() < 0.5:
            policy.add(f"(classcommon {name} shared)")
            policy.classes[name] = common + own
    policy.add(f"(classorder ({' '.join(policy.classes)}))")
    policy.add("(classpermission some)")
    for name in policy.some(list(policy.classes)):
        policy.add(f"(classpermissionset some {policy.permissions(name)})")
    policy.add("(classmap mapped (use))")
    policy.add(f"(classmapping mapped use {policy.permissions()})")
    policy.add("(classmapping mapped use some)")


def _levels(policy: RandomPolicy) -> None:
    rng = policy.rng
    policy.sensitivities = [f"s{number}" for number in range(rng.randint(1, 4))]
    policy.categories = [f"c{number}" for number in range(rng.randint(1, 8))]
    for name in policy.sensitivities:
        policy.add(f"(sensitivity {name})")
    for name in policy.categories:
        policy.add(f"(category {name})")
    policy.add(f"(sensitivityorder ({' '.join(policy.sensitivities)}))")
    policy.add(f"(categoryorder ({' '.join(policy.categories)}))")
    policy.add("(categoryset few (not (range c0 c0)))" if len(policy.categories) > 1 else "(categoryset few (c0))")
    for name in policy.sensitivities:
        what = "(all)" if rng.random() < 0.7 else f"({' '.join(policy.some(policy.categories))})"
        policy.add(f"(sensitivitycategory {name} {what})")
    policy.add(f"(sensitivitycategory {policy.sensitivities[-1]} (all))")
    policy.add(f"(level low ({policy.sensitivities[0]}))")
    policy.add(f"(level high ({policy.sensitivities[-1]} (range c0 {policy.categories[-1]})))")
    policy.add("(levelrange whole (low high))")


def _types(policy: RandomPolicy) -> None:
    rng = policy.rng
    policy.types = [f"t_{number}" for number in range(rng.randint(2, 9))]
    policy.attributes = [f"a_{number}" for number in range(rng.randint(1, 5))]
    for name in policy.types:
        policy.add(f"(type {name})")
    if rng.random() < 0.5:
        inside = "(type inner) (allow inner self some) (allow t_0 inner (mapped (use)))"
        policy.add(f"(block base (blockabstract base) {inside})")
        policy.add("(block box (blockinherit base) (macro give ((type x)) (allow x inner some)))")
        policy.add("(in box (block deep (blockinherit base) (call give (inner)) (call box.give (t_1))))")
        policy.types += ["box.inner", "box.deep.inner"]
    for name in policy.attributes:
        policy.add(f"(typeattribute {name})")
    for number, name in enumerate(policy.attributes):
        known = policy.types + policy.attributes[:number]
        one, other = rng.choice(known), rng.choice(known)
        forms = [
            f"({' '.join(policy.some(policy.types))})",
            f"(and {one} {other})",
            f"(or {one} {other})",
            f"(xor {one} {other})",
            f"(not {one})",
            "(all)",
        ]
        policy.add(f"(typeattributeset {name} {rng.choice(forms)})")
        if rng.random() < 0.3:
            policy.add(f"(typeattributeset {name} ({rng.choice(policy.types)}))")
    policy.add("(typealias other_name)")
    policy.add(f"(typealiasactual other_name {policy.types[0]})")
    if rng.random() < 0.6:
        order = policy.types[:]
        rng.shuffle(order)
        for at, child in enumerate(order[1:], 1):
            if rng.random() < 0.4:
                policy.bounds[child] = rng.choice(order[:at])
                policy.add(f"(typebounds {policy.bounds[child]} {child})")


def _identities(policy: RandomPolicy) -> None:
    rng = policy.rng
    policy.roles = [f"r_{number}" for number in range(rng.randint(1, 4))]
    policy.users = [f"u_{number}" for number in range(rng.randint(1, 3))]
    for name in policy.roles:
        policy.add(f"(role {name})")
        for _ in range(3):
            policy.add(f"(roletype {name} {policy.identity()})")
    policy.add("(roleattribute roles)")
    policy.add(f"(roleattributeset roles ({' '.join(policy.some(policy.roles))}))")
    policy.add(f"(roletype roles {rng.choice(policy.types)})")
    policy.add(f"(roletype {policy.roles[0]} {policy.types[0]})")
    for _ in range(rng.randint(0, 3)):
        policy.add(f"(roleallow {rng.choice([*policy.roles, 'roles'])} {rng.choice(policy.roles)})")
    for name in policy.users:
        policy.add(f"(user {name})")
        for role in {policy.roles[0], rng.choice(policy.roles)}:
            policy.add(f"(userrole {name} {role})")
        policy.add(f"(userlevel {name} low)")
        policy.add(f"(userrange {name} {'whole' if rng.random() < 0.7 else '(low low)'})")
    policy.add("(userattribute people)")
    policy.add(f"(userattributeset people ({' '.join(policy.some(policy.users))}))")
    policy.add("(sid kernel)")
    policy.add("(sidorder (kernel))")
    policy.add(f"(sidcontext kernel ({policy.users[0]} {policy.roles[0]} {policy.types[0]} (low low)))")


def _rules(policy: RandomPolicy) -> None:
    rng = policy.rng

    def rule() -> str:
        kind = rng.choice(("allow", "allow", "allow", "auditallow", "dontaudit"))
        target = "self" if rng.random() < 0.15 else policy.identity()
        what = rng.choice((policy.permissions(), policy.permissions(), "some", "(mapped (use))"))
        return f"({kind} {policy.identity()} {target} {what})"

    for _ in range(rng.randint(3, 25)):
        policy.add(rule())
    policy.add(f"(allow {policy.types[0]} {policy.types[-1]} {policy.permissions()})")
    for number in range(rng.randint(0, 3)):
        policy.booleans[f"b_{number}"] = rng.random() < 0.5
        policy.add(f"(boolean b_{number} {str(policy.booleans[f'b_{number}']).lower()})")
    names = list(policy.booleans)
    for _ in range(rng.randint(0, 4) if names else 0):
        # in order of their names: libsepol (3.4, 3.8) takes (or (not a) b) and (or (not b) a) for one condition
        one, other = sorted((rng.choice(names), rng.choice(names)))
        tests = one, f"(not {one})", f"(and {one} {other})", f"(xor {one} {other})", f"(or (not {one}) {other})"
        sides = [f"({side} {' '.join(rule() for _ in range(rng.randint(1, 3)))})" for side in ("true", "false")]
        policy.add(f"(booleanif {rng.choice(tests)} {' '.join(sides)})")
    policy.add(f"(macro grant ((type x) (classpermission p)) (allow x self p) (allow {policy.types[0]} x p))")
    policy.add(f"(call grant ({rng.choice(policy.types)} some))")
    policy.add(
        f"(optional gone (allow {policy.types[0]} nothing some) (allow {policy.types[0]} {policy.types[0]} some))"
    )


def _constraints(policy: RandomPolicy) -> None:
    rng = policy.rng

    def leaf(levels: bool) -> str:
        forms = [
            f"({rng.choice(('eq', 'neq'))} t1 {rng.choice(('t2', policy.identity(), policy.identity()))})",
            f"({rng.choice(('eq', 'neq'))} t2 {policy.identity()})",
            f"({rng.choice(('eq', 'neq'))} t2 ({' '.join(policy.some(policy.types + policy.attributes))}))",
            f"({rng.choice(('eq', 'neq'))} u2 people)",
            f"({rng.choice(('eq', 'neq'))} u1 {rng.choice(('u2', rng.choice(policy.users)))})",
            f"({rng.choice(('eq', 'neq', 'dom', 'domby', 'incomp'))} r1 r2)",
            f"({rng.choice(('eq', 'neq'))} r2 {rng.choice([*policy.roles, 'roles'])})",
        ]
        if levels and rng.random() < 0.6:
            pair = rng.choice(("l1 l2", "l1 h2", "h1 l2", "h1 h2", "l1 h1", "l2 h2"))
            return f"({rng.choice(('eq', 'neq', 'dom', 'domby', 'incomp'))} {pair})"
        return rng.choice(forms)

    def expression(depth: int, levels: bool) -> str:
        form = rng.random()
        if depth == 0 or form < 0.3:
            return leaf(levels)
        if form < 0.5:
            return f"(not {expression(depth - 1, levels)})"
        return f"({rng.choice(('and', 'or'))} {expression(depth - 1, levels)} {expression(depth - 1, levels)})"

    for _ in range(rng.randint(0, 3)):
        policy.add(f"(constrain {policy.permissions()} {expression(2, False)})")
    for _ in range(rng.randint(0, 3)):
        policy.add(f"(mlsconstrain {policy.permissions()} {expression(3, True)})")


def _objects(policy: RandomPolicy) -> None:
    rng = policy.rng
    done = set()
    for kind in ("typetransition", "typechange", "typemember"):
        for _ in range(rng.randint(0, 4)):
            key = kind, rng.choice(policy.types), rng.choice(policy.types), rng.choice(list(policy.classes))
            if key not in done:
                done.add(key)
                policy.add(f"({' '.join(key)} {rng.choice(policy.types)})")
    for keyword, result in (
        ("roletransition", policy.roles),
        ("rangetransition", ["whole", "(low low)", "(high high)"]),
    ):
        for _ in range(rng.randint(0, 2)):
            first = rng.choice(policy.roles if keyword == "roletransition" else policy.types)
            key = keyword, first, rng.choice(policy.types), rng.choice(list(policy.classes))
            if key not in done:
                done.add(key)
                policy.add(f"({' '.join(key)} {rng.choice(result)})")
    for part in ("user", "role", "type"):
        if rng.random() < 0.3:
            policy.add(f"(default{part} {rng.choice(list(policy.classes))} {rng.choice(('source', 'target'))})")
    if rng.random() < 0.4:
        sides = [f"{side} {part}" for side in ("source", "target") for part in ("low", "high", "low-high")]
        policy.add(f"(defaultrange {rng.choice(list(policy.classes))} {rng.choice([*sides, 'glblub', 'glblub'])})")
    if rng.random() < 0.3:
        policy.add(f"(typepermissive {rng.choice(policy.types)})")


def checked_policy(seed: int) -> str:
    """A policy for secilc's own checks: with a few neverallow rules and no bounds, or with bounds and few rules."""
    policy = random_policy(seed)
    rng = policy.rng
    if seed % 2:
        lines = [line for line in policy.lines if not line.startswith("(typebounds")]
        for _ in range(3):
            target = "self" if rng.random() < 0.2 else policy.identity()
            lines.append(f"(neverallow {policy.identity()} {target} {policy.permissions()})")
    else:
        rules = "(allow", "(call", "(booleanif"
        lines = [line for line in policy.lines if not line.startswith(rules) or rng.random() > 0.8]
        lines.append(f"(allow {policy.types[0]} {policy.types[0]} {policy.permissions()})")  # secilc wants a rule
        lines = [line for line in lines if not line.startswith("(typebounds") or f" {policy.types[0]})" not in line]
    return "\n".join(lines) + "\n"
