"""The gate's second look at tests that failed beside others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.once
GATE = Path(__file__).parents[1] / "gate.py"
FIRST_TIME = """
import pathlib

def test_sound():
    pass

def test_at_first():
    seen = pathlib.Path("seen")
    was = seen.exists()
    seen.touch()
    assert was
"""


def gate(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_one.py").write_text(text)
    words = [sys.executable, str(GATE), "-p", "xdist.plugin", "-n", "2", "--dist", "loadgroup"]
    env = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_one_that_fails_beside_others_is_run_alone(tmp_path: Path) -> None:
    """A test that fails once and passes alone does not fail the gate; its name is the last that is said."""
    done = gate(tmp_path, FIRST_TIME)
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith("FAILED BESIDE OTHERS, and passed alone:\n  test_one.py::test_at_first\n")
    assert "assert was" in done.stdout
    assert done.stdout.count("test_sound") == 0


def test_one_that_fails_twice_fails_the_gate(tmp_path: Path) -> None:
    """A test that fails alone too fails the gate."""
    done = gate(tmp_path, "def test_wrong(): assert not 1\n")
    assert done.returncode == 1
    assert done.stdout.count("assert not 1") > 1
    assert done.stdout.endswith("FAILED BESIDE OTHERS:\n  test_one.py::test_wrong\n")


def test_many_fail_the_gate(tmp_path: Path) -> None:
    """More than a few are no accident: they are not run again."""
    done = gate(tmp_path, "import pytest\n@pytest.mark.parametrize('at', range(4))\ndef test_wrong(at): assert not 1\n")
    assert (done.returncode, "alone" in done.stdout) == (1, False)


def test_tests_of_a_group_run_in_one_process(tmp_path: Path) -> None:
    """Those that change what all processes of the host share, of which a group tells, are never beside each other."""
    text = "import os, pathlib, pytest\n"
    for at in range(12):
        text += f"@pytest.mark.xdist_group('host')\ndef test_{at}():\n    pathlib.Path(str(os.getpid())).touch()\n"
    assert gate(tmp_path, text).returncode == 0
    assert len([one for one in tmp_path.iterdir() if one.name.isdigit()]) == 1
