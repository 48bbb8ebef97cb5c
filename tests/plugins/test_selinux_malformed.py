"""Malformed policies: always an error with a place, never anything else."""

from __future__ import annotations

import os
import re
from pathlib import Path
from random import Random

from cardcage_selinux.cil.syntax import SYNTAX
from cardcage_selinux.errors import PolicyError
from cardcage_selinux.server.policy import load
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from installed import cardcage
from selinux_sink import SINK

CASES = int(os.environ.get("CARDCAGE_SELINUX_MALFORMED", "60"))
"""Cases of each kind; 10000 is the long form."""

TOKENS = re.findall(r'"[^"]*"|[()]|[^\s()"]+', SINK)
NAMES = sorted(
    {one for one in TOKENS if one not in "()"}
    | set(SYNTAX)
    | {"all", "range", "l1", "t3", "self", "-", ".", ".a_t", "a."}
)
PRINTED = st.text(st.characters(codec="utf-8"), max_size=60)


def judge(text: str) -> bool:
    """Whether *text* is a policy; anything but an error with a place in it fails."""
    wrong, policy = None, None
    try:
        policy = load(f";\n{text}")
    except PolicyError as error:
        wrong = error
    if policy is None:
        assert wrong is not None
        assert re.match(r"<text 1>:\d+:\d+: .", str(wrong)), wrong
        assert 1 <= wrong.line <= text.count("\n") + 2
        assert wrong.column >= 1
        assert "\n" not in str(wrong)
        return False
    context = next(iter(policy.tables.sids.values()), None)
    for tclass in policy.tables.classes if context else ():
        policy.compute_av(context or "", context or "", tclass)
    return True


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """The policy of all statements after a few edits of tokens."""
    rng = Random(draw(st.integers(0, 2**32)))
    words = TOKENS[:]
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(words))
        edit = rng.randrange(6)
        if edit == 0:
            del words[at]
        elif edit == 1:
            words[at] = rng.choice(NAMES)
        elif edit == 2:
            words.insert(at, rng.choice([*NAMES, "(", ")", "()", "(("]))
        elif edit == 3:
            other = rng.randrange(len(words))
            words[at], words[other] = words[other], words[at]
        elif edit == 4:
            words[at:at] = words[at : at + rng.randint(1, 30)]
        else:
            del words[at : at + rng.randint(1, 30)]
    return " ".join(words)


def statement() -> st.SearchStrategy[str]:
    """A statement with the right keyword and any arguments."""
    argument = st.recursive(
        st.sampled_from(NAMES),
        lambda inner: st.lists(inner, max_size=4).map(lambda items: f"({' '.join(items)})"),
        max_leaves=8,
    )
    pair = st.tuples(st.sampled_from(sorted(SYNTAX)), st.lists(argument, max_size=5))
    return pair.map(lambda one: f"({one[0]} {' '.join(one[1])})")


QUIET = settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck), database=None)


def test_all_statements_are_in_the_policy() -> None:
    """The policy that is damaged has each statement, and compiles."""
    assert judge(SINK)
    assert set(SYNTAX) <= set(TOKENS)


@QUIET
@given(mutated())
def test_damaged_policies(text: str) -> None:
    """A policy with a few tokens changed compiles, or is refused with file, line and column."""
    judge(text)


@QUIET
@given(st.lists(statement(), max_size=6))
def test_random_statements(statements: list[str]) -> None:
    """Statements with any arguments, after a whole policy, are taken or refused with a place."""
    judge(SINK + "\n".join(statements))


@QUIET
@given(st.one_of(PRINTED, st.text('()"; \n\tab.-_', max_size=80), st.lists(statement(), max_size=5).map(" ".join)))
def test_random_text(text: str) -> None:
    """Any text is a policy, or refused with a place."""
    judge(text)


@QUIET
@given(st.integers(0, len(SINK)), st.integers(0, 6), PRINTED)
def test_damaged_characters(at: int, gone: int, new: str) -> None:
    """A policy with some characters replaced is taken, or refused with a place."""
    judge(SINK[:at] + new + SINK[at + gone :])


def test_a_machine_says_where_its_policy_is_wrong(tmp_path: Path) -> None:
    """A configuration whose policy file has an error is refused with the place in that file."""
    site = tmp_path / "site.cil"
    site.write_text("\n(allow nobody_t nothing_t (file (read)))\n")
    file = tmp_path / "vm.toml"
    file.write_text(f'[security]\ncheckers = [{{ type = "selinux", policy = ["default", "{site}"] }}]\n')
    done = cardcage("run", str(file))
    assert done.returncode == 2, done.stderr
    assert 'site.cil:2:8: no type is called "nobody_t"' in done.stderr
