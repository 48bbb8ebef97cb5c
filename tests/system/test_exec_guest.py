"""A command in the distribution's kernel: its status, input, output and shares, whatever the command does."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest
from installed import PROGRAM

UART = ("--append", "module_blacklist=virtio_console")
"""A kernel without the driver of the ports."""


def execute(command: str, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    words = [*PROGRAM, "boot", "--accel", "tcg", "--timeout", "120", *arguments, "--exec", command]
    return subprocess.run(words, input=stdin, capture_output=True, check=False)


@pytest.mark.once
@pytest.mark.parametrize("way", [(), UART], ids=["ports", "uart"])
def test_status_survives_processes_left_behind(kernel: Path, way: tuple[str, ...]) -> None:
    """Processes that hold the output open, and end as the command does, take neither status nor output with them."""
    left = "for i in 1 2 3 4; do sleep 1000 & done; setsid sh -c 'while :; do sleep 0.01; done' & "
    for status in range(1, 13):
        done = execute(f"{left} echo {status}; exit {status}", "--cpus", "2", *way)
        assert (done.returncode, done.stdout) == (status, b"%d\n" % status), done.stderr.decode()


@pytest.mark.parametrize("way", [(), UART], ids=["ports", "uart"])
def test_status_survives_what_the_command_does_to_its_guest(kernel: Path, way: tuple[str, ...]) -> None:
    """The status arrives when the command removed its devices and ended or stopped every other process."""
    done = execute("rm -f /dev/ttyS1 /dev/vport* /cardcage/*; killall -9 dd; kill -STOP -1; echo x; exit 7", *way)
    assert (done.returncode, done.stdout) == (7, b"x\n"), done.stderr.decode()


def test_twenty_megabytes_of_output(kernel: Path) -> None:
    """Output in megabytes arrives whole, within a timeout in which a UART carries a quarter of it."""
    done = execute("dd if=/dev/zero bs=64k count=320 2> /dev/null")
    assert (done.returncode, len(done.stdout)) == (0, 320 << 16), done.stderr.decode()
    assert not done.stdout.strip(b"\0")


@pytest.mark.parametrize(("size", "way"), [(1_000_000, ()), (30_000, UART)], ids=["ports", "uart"])
def test_standard_input_goes_both_ways(kernel: Path, size: int, way: tuple[str, ...]) -> None:
    """The command reads standard input to its end, any bytes, and gives them back unchanged."""
    data = os.urandom(size)
    digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
    done = execute("tee /tmp/x; md5sum < /tmp/x >&2; exit 3", *way, stdin=data)
    assert (done.returncode, done.stdout == data) == (3, True), done.stderr.decode()
    assert f"{digest}  -\n".encode() in done.stderr


@pytest.mark.parametrize("way", [(), UART], ids=["ports", "uart"])
def test_input_that_is_not_read_holds_nothing_up(kernel: Path, way: tuple[str, ...]) -> None:
    """A command that leaves its input unread, or reads a line of it, ends with its own status."""
    done = execute("read line; echo $line; exit 4", *way, stdin=b"first\n" + bytes(1_000_000))
    assert (done.returncode, done.stdout) == (4, b"first\n"), done.stderr.decode()


def test_standard_streams_can_be_opened_by_name(kernel: Path) -> None:
    """``/dev/stdout``, ``/dev/stderr`` and ``/dev/stdin`` are the command's streams, and can be opened again."""
    done = execute("echo out > /dev/stdout; echo err > /dev/stderr; cat /dev/stdin", stdin=b"in\n")
    assert (done.returncode, done.stdout) == (0, b"out\nin\n"), done.stderr.decode()
    assert b"\nerr\n" in done.stderr
    done = execute("sleep 1; cat /dev/stdin", stdin=b"in\n")  # after its end
    assert (done.returncode, done.stdout) == (0, b"in\n"), done.stderr.decode()


def test_share_is_there_for_the_command(kernel: Path, tmp_path: Path) -> None:
    """A shared directory is mounted before the command runs."""
    (tmp_path / "file").write_text("shared\n")
    done = execute("cat /mnt/share/file && echo back > /mnt/share/new", "--share", str(tmp_path))
    assert (done.returncode, done.stdout) == (0, b"shared\n"), done.stderr.decode()
    assert (tmp_path / "new").read_text() == "back\n"


@pytest.mark.parametrize("way", [(), UART], ids=["ports", "uart"])
@pytest.mark.parametrize("form", ["virtiofs", "9p"])
def test_share_that_cannot_be_mounted_is_an_error(
    kernel: Path, tmp_path: Path, form: str, way: tuple[str, ...]
) -> None:
    """The command is not run on an empty directory: a line says which share, and why, with status 70."""
    lacking = ("--append", f"module_blacklist={form}{',virtio_console' if way else ''}")
    done = execute("echo never", "--share", f"{tmp_path},type={form}", *lacking)
    assert (done.returncode, done.stdout) == (70, b""), done.stderr.decode()
    assert f"cardcage: /mnt/share is not mounted: this kernel has no driver for {form}\n" in done.stderr.decode()
