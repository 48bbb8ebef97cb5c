"""``cardcage run --exec``: a command by the agent of a guest, whatever machine that is."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cardcage.host import Host
from cardcage_boot.cache import cache_root
from cardcage_boot.fetch import Shelf
from cardcage_boot.initramfs import programs_of
from installed import PROGRAM


@pytest.fixture(scope="module")
def machine(kernel: Path) -> list[str]:
    """A kernel and an initramfs that has the agent, as words for ``cardcage run``."""
    shelf = Shelf(cache_root(), lambda what, percent: None, lambda line: None)
    with Host() as host:
        initrd = shelf.initramfs(shelf.kernel(), programs=programs_of(host.registry))
    words = ["--accel", "tcg", "-m", "128M", "--timeout", "120", "--kernel", str(kernel), "--initrd", str(initrd)]
    return [*words, "--append", "console=ttyS0 panic=-1 quiet"]


def execute(words: list[str], command: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*PROGRAM, "run", *words, "--exec", command], input=given, capture_output=True, check=False)


def test_its_streams_and_status_are_ours(machine: list[str]) -> None:
    """Input, output and errors pass byte for byte, apart from the console, and the status is the command's."""
    given = bytes(range(256)) * 4096
    done = execute(machine, "cat; echo why >&2; exit 3", given)
    assert (done.returncode, done.stdout == given) == (3, True), done.stderr.decode()
    assert b"\nwhy\n" in done.stderr
    assert done.stderr.endswith(b"outcome: the guest powered off\n")


def test_a_guest_that_ends_first(machine: list[str]) -> None:
    """A command that never ends has no status: that is a failure, unless the machine's outcome is one itself."""
    done = execute(machine, "poweroff -f; sleep 1000")
    assert (done.returncode, done.stdout) == (70, b"")
    assert done.stderr.endswith(b"cardcage: the guest ended before the command did\n")
    done = execute(machine, "echo c > /proc/sysrq-trigger; sleep 1000")
    assert done.returncode == 10, done.stderr.decode()


def test_not_of_a_machine_that_is_left(machine: list[str]) -> None:
    """--detach has no streams to give."""
    done = execute([*machine, "--detach"], "true")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(b"omit --detach, or run the command by cardcage exec")
