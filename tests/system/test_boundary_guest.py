"""Programs of an unprivileged user that once got at the translator from inside Linux: they run as on a processor."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from guest_boot import BOOT

HERE = Path(__file__).parent / "boundary"

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("kernel")]


def run(source: str, tmp_path: Path, *, cpus: int = 1) -> list[str]:
    """Compile ``boundary/SOURCE`` and run it in a guest as nobody: output, status, and kernel warnings."""
    compiler = "g++" if source.endswith(".cc") else "gcc"
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    options = ["-O1", "-static", "-pthread", "-include", HERE / "unprivileged.h"]
    subprocess.run([compiler, *options, "-o", tmp_path / "program", HERE / source], check=True)
    script = (
        "cp /mnt/share/program /tmp/ && chmod 755 /tmp/program && /tmp/program; "
        "echo status $?; dmesg | grep -E 'WARNING|BUG:|Oops'"
    )
    command = [*BOOT, "--cpus", str(cpus), "--share", str(tmp_path)]
    done = subprocess.run([*command, "--exec", script], capture_output=True, text=True, check=False)
    return done.stdout.splitlines()


def test_faults_in_code_that_another_processor_rewrites(tmp_path: Path) -> None:
    """A fault is the guest's own whatever its code has become meanwhile."""
    assert run("fault_race.c", tmp_path, cpus=2) == ["signals 100000", "status 0"]


def test_patched_code_is_not_stale(tmp_path: Path) -> None:
    """Code that was being translated while another processor changed it is translated again."""
    assert run("stale_patch.c", tmp_path, cpus=2)[-1] == "status 0"


def test_exceptions_in_cxx(tmp_path: Path) -> None:
    """A C++ program throws and catches."""
    assert run("throw.cc", tmp_path) == ["caught thrown", "status 0"]


def test_system_calls_are_stepped_over(tmp_path: Path) -> None:
    """TF does not reach the kernel by SYSCALL: it warns of nothing, and the program takes its own traps."""
    assert run("step_syscall.c", tmp_path) == ["traps 7", "status 0"]
