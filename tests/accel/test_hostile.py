"""Hostile guests end in nothing worse than their own fault; ``hostile_fuzz.py`` has the long form."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hostile.case import Case, random_case
from hostile.oracles import ROLES
from hostile.prove import PATCHES, prove
from hostile.supervise import Supervisor, replay
from hostile.variants import ROOT, make

LONG = bool(os.environ.get("CARDCAGE_LONG_TESTS"))


@pytest.mark.once
def test_short() -> None:
    """Half a minute of random guests finds nothing: no process dies, no vCPU is deaf, no exception leaves run()."""
    supervisor = Supervisor(make(), 1, 2, ["--cpus", "3", "--case-seconds", "0.3"])
    assert not supervisor.run(25, stop_after=1, quiet=True)
    assert supervisor.counts["cases"] > 10


@pytest.mark.once
@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")
def test_check_build() -> None:
    """The tables' invariants hold under random guests, with fences and sanitizers about the translator's memory."""
    supervisor = Supervisor(make("check"), 1, 2, ["--cpus", "3", "--case-seconds", "0.3"])
    assert not supervisor.run(15, stop_after=1, quiet=True)
    assert supervisor.counts["cases"] > 3


@pytest.mark.once
@pytest.mark.parametrize("theme", sorted(ROLES))
def test_role(theme: str) -> None:
    """A program that knows what it must see sees it, with memory slots that change and kicks beside, on two vCPUs."""
    assert not replay(Case(5, theme, 2, seconds=1.5, acts=["flip", "kick", "msi", "nmi"]), make(), 1)


def test_seed() -> None:
    """A seed makes the same case again, and a case comes back from its text."""
    one = random_case(77, 4, 0.5)
    assert one == random_case(77, 4, 0.5) == Case.from_json(one.to_json())


@pytest.mark.skipif(not shutil.which("patch"), reason="needs patch")
@pytest.mark.parametrize("patch", PATCHES, ids=[one.stem for one in PATCHES])
def test_patches_apply(patch: Path) -> None:
    """Patches that put faults back apply to the sources as they are, where they are meant."""
    command = ["patch", "-p1", "--fuzz=0", "--dry-run", "--silent", "--input", str(patch)]
    assert subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True).stdout == ""


@pytest.mark.skipif(not LONG, reason="takes up to 15 minutes each: set CARDCAGE_LONG_TESTS")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("patch", PATCHES, ids=[one.stem for one in PATCHES])
def test_proof(patch: Any) -> None:
    """A fault that is put back is found within 15 minutes."""
    assert prove(patch) is not None
