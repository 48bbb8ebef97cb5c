"""Compares the security server with libsepol on random policies.

``python tests/plugins/selinux_compare.py QUERIES [SEED | FILE.cil ...]``: each query is one (policy, source, target,
class); policies have their booleans changed half-way. Prints what was compared; the status is 1 at the first
difference, with its seed.
"""

from __future__ import annotations

import marshal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from attrs import define, field
from cardcage_selinux.cil.sexpr import Node, parse
from cardcage_selinux.cil.syntax import EXTENDED, LABELS
from cardcage_selinux.errors import ContextError
from cardcage_selinux.server.kept import frozen, thawed
from cardcage_selinux.server.policy import Policy, load
from selinux_random import RandomPolicy, random_policy
from selinux_sepol import Sepol, bounds_work, secilc

if TYPE_CHECKING:
    from collections.abc import Callable

    Asked = tuple[str, str, str]

UNSUPPORTED = {*LABELS, *EXTENDED, "rolebounds", "userbounds"}

EACH = 100
"""Queries a policy."""


class Difference(AssertionError):
    """The two do not agree."""


def compare(seed: int, folder: Path, *, direct: bool, queries: int = EACH) -> Counter[str]:
    """One random policy. Returns what was compared; raises Difference.

    Args:
        direct: whether libsepol can be asked about bounded types. Otherwise what it would say is put together from its
            answers for the same policy without bounds: what the child has, of that what its parent has, and so on.
    """
    return compare_policy(random_policy(seed), f"seed {seed}", folder, direct=direct, queries=queries)


def compare_text(text: str, name: str, folder: Path, queries: int) -> Counter[str]:
    """A given policy, whose bounds are one deep. Statements that are not supported here are left out, for us alone.

    What secilc itself does not take has to be taken out before. Returns what was compared; raises Difference.
    """
    ours, seen = supported(parse(text, name)), Counter[str]()
    tables = load(ours, check=False).tables
    made = RandomPolicy(
        Random(name),
        tables.mls,
        text.splitlines(),
        {one.name: list(one.permissions) for one in tables.classes.values() if one.permissions},
        list(tables.types),
        roles=[*tables.roles[1:], tables.roles[0]],
        users=list(tables.users),
        booleans=tables.booleans,
        sensitivities=list(tables.levels.sensitivities),
        categories=list(tables.levels.categories),
    )
    for _ in range(100):  # few random contexts may be valid
        if seen["queries"] >= queries:
            break
        seen += compare_policy(made, name, folder, direct=True, queries=queries, ours=ours)
    return seen


def supported(nodes: list[Node]) -> str:
    """Statements as text, without those that our compiler says it does not support."""

    def text(node: Node) -> str:
        if node.items is None:
            return str(node)
        return f"({' '.join(text(one) for one in node.items if one.head not in UNSUPPORTED)})"

    return "\n".join(text(node) for node in nodes if node.head not in UNSUPPORTED)


