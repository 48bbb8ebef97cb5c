"""Policies: what CIL means here, and what is said about what is wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cardcage.errors import ConfigError, UsageError
from cardcage_selinux.card import DEFAULT, Selinux, SelinuxOptions
from cardcage_selinux.cil.syntax import SYNTAX
from cardcage_selinux.errors import ContextError, PolicyError
from cardcage_selinux.server.policy import Policy, load

BASE = """
(class process (transition dyntransition signal))
(class file (read write open))
(user u) (role r) (role s) (type a) (type b) (type c)
(userrole u r) (userrole u s) (roletype r a) (roletype r b) (roletype r c) (roletype s a)
"""
LEVELS = """
(mls true) (sensitivity s0) (sensitivity s1) (sensitivityorder (s0 s1))
(category c0) (category c1) (category c2) (categoryorder (c0 c1 c2))
(sensitivitycategory s0 (range c0 c1)) (sensitivitycategory s1 (all))
(level low (s0)) (level high (s1 (range c0 c2))) (userlevel u low) (userrange u (low high))
"""


def allowed(policy: Policy, source: str, target: str, tclass: str = "file") -> set[str]:
    """Permissions of one type on another."""
    vector = policy.compute_av(f"u:r:{source}", f"u:r:{target}", tclass)
    return set(policy.permissions(tclass, vector.allowed))


@pytest.mark.parametrize(
    ("text", "granted"),
    [
        ("(allow a b (file (read)))", {"read"}),
        ("(allow a b (file (not (read))))", {"write", "open"}),
        ("(allow a b (file (and (all) (xor (read) (read write)))))", {"write"}),
        ("(allow a self (file (read)))", set()),
        ("(typeattribute x) (typeattributeset x (not b)) (allow x b (file (read)))", {"read"}),
        ("(typeattribute x) (typeattributeset x (and (a b) (not a))) (allow a x (file (read)))", {"read"}),
        ("(typealias z) (typealiasactual z b) (allow a z (file (read)))", {"read"}),
        ("(classpermission p) (classpermissionset p (file (read open))) (allow a b p)", {"read", "open"}),
        ("(classmap m (use)) (classmapping m use (file (open))) (allow a b (m (use)))", {"open"}),
        ("(macro m ((type x) (type y)) (allow x y (file (read)))) (call m (a b))", {"read"}),
        ("(macro m ((classpermission p)) (allow a b p)) (call m ((file (open))))", {"open"}),
        ("(macro m ((class k)) (allow a b (k (open)))) (call m (file))", {"open"}),
        ("(optional o (allow a b (file (read))) (allow a nothing (file (read))))", set()),
        ("(optional o (allow a b (file (read))) (optional i (allow a b (file (lick)))))", {"read"}),
        ("(tunable t true) (tunableif (not t) (false (allow a b (file (open)))))", {"open"}),
        ("(boolean t true) (booleanif t (true (allow a b (file (read)))) (false (allow a b (file (open)))))", {"read"}),
        ("(block k (type d) (allow .a .b (file (read)))) (in k (allow a b (file (open))))", {"read", "open"}),
        ("(block k (blockabstract k) (allow a here (file (read)))) (block n (typealias here) (typealiasactual here b) "
         "(blockinherit k))", {"read"}),
        ("(optional o (allow a b (file (read)))) (in o (allow a b (file (open))))", {"read", "open"}),
        ("(optional o (allow a no (file (read)))) (in o (allow a b (file (open))))", set()),
        ("(macro m ((type x)) (allow x b (file (read)))) (in m (allow a b (file (open)))) (call m (c))", {"open"}),
        ("(block k (macro m ((type x)) (allow a x (file (read))))) (call k.m (b))", {"read"}),
        ("(typebounds c a) (allow c b (file (read write))) (allow a b (file (read)))", {"read"}),
        ("(constrain (file (read)) (neq t2 b)) (allow a b (file (read open)))", {"open"}),
        ("(block k (type z) (block e (allow a z (file (read))))) (block g (typealias z) (typealiasactual z b) "
         "(blockinherit k.e))", {"read"}),
        ("(block x (allow a b (file (read)))) (block o (block x (allow a b (file (open))))) (block g (blockinherit o) "
         "(blockinherit x) (block y (blockabstract y) (allow a b (file (write)))))", {"read", "open"}),
        ("(class only (p)) (common all_of (lock)) (classcommon only all_of) (allow a b (file (read)))", {"read"}),
    ],
)  # fmt: skip
def test_meaning(text: str, granted: set[str]) -> None:
    """Each supported form grants what SELinux's reference guide says."""
    assert allowed(load(BASE + text), "a", "b") == granted


