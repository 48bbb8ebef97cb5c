"""The security server against libsepol, on random policies and random malformed ones."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import cardcage_selinux
import pytest
from cardcage_selinux.errors import PolicyError
from cardcage_selinux.policy import load
from selinux_compare import compare, compare_text
from selinux_random import checked_policy
from selinux_sepol import HAVE, MISSING, bounds_work, secilc
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