def compare_policy(
    made: RandomPolicy, name: str, folder: Path, *, direct: bool, queries: int, ours: str | None = None
) -> Counter[str]:
    """One policy; *ours* is its text for us, when that differs. Returns what was compared; raises Difference."""
    binaries = []
    for which, text in (("with", made.text), ("bare", made.bare))[: 1 if direct or not made.bounds else 2]:
        (folder / which).mkdir(exist_ok=True)
        status, binary, said = secilc(text, folder / which, "-N")
        if status:
            raise Difference(f"{name}: secilc refuses: {said}")
        binaries.append(binary)
    tables = frozen(load(ours or made.text, check=False).tables)
    policy = Policy(thawed(marshal.loads(marshal.dumps(tables))))  # as machines use it: kept from an earlier run
    seen: Counter[str] = Counter(policies=1)
    values: dict[str, bool] = {}
    for count in (queries // 2, queries - queries // 2):
        if count and seen["contexts"] and made.booleans:
            values = {name: made.rng.random() < 0.5 for name in made.booleans}
            policy = policy.with_booleans(values)
            seen["boolean changes"] += 1
        run = Run(name, made, policy, seen, bool(binaries[1:]))
        sepol = Sepol(binaries[0])
        sepol.set_booleans(values)
        for _ in range(count):
            run.query(sepol)
        run.transitions(sepol)
        if run.bounded:
            bare = Sepol(binaries[1])
            bare.set_booleans(values)
            run.bounds(bare)
    return seen


def made_by(act: Callable[[str, str, str], str], source: str, target: str, tclass: str) -> str | None:
    """The context, ``None`` when there is none."""
    try:
        return act(source, target, tclass)
    except ContextError:
        return None


def retyped(context: str, name: str) -> str:
    """A context with another type."""
    user, role, _, *rest = context.split(":", 3)
    return ":".join([user, role, name, *rest])


@define
class Run:
    """Queries of one policy with one set of booleans.

    Attributes:
        apart: whether bounded sources are asked about by :meth:`bounds`.
    """

    name: str
    made: RandomPolicy
    policy: Policy
    seen: Counter[str]
    apart: bool
    asked: list[Asked] = field(factory=list)
    bounded: list[Asked] = field(factory=list)

    def query(self, sepol: Sepol) -> None:
        """One query: validity, canonical text, access vector and new contexts."""
        made, policy = self.made, self.policy
        tclass = made.rng.choice(list(made.classes))
        found: list[str] = []
        for role in (None, "object_r" if made.rng.random() < 0.4 else None):
            for _ in range(6):  # most random contexts are not valid
                context = made.context(role)
                sid = sepol.sid(context)
                self.same((context,), "validity", policy.valid_context(context), sid is not None)
                self.seen["contexts"] += 1
                if sid is not None:
                    self.same((context,), "canonical", policy.canonical(context), sepol.text(sid))
                    found.append(context)
                    self.made.names[context] = sepol.text(sid)
                    break
        if len(found) < 2:
            return
        one = found[0], found[1], tclass
        self.asked.append(one)
        if self.apart and made.names[found[0]].split(":")[2] in made.bounds:
            self.bounded.append(one)
        else:
            theirs = sepol.av(*one)
            assert theirs is not None
            self.vector(one, sepol, theirs.allowed, theirs.auditallow, theirs.auditdeny)
        for kind, act in (("change", policy.compute_relabel), ("member", policy.compute_member)):
            self.same(one, kind, made_by(act, *one), sepol.new(kind, *one))
            self.seen["new contexts"] += 1

    def vector(self, one: Asked, sepol: Sepol, *masks: int) -> None:
        """The access vector, permission by permission."""
        ours = self.policy.compute_av(*one)
        for name in self.made.classes[one[2]]:
            bits, mask = sepol.bit(one[2], name), self.policy.mask(one[2], [name])
            for what, theirs in zip(("allowed", "auditallow", "auditdeny"), masks, strict=True):
                self.same(one, f"{what} {name}", bool(getattr(ours, what) & mask), bool(theirs & bits))
        self.seen["queries"] += 1
        self.seen["granted something"] += bool(ours.allowed)

    def bounds(self, bare: Sepol) -> None:
        """The access vectors of bounded sources, put together from the rules alone."""
        for one in self.bounded:
            source, target = (self.made.names[context] for context in one[:2])
            tclass = one[2]
            first = bare.av(source, target, tclass)
            assert first is not None
            allowed = first.allowed
            while (name := source.split(":")[2]) in self.made.bounds:
                source = retyped(source, self.made.bounds[name])
                target = retyped(target, self.made.bounds.get(target.split(":")[2], target.split(":")[2]))
                above = bare.av(source, target, tclass)
                assert above is not None
                allowed &= above.allowed
            self.vector(one, bare, allowed, first.auditallow, first.auditdeny)
            self.seen["bounded"] += 1

    def transitions(self, sepol: Sepol) -> None:
        """The contexts of new objects for all that was asked."""
        for one, theirs in zip(self.asked, sepol.transitions(self.asked) if self.asked else [], strict=True):
            self.same(one, "create", made_by(self.policy.compute_create, *one), theirs)
            self.seen["new contexts"] += 1

    def same(self, one: tuple[str, ...], what: str, ours: object, theirs: object) -> None:
        """Raises Difference."""
        if ours != theirs:
            where = f"{self.name}: {' '.join(one)}: {what}"
            raise Difference(f"{where}: {ours!r} here, {theirs!r} in libsepol")


def main_files(queries: int, files: list[str]) -> int:
    """Given policies instead of random ones."""
    with tempfile.TemporaryDirectory() as folder:
        for file in files:
            try:
                print(file, dict(compare_text(Path(file).read_text(), file, Path(folder), queries)))
            except Difference as error:
                print(error)
                return 1
    return 0


def main(queries: int, seed: int) -> int:
    """Until *queries* access vectors were compared."""
    seen: Counter[str] = Counter()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        direct = bounds_work(Path(folder))
        while seen["queries"] < queries:
            try:
                seen += compare(seed, Path(folder), direct=direct)
            except Difference as error:
                print(error)
                return 1
            seed += 1
    print("bounds asked of libsepol itself" if direct else "bounds put together: this libsepol dies of them")
    print(f"no difference in {time.monotonic() - began:.0f} s: {dict(seen)}; next seed {seed}")
    return 0


if __name__ == "__main__":
    if len(sys.argv) > 2 and not sys.argv[2].isdigit():
        sys.exit(main_files(int(sys.argv[1]), sys.argv[2:]))
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
