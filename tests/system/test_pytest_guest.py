"""A stranger's tests in guests: an example distribution, installed from its wheel, with pytest and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from installed import install

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "guest-tests"
MISTAKE = """

def test_a_mistake(module_guest: Guest) -> None:
    module_guest.run("echo from the guest; echo to its console > /dev/ttyS0; exit 3")
    module_guest.console.expect("to its console", timeout=60)
    assert not get(module_guest, "vm.swappiness")
"""


def test_a_strangers_tests_run_in_guests(kernel: Path, tmp_path: Path) -> None:
    """They pass without a conftest; one that fails shows the guest's commands and its console; strictly typed."""
    install(EXAMPLE, tmp_path / "site")
    for name in ("tests", "pyproject.toml"):
        (shutil.copytree if name == "tests" else shutil.copy)(EXAMPLE / name, tmp_path / name)
    tests = tmp_path / "tests" / "test_settings.py"
    tests.write_text(tests.read_text() + MISTAKE)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--cardcage-accel", "tcg"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert "1 failed, 5 passed" in done.stdout, done.stdout
    report = done.stdout[done.stdout.index("Guest commands: debian") :]
    assert "$ echo from the guest; echo to its console > /dev/ttyS0; exit 3\nfrom the guest\n[3]\n" in report
    assert "to its console" in report[report.index("Guest console: debian") :]


@pytest.mark.once
def test_the_example_is_strictly_typed() -> None:
    """``mypy --strict`` takes the library and its tests."""
    pytest.importorskip("mypy")
    words = [sys.executable, "-m", "mypy", "--strict", "--namespace-packages", "--explicit-package-bases"]
    environment = {**os.environ, "MYPYPATH": str(EXAMPLE / "src")}
    paths = [str(EXAMPLE / "src" / "guest_tests"), str(EXAMPLE / "tests")]
    done = subprocess.run([*words, *paths], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
