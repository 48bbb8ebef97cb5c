"""``cardcage boot``: the exec channel, the console, outcomes and errors, with small guests in a kernel's place."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from boot_kit import bzimage
from cardcage.host import Host
from cardcage.registry import AcceleratorOffer
from cardcage_boot.channel import FdSink, Marked
from cardcage_boot.fetch import Shelf
from cardcage_testing import TestSlot
from hypothesis import given
from hypothesis import strategies as st

# Each guest is 64-bit code at a bzImage's entry point; EXEC and FEED find the token in the initrd's settings file.
# Plays init with a command: begin mark, "errors" and end mark on COM1; "out", NUL, 0xFF, "put" and status 42 on COM2.
EXEC = bytes.fromhex(
    "4889f3bc009000008bb31802000003b31c020000ffce813e746f6b6575f68d6e06baf8030000488d357e000000e862000000e8680000"
    "00b00aee488d357b000000e84e000000488d3577000000e842000000e848000000b00aeebaf8020000488d356d000000e82900000048"
    "8d3552000000e81d000000e823000000488d355a000000e80c000000ba0406000066b8002066eff40fb60e48ffc6aceee2fcc389eeb9"
    "10000000aceee2fcc3100063617264636167652d626567696e20076572726f72730a0e0063617264636167652d656e6420096f757400"
    "ff7075740a042034320a"
)
# Plays init, all on COM2: asks for input piece by piece and gives it back, up to the piece of length 0; then status 9.
FEED = bytes.fromhex(
    "4889f3bc009000008bb31802000003b31c020000ffce813e746f6b6575f68d6e06488d357d000000e861000000b00aee31ffe8460000"
    "003c0a740c2c300fb6c06bff0a01c7ebeb85ff740ce82d000000eeffcf75f6ebca488d3557000000e82b000000b903000000488d3555"
    "000000f36eba0406000066b8002066eff4bafd020000eca80174fbbaf8020000ecc3baf80200000fb60e48ffc6f36e89eeb910000000"
    "f36ec30f0063617264636167652d6d6f7265200e0063617264636167652d656e642020390a"
)
# Prints a kernel panic on COM1 and halts.
PANIC = bytes.fromhex(
    "baf8030000488d3509000000b92e000000f36efaf45b20202020312e305d204b65726e656c2070616e6963202d206e6f742073796e63"
    "696e673a206f6f707320370d0a"
)
OFF = bytes.fromhex("ba0406000066b8002066eff4")  # powers off by ACPI
HALT = bytes.fromhex("faf4")


Boot = Callable[..., subprocess.CompletedProcess[bytes]]


def accelerators() -> list[str]:
    return Host().registry.names(AcceleratorOffer)


@pytest.fixture(params=accelerators())
def boot(request: pytest.FixtureRequest, tmp_path: Path) -> Boot:
    """Runs ``cardcage boot`` with a guest's code as the kernel, on each accelerator, without a terminal."""
    probe = Host().registry.get(AcceleratorOffer, request.param).load()().probe()
    if not probe.usable:
        pytest.skip(f"{request.param}: {probe.reason}")

    def go(code: bytes, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        kernel = tmp_path / "vmlinuz"
        kernel.write_bytes(bzimage(code, line_max=2047))
        program = "import sys; from cardcage_cli import main; sys.exit(main())"
        command = [sys.executable, "-c", program, "boot", "--kernel", kernel, "--accel", request.param, "-m", "32M"]
        environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
        return subprocess.run([*command, *arguments], input=stdin, capture_output=True, env=environment, check=False)

    return go


needs_busybox = pytest.mark.skipif(
    Shelf(Path("/nonexistent"), lambda what, percent: None, lambda line: None).host_busybox() is None,
    reason="needs a static busybox on this host",
)


@needs_busybox
def test_exec_gives_exactly_the_output_and_the_status(boot: Boot) -> None:
    """Standard output is the command's bytes and nothing else, its errors go to standard error, its status is ours."""
    done = boot(EXEC, "--exec", "command", "--timeout", "120")
    assert done.stdout == b"out\0\xffput\n", done.stderr
    assert b"\nerrors\n" in done.stderr
    assert b"outcome: the guest powered off\n" in done.stderr
    assert done.returncode == 42


@needs_busybox
def test_exec_that_never_reports_is_a_failure(boot: Boot) -> None:
    """A guest that powers off before its command ended gives status 70 and says so."""
    done = boot(OFF, "--exec", "command", "--timeout", "120")
    assert (done.returncode, done.stdout) == (70, b"")
    assert b"the guest ended before the command did" in done.stderr


@needs_busybox
@pytest.mark.parametrize("arguments", [(), ("--exec", "command")])
@pytest.mark.once
def test_standard_input_comes_as_the_guest_asks(boot: Boot, arguments: tuple[str, ...]) -> None:
    """Without a terminal standard input goes to the guest byte for byte, to its end, with --exec and without."""
    data = bytes(range(256)) * 20
    done = boot(FEED, "--timeout", "120", *arguments, stdin=data)
    assert (done.returncode, done.stdout) == (9, data), done.stderr


@needs_busybox
def test_a_timeout_shows_nothing_of_ours(boot: Boot) -> None:
    """After a timeout the console's last lines are the kernel's: no mark of ours, and no errors a second time."""
    hangs = EXEC[:0x46] + HALT + EXEC[0x48:]  # after the errors
    done = boot(hangs, "--exec", "command", "--timeout", "1")
    assert done.returncode == 124
    assert done.stderr.count(b"errors") == 1, done.stderr
    assert b"cardcage-" not in done.stderr, done.stderr


def test_kernel_panic_is_an_outcome(boot: Boot) -> None:
    """A panic message on the console ends the machine with status 10 and the kernel's words."""
    done = boot(PANIC, "--initrd", "", "--timeout", "120")
    assert done.returncode == 10, done.stderr
    assert b"outcome: the guest panicked: oops 7\n" in done.stderr
    assert b"Kernel panic - not syncing: oops 7" in done.stdout


def test_timeout_and_header(boot: Boot) -> None:
    """A guest that hangs is given up after the time; the header names machine, accelerator, kernel and console."""
    done = boot(HALT, "--initrd", "", "--timeout", "0.5")
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 124, lines
    assert lines[0].startswith("cardcage ")
    assert [line.split()[0] for line in lines[1:4]] == ["accelerator", "kernel", "console"]
    assert lines[-1] == "outcome: timed out after 0.5 s"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--exec", "x", "--initrd", "y"], "--exec: needs the init"),
        (["--firmware", "f"], "--firmware: boots from disks"),
        (["--timeout", "soon"], "--timeout: expected a time"),
        (["--kernel", "/nonexistent"], "/nonexistent: kernel cannot be read: No such file or directory"),
    ],
)
@pytest.mark.once
def test_arguments_that_do_not_fit(boot: Boot, arguments: list[str], expected: str) -> None:
    """What cannot be done is one line that names the argument, with status 2."""
    done = boot(HALT, *arguments)
    assert done.returncode == 2
    assert done.stderr.decode().startswith(f"outcome: bad configuration: {expected}")


