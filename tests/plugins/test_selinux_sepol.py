"""The security server against libsepol, on random policies and random malformed ones."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from itertools import product
from pathlib import Path

import cardcage_selinux
import pytest
from cardcage_selinux.errors import PolicyError
from cardcage_selinux.server.policy import load
from selinux_compare import compare, compare_text
from selinux_random import checked_policy
from selinux_sepol import HAVE, MISSING, Sepol, bounds_work, secilc
from selinux_sink import SINK

pytestmark = pytest.mark.skipif(not HAVE, reason=MISSING)

POLICIES = int(os.environ.get("CARDCAGE_SELINUX_POLICIES", "8"))
"""Random policies in this run; ``python tests/plugins/selinux_compare.py 100000`` is the long form."""


def test_decisions_are_libsepols(tmp_path: Path) -> None:
    """Validity, access vectors and new contexts of random policies are what libsepol computes."""
    direct = bounds_work(tmp_path)
    seen: Counter[str] = Counter()
    for seed in range(POLICIES):
        seen += compare(seed, tmp_path, direct=direct)
    assert seen["queries"] > 40 * POLICIES
    assert seen["granted something"] > 5 * POLICIES


def test_every_statement_means_what_secilc_makes_of_it(tmp_path: Path) -> None:
    """A policy with every statement decides as secilc's binary does in libsepol."""
    assert compare_text(SINK, "sink", tmp_path, 400)["queries"] >= 400


@pytest.mark.skipif(not shutil.which("sepol_compute_av"), reason="apt-get install sepol-utils")
def test_the_command_line_tool_says_the_same(tmp_path: Path) -> None:
    """sepol_compute_av prints the permissions that are granted here."""
    status, binary, said = secilc(SINK, tmp_path)
    assert status == 0, said
    policy = load(SINK)
    for source, target, tclass in (
        ("u_u:worker:a_t:s0", "u_u:object_r:c_t:s0", "file"),
        ("u_u:worker:a_t:s0-s1:c0,c2", "u_u:object_r:b_t:s1:c0", "file"),
        ("u_u:worker:init_t:s0", "u_u:boss:d_t:s0", "process"),
        ("u_u:worker:a_t:s0", "u_u:object_r:c_t:s0", "sock"),
    ):
        command = ["sepol_compute_av", str(binary), source, target, tclass]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        line = next(line for line in done.stdout.splitlines() if line.startswith("allowed:"))
        vector = policy.compute_av(source, target, tclass)
        assert set(line.split()[1:]) == set(policy.permissions(tclass, vector.allowed))


def test_the_shipped_policy_means_what_secilc_makes_of_it(tmp_path: Path) -> None:
    """The policy that ships decides here as it does in libsepol."""
    text = Path(cardcage_selinux.__file__).with_name("default.cil").read_text()
    assert compare_text(text, "default.cil", tmp_path, 300)["queries"] >= 300


def test_checks_are_libsepols(tmp_path: Path) -> None:
    """neverallow rules and bounds refuse the policies that secilc refuses, and no others."""
    seen: Counter[tuple[bool, bool]] = Counter()
    for seed in range(2 * POLICIES):
        text = checked_policy(seed)
        status, _, said = secilc(text, tmp_path)
        try:
            load(text)
            ours = ""
        except PolicyError as error:
            ours = str(error)
        assert (not ours) == (status == 0), (seed, ours, said)
        seen[not ours, status == 0] += 1
    assert len(seen) == 2


TWO = """(class file (read write)) (classorder (file)) (sid kernel) (sidorder (kernel))
(user u) (role r) (type t) (type o)
(userrole u r) (roletype r t) (roletype r o) (sensitivity s) (category x) (sensitivityorder (s)) (categoryorder (x))
(userlevel u (s)) (userrange u ((s) (s))) (sidcontext kernel (u r t ((s) (s)))) (allow t t (file (read)))
(boolean a false) (boolean b false)
(booleanif FIRST (true (allow t o (file (read))))) (booleanif SECOND (true (allow t o (file (write)))))
"""


MEANS = {
    "(or (not a) b)": lambda a, b: not a or b,
    "(or b (not a))": lambda a, b: not a or b,
    "(not (and a (not b)))": lambda a, b: not a or b,
    "(or (not b) a)": lambda a, b: not b or a,
    "(and a (not b))": lambda a, b: a and not b,
    "(and b (not a))": lambda a, b: b and not a,
    "(xor a b)": lambda a, b: a is not b,
    "(xor b a)": lambda a, b: a is not b,
}


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("(or (not a) b)", "(or (not b) a)", False),
        ("(and a (not b))", "(and b (not a))", False),
        ("(or (not a) b)", "(or b (not a))", True),
        ("(or (not a) b)", "(not (and a (not b)))", True),
        ("(xor a b)", "(xor b a)", True),
    ],
)
def test_conditions_that_libsepol_takes_for_one(first: str, second: str, same: bool, tmp_path: Path) -> None:
    """Each condition means what it says; libsepol agrees, or decides the second by the first where they differ."""
    text = TWO.replace("FIRST", first).replace("SECOND", second)
    status, binary, said = secilc(text, tmp_path)
    assert status == 0, said
    policy, merged = load(text), load(TWO.replace("FIRST", first).replace("SECOND", first))
    sepol, differ = Sepol(binary), False
    for a, b in product((False, True), repeat=2):
        values = {"a": a, "b": b}
        sepol.set_booleans(values)
        theirs = sepol.av("u:r:t", "u:r:o", "file")
        assert theirs is not None
        ours, other = (
            one.with_booleans(values).compute_av("u:r:t", "u:r:o", "file").allowed for one in (policy, merged)
        )
        assert ours == MEANS[first](a, b) + 2 * MEANS[second](a, b)
        assert theirs.allowed in ((ours,) if same else (ours, other))
        differ = differ or ours != other
    assert differ is not same