def test_bounds_are_enforced_at_run_time() -> None:
    """A bounded type has nothing that its parent has not, whatever its own rules say."""
    text = BASE + "(typebounds c a) (allow a b (file (read write))) (allow c b (file (read)))"
    assert allowed(load(text, check=False), "a", "b") == {"read"}
    with pytest.raises(
        PolicyError, match=r"<text 1>:6:18: \(allow a b \(file \(read write\)\)\) grants a, .* parent .*: write"
    ):
        load(text)


def test_neverallow_names_both_rules() -> None:
    """A rule that grants what a neverallow forbids is refused, and both are named with their places."""
    text = "(typeattribute x)\n(typeattributeset x (a b))\n(neverallow x self (file (write)))\n(allow a x (file (all)))"
    with pytest.raises(PolicyError) as caught:
        load([BASE, text])
    message = str(caught.value)
    assert message.startswith("<text 2>:4:1: (allow a x (file (read write open)))")
    assert "lets a have a (file (write))" in message
    assert "<text 2>:3:1" in message


def test_roles_need_an_allow_to_change() -> None:
    """A process changes its role only where a roleallow says so."""
    text = BASE + "(allow a a (process (all)))"
    vector = load(text).compute_av("u:r:a", "u:s:a", "process")
    assert load(text).permissions("process", vector.allowed) == ("signal",)
    vector = load(text + "(roleallow r s)").compute_av("u:r:a", "u:s:a", "process")
    assert vector.allowed == 7


def test_levels() -> None:
    """Levels are compared as mlsconstrain says, and contexts outside of a user's range are refused."""
    policy = load(BASE + LEVELS + "(mlsconstrain (file (write)) (eq l1 l2)) (allow a b (file (read write)))")
    assert policy.compute_av("u:r:a:s0", "u:r:b:s0", "file").allowed == 3
    assert policy.compute_av("u:r:a:s1:c0,c2", "u:r:b:s0", "file").allowed == 1
    assert policy.canonical("u:r:a:s0:c1,c0-s1:c0,c1,c2") == "u:r:a:s0:c0,c1-s1:c0.c2"
    for wrong in (
        "u:r:a",
        "u:r:a:s0:c2",
        "u:r:a:s1-s0",
        "u:r:a:s9",
        "u:r:a:s0:",
        "x:r:a:s0",
        "u:r:a:s0:c1.c0",
        "",
        "u:s:b:s0",
    ):
        assert not policy.valid_context(wrong)
    with pytest.raises(ContextError, match='no sensitivity is called "s9"'):
        policy.compute_av("u:r:a:s9", "u:r:b:s0", "file")


def test_new_objects() -> None:
    """A new object takes its type, role and range from rules, defaults and the name it is given."""
    rules = """(typetransition a b file c) (typetransition a b file "log" a) (typechange a b file a)
    (typemember a b file c) (rangetransition a b file (high high)) (roletransition r b process s)
    (defaultuser file target)"""
    policy = load(BASE + LEVELS + rules)
    assert policy.compute_create("u:r:a:s0", "u:r:b:s0", "file") == "u:object_r:c:s1:c0.c2"
    assert policy.compute_create("u:r:a:s0", "u:r:b:s0", "file", "log") == "u:object_r:a:s1:c0.c2"
    assert policy.compute_create("u:r:a:s0", "u:r:b:s0", "process") == "u:s:a:s0"
    assert policy.compute_relabel("u:r:a:s0-s1", "u:r:b:s0", "file") == "u:object_r:a:s0"
    assert policy.compute_member("u:r:a:s0-s1", "u:r:b:s0", "file") == "u:object_r:c:s0"
    with pytest.raises(ContextError, match="role s may not have type c"):
        load(BASE + "(roletransition r b process s)").compute_create("u:r:c", "u:r:b", "process")


def test_booleans() -> None:
    """A change of booleans gives another policy with the next sequence number; names are checked."""
    policy = load(BASE + "(boolean on false) (booleanif on (true (allow a b (file (read)))))")
    changed = policy.with_booleans({"on": True})
    assert (policy.booleans, changed.booleans) == ({"on": False}, {"on": True})
    assert (allowed(policy, "a", "b"), allowed(changed, "a", "b")) == (set(), {"read"})
    assert changed.sequence == policy.sequence + 1
    with pytest.raises(UsageError, match=r'no boolean is called "onn"\. Did you mean "on"'):
        policy.with_booleans({"onn": True})


@pytest.mark.parametrize(("word", "mask"), [("allow", 0xFFFFFFFF), ("deny", 0), ("reject", 0)])
def test_unknown_classes(word: str, mask: int) -> None:
    """A class that the policy lacks is granted or denied as handleunknown says, and may be refused at once."""
    policy = load(BASE + f"(handleunknown {word})")
    assert policy.compute_av("u:r:a", "u:r:b", "tap").allowed == mask
    if word == "reject":
        with pytest.raises(ConfigError, match="has no class tap"):
            policy.require({"tap": ("open",)})
        with pytest.raises(ConfigError, match="class file lacks lick"):
            policy.require({"file": ("lick",)})
    else:
        policy.require({"tap": ("open",)})


