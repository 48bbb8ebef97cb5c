"""Debuggers inside a guest: single steps, hardware breakpoints and watchpoints under the distribution's kernel."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from cardcage.errors import HostError
from cardcage_boot.cache import cache_root
from cardcage_boot.fetch import Shelf
from installed import PROGRAM

SOURCE = Path(__file__).with_name("debug_guest.c")


def test_a_debugger_sees_what_it_sees_on_the_processor(tmp_path: Path) -> None:
    """A program that steps, breaks and watches its child by ptrace prints in a guest what it prints on the host, and
    the guest's kernel warns of nothing."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    try:
        Shelf(cache_root(), lambda what, percent: None, lambda line: None).kernel()
    except HostError as error:
        pytest.skip(str(error))
    subprocess.run(["gcc", "-O1", "-static", "-o", tmp_path / "debug", SOURCE], check=True)
    host = subprocess.run([tmp_path / "debug"], capture_output=True, check=False)
    if host.returncode or b"DR" in host.stdout:
        pytest.skip(f"this host's processes have no debug registers: {host.stdout!r}")
    command = [*PROGRAM, "boot", "--accel", "tcg", "--timeout", "120", "--share", str(tmp_path)]
    script = "/mnt/share/debug; dmesg | grep -A 9 WARNING"
    guest = subprocess.run([*command, "--exec", script], capture_output=True, check=False)
    assert guest.stdout.decode() == host.stdout.decode(), guest.stderr.decode()
