"""The security server against libsepol, on random policies and random malformed ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from selinux_compare import compare
from selinux_sepol import HAVE, MISSING, bounds_work

pytestmark = pytest.mark.skipif(not HAVE, reason=MISSING)

POLICIES = int(os.environ.get("CARDCAGE_SELINUX_POLICIES", "12"))
"""Random policies in this run; ``python tests/plugins/selinux_compare.py 100000`` is the long form."""


def test_decisions_are_libsepols(tmp_path: Path) -> None:
    """Validity, access vectors and new contexts of random policies are what libsepol computes."""
    direct = bounds_work(tmp_path)
    seen = sum(
        (compare(seed, tmp_path, direct=direct) for seed in range(POLICIES)),
        start=compare(1000, tmp_path, direct=direct),
    )
    assert seen["queries"] > 40 * POLICIES
    assert seen["granted something"] > 5 * POLICIES