def test_permissive_and_audit() -> None:
    """The vector says what is logged and whether the source is permissive."""
    policy = load(BASE + "(typepermissive a) (auditallow a b (file (read))) (dontaudit a b (file (write)))")
    vector = policy.compute_av("u:r:a", "u:r:b", "file")
    assert (vector.auditallow, vector.auditdeny, vector.permissive) == (1, 0xFFFFFFFD, True)
    assert not policy.compute_av("u:r:b", "u:r:b", "file").permissive


def test_validatetrans() -> None:
    """A relabel is judged by old, new and task."""
    policy = load(BASE + "(validatetrans file (or (eq t1 t2) (eq t3 c)))")
    assert not policy.validate_transition("u:r:a", "u:r:b", "u:r:a", "file")
    assert policy.validate_transition("u:r:a", "u:r:b", "u:r:c", "file")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("(allow a b (file (read)))\n  (allow a (file (read)))", r"2:3: expected \(allow SOURCE TARGET CLASSP"),
        ("(allow a bb (file (read)))", '1:10: no type is called "bb". Did you mean "b"'),
        ("(allow a b (file (raed)))", '1:19: no permission of file is called "raed". Did you mean "read"'),
        ("(alow a b (file (read)))", '1:1: no statement "alow" is supported. Did you mean "allow"'),
        ("(allowx a b (ioctl file (0x1)))", "1:1: allowx: extended permissions are not supported"),
        ('(filecon "/x" any ())', "1:1: filecon labels objects of a kernel"),
        ("(block k\n (genfscon proc / (u r a)))", "2:2: genfscon labels"),
        ("(macro m () (nosuch))", '1:13: no statement "nosuch"'),
        ("(type a)", r'1:1: type "a" is already declared at <text 1>:4:28'),
        ("(type 9)", '1:7: "9" is not a name'),
        ("(type all)", '1:7: "all" has a meaning'),
        ("(type d", "1:1: this bracket is never closed"),
        ("(type d))", "1:9: this bracket closes nothing"),
        ("type (type d)", "1:1: expected a statement in brackets, found type"),
        ('(typetransition a b file "x\n" c)', "1:26: this string is not closed on its line"),
        ("(type d) \x00", r"1:10: character '\\x00' is not allowed"),
        ("(type d)\n;é\n(type é)", "3:7: character 'é' is not allowed"),
        ("(" * 200, "1:101: lists nest deeper than 100"),
        ("()", "1:1: expected a statement"),
        ("((type d))", "1:1: expected a statement"),
        ("(typeattribute x) (typeattributeset x (not x))", '1:1: typeattribute "x" is made of itself'),
        ("(typealias z) (allow z z (file (read)))", '1:1: typealias "z" stands for nothing'),
        ("(macro m () (call m ())) (call m ())", '1:13: "m" holds itself'),
        ("(block k (blockinherit k))", '1:10: "k" holds itself'),
        ("(macro m ((type x)) (allow x x (file (read)))) (call m ())", '1:48: macro "m" takes 1 arguments, 0'),
        ("(typetransition a b file a) (typetransition a b file c)", "1:29: conflicts with the rule at <text 2>:1:1"),
        ("(typebounds a b) (typebounds b a)", '1:18: "a" would bound itself'),
        ("(constrain (file (read)) (eq l1 l2))", "1:26: levels are compared in mlsconstrain"),
        ("(constrain (file (read)) (dom t1 t2))", "1:31: types are compared by eq and neq"),
        ("(constrain (file (read)) (eq t1 r2))", '1:33: "t1" cannot be compared with "r2"'),
        ("(boolean o true) (booleanif o (true (type d)))", "1:37: type cannot stand in a booleanif"),
        ("(mls false)\n(mls false)", "2:1: mls is already given"),
        ("(handleunknown deny) (handleunknown deny)", "1:22: handleunknown is already given"),
        ("(boolean o maybe)", "1:12: expected true or false"),
        ("(sensitivity s0) (sensitivity s1) (sensitivityorder (s0)) ", '1:18: sensitivity "s1" is in no sens'),
        ("(category x) (category y) (categoryorder (x)) (categoryorder (y))", "no categoryorder says which of"),
        ("(category x) (category y) (categoryorder (x y)) (categoryorder (y x))", "comes before itself"),
        ("(mls true)", '4:1: user "u" has no userrange'),
        ("(sid k) (sidcontext k (u r a))\n(context n (u s b))", "2:12: role s may not have type b"),
        ("(class k (" + " ".join(f"p{n}" for n in range(33)) + "))", 'class "k" has 33 permissions, 32 are possible'),
    ],
)  # fmt: skip
def test_errors_have_places(text: str, problem: str) -> None:
    """What is wrong with a policy is one line with file, line and column."""
    with pytest.raises(PolicyError, match=problem) as caught:
        load([BASE, text])
    assert "\n" not in str(caught.value).replace("\n", "", text.count("\n"))
    assert caught.value.line >= 1
    assert caught.value.column >= 1