@given(st.binary(max_size=60), st.binary(max_size=20), st.lists(st.integers(0, 90), max_size=5))
def test_mark_is_found_however_the_stream_is_cut(before: bytes, after: bytes, cuts: list[int]) -> None:
    """Bytes before the mark come out unchanged and in order, those after it are kept apart, for any cutting."""
    mark = b"\0cardcage-end"
    stream = before + mark + after
    split = Marked(mark)
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    out = b"".join(split.feed(stream[low:high]) for low, high in itertools.pairwise(edges))
    at = stream.find(mark)
    assert (out, bytes(split.after or b"")) == (stream[:at], stream[at + len(mark) :])


@given(st.binary(max_size=80))
def test_without_a_mark_little_is_held_back(data: bytes) -> None:
    """Without the mark all but what could be its beginning comes out at once."""
    mark = b"\0\0end"
    split = Marked(mark)
    out = split.feed(data)
    held = data[len(out) :]
    if mark not in data:
        assert data.startswith(out)
        assert mark.startswith(held)
        assert len(held) < len(mark)


def stopped() -> TestSlot:
    """The slot of a machine that has ended."""
    slot = TestSlot()
    slot.loop.ending = True
    return slot


def test_sink_writes_everything_to_a_slow_reader() -> None:
    """More than a pipe holds arrives whole and in order at a reader that comes late."""
    read, write = os.pipe()
    slot: Any = TestSlot()
    sink = FdSink(slot, write)
    data = os.urandom(300_000)

    def guest() -> None:
        for at in range(0, len(data), 1000):
            sink.write(data[at : at + 1000])
        sink.flush()
        os.close(write)

    thread = threading.Thread(target=guest)
    thread.start()
    with open(read, "rb") as stream:
        assert stream.read() == data
    thread.join()


def test_sink_gives_up_on_a_stopped_machine() -> None:
    """When the host has stopped the machine and nobody reads, writing ends instead of waiting for ever."""
    read, write = os.pipe()
    slot: Any = stopped()
    FdSink(slot, write).write(bytes(1 << 20))
    os.close(read)
    os.close(write)
