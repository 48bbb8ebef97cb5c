"""Standard output and standard error that cannot be written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = [sys.executable, "-c", "import sys; from cardcage_cli import main; sys.exit(main())"]
COMMANDS = {"run --help": 0, "--version": 0, "run nosuch.toml": 2, "run --nosuch": 2}


@pytest.mark.parametrize("words", COMMANDS)
def test_a_full_standard_error_changes_no_status(words: str, tmp_path: Path) -> None:
    """What cannot be told on standard error changes neither the output nor the exit status."""
    with open("/dev/full", "w") as full:
        done = subprocess.run([*PROGRAM, *words.split()], stdout=subprocess.PIPE, stderr=full, cwd=tmp_path, timeout=60)
    usual = subprocess.run([*PROGRAM, *words.split()], capture_output=True, cwd=tmp_path, timeout=60)
    assert (done.returncode, done.stdout) == (COMMANDS[words], usual.stdout)


@pytest.mark.parametrize("words", ["cards", "--version", "run --help"])
def test_a_full_standard_output_is_a_failure_of_the_host(words: str) -> None:
    """Output that cannot be written is one line that says so, and no card is blamed."""
    with open("/dev/full", "w") as full:
        done = subprocess.run([*PROGRAM, *words.split()], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    said = "outcome: host or accelerator failure: standard output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (70, said)