def test_files(tmp_path: Path) -> None:
    """Several files make one policy; what cannot be read or decoded is named."""
    first, second, wrong = tmp_path / "base.cil", tmp_path / "more.cil", tmp_path / "wrong.cil"
    first.write_text(BASE)
    second.write_text("(allow a b (file (read)))")
    wrong.write_bytes(b"(type d)\n(type \xff)")
    assert allowed(load([first, str(second)]), "a", "b") == {"read"}
    with pytest.raises(PolicyError, match=r"wrong.cil:2:7: this is not UTF-8 text"):
        load([wrong])
    with pytest.raises(ConfigError, match=r"none.cil: policy cannot be read: No such file"):
        load([tmp_path / "none.cil"])


def test_growth_is_limited() -> None:
    """Macros that call macros that call macros do not eat the memory."""
    lines = [f"(macro m{n} () {f'(call m{n + 1} ()) ' * 20})" for n in range(12)]
    with pytest.raises(PolicyError, match="grow to more than"):
        load([BASE, "\n".join([*lines, "(macro m12 () (allow a b (file (read))))", "(call m0 ())"])])


def test_bounds_with_equal_conditions() -> None:
    """A child may have under a condition what its parent has under one that means the same, and no other."""
    text = (
        BASE
        + "(boolean x true) (boolean y true) (typebounds a c) (booleanif (and x y) (true (allow a b (file (read)))))"
    )
    load(text + "(booleanif (not (or (not y) (not x))) (true (allow c b (file (read)))))")
    with pytest.raises(PolicyError, match="more than its parent has"):
        load(text + "(booleanif x (true (allow c b (file (read)))))")


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ([f"(type x{n}) (typebounds x{n - 1} x{n})" for n in range(1, 60)], "is bounded through more than 50 types"),
        ([f"(typeattribute x{n}) (typeattributeset x{n} (x{n - 1} a))" for n in range(1, 150)], "nest deeper"),
        (
            [f"(typeattribute x{n}) (typeattributeset x{n} {'(not ' * 60}x{n - 1}{')' * 60})" for n in range(1, 60)],
            "nest too deep",
        ),
        ([f"(classpermission x{n}) (classpermissionset x{n} (x{n - 1}))" for n in range(1, 60)], "nest deeper"),
        ([f"(block x{n} (blockinherit x{n - 1}))" for n in range(1, 130)], "nest deeper than 100"),
    ],
)
def test_depth_is_limited(lines: list[str], problem: str) -> None:
    """Chains that would exhaust the interpreter's stack are refused with a place."""
    first = {"typeb": "(type x0)", "typea": "(type x0)", "class": "(classpermission x0)", "block": "(block x0)"}
    keyword = next(one for one in first if one in lines[0].replace("(type x1) (", "") or one == "block")
    kind = "(classpermissionset x0 (file (read)))" if keyword == "class" else ""
    with pytest.raises(PolicyError, match=problem):
        load([BASE, "\n".join([first[keyword], kind, *reversed(lines)])])


def test_nothing_is_a_policy() -> None:
    """An empty text is a policy that grants nothing and knows no context."""
    policy = load("; nothing")
    assert policy.booleans == {}
    assert not policy.valid_context("a:b:c")


def test_the_page_lists_the_statements() -> None:
    """docs/selinux.md names each statement that is supported, and no other."""
    page = (Path(__file__).parents[2] / "docs/selinux.md").read_text()
    table = page.partition("| kind | statements |")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"`(\w+)`", table)) == sorted(SYNTAX)


def test_a_policy_that_rejects_what_it_lacks_is_not_loaded(tmp_path: Path) -> None:
    """The card refuses a policy with (handleunknown reject) that lacks a class or permission of this object manager."""
    shipped = DEFAULT.read_text()
    file = tmp_path / "p.cil"
    options = SelinuxOptions(policy=[str(file)], audit="none", labels="none")
    changed = re.sub(r"\(handleunknown \w+\)", "", shipped) + "(handleunknown reject)"
    file.write_text(changed)
    Selinux(options)
    file.write_text(changed.replace("route", "detour"))
    with pytest.raises(ConfigError, match="class interrupt lacks route"):
        Selinux(options)
