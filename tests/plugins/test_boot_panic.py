"""A kernel's panic is noticed on a serial console, whoever runs the machine; who only prints it gains nothing."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from boot_kit import bzimage
from cardcage import DebugExit, Machine, Panicked, PoweredOff, Reset
from cardcage.errors import GuestError
from cardcage_boot.panic import GRACE, LINE_MAX, PanicWatch
from cardcage_testing import TestSlot
from hypothesis import given
from hypothesis import strategies as st

STAY = bytes.fromhex("faf4")
RESET = bytes.fromhex("66baf90cb006ee") + STAY
PVPANIC = bytes.fromhex("66ba0505b001ee") + STAY
OFF = bytes.fromhex("ba0406000066b8002066ef") + STAY
EXIT = bytes.fromhex("66baf400b003ee") + STAY
LINE = "[    1.250000] Kernel panic - not syncing: VFS: no root"
TRACE = "".join(f"\r\n[    1.25{at:04}] R{at:02}: {at:016x}" for at in range(30))
END = "\r\n[    1.260000] ---[ end Kernel panic - not syncing: VFS: no root ]---\r\n"
Panicking = Callable[..., Machine]


def printer(text: str, then: bytes, port: int = 0x3F8) -> bytes:
    """64-bit code that writes *text* to a serial port and goes on with *then*."""
    data = text.encode()
    lea = b"\x48\x8d\x35" + struct.pack("<I", 7 + len(then))
    return b"\xba" + struct.pack("<I", port) + lea + b"\xb9" + struct.pack("<I", len(data)) + b"\xf3\x6e" + then + data


@pytest.fixture
def guest(tmp_path: Path, accel: str) -> Panicking:
    """Makes a machine whose kernel writes a text and goes on with some code."""

    def make(text: str, then: bytes = STAY, port: int = 0x3F8, **keys: Any) -> Machine:
        kernel = tmp_path / "vmlinuz"
        kernel.write_bytes(bzimage(printer(text, then, port)))
        return Machine(kernel=kernel, memory="32M", accel=accel, **keys)

    return make


@pytest.mark.parametrize(("end", "then"), [("\r\n", RESET), ("\r\n", PVPANIC), (END, STAY), ("\r\n", STAY)])
def test_a_panic_ends_any_machine_with_the_kernels_words(guest: Panicking, end: str, then: bytes) -> None:
    """Whether the kernel resets, tells pvpanic, says that this is the end or hangs: the outcome has its own line."""
    with guest(LINE + TRACE + end, then) as machine:
        machine.start()
        with pytest.raises(GuestError, match=r"^the machine ended \(the guest panicked: VFS: no root\)") as raised:
            machine.console.expect("login:", timeout=120)
        assert machine.wait(120) == Panicked("VFS: no root")
        assert f"\n{LINE}" in str(raised.value)
        assert "R29" not in str(raised.value)
        assert "R29" in machine.console.output


@pytest.mark.once
def test_cardcage_run_gives_the_panics_status(tmp_path: Path) -> None:
    """``cardcage run`` ends with status 10 and the line, where it booted again and again before."""
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(bzimage(printer(f"{LINE}\r\n", RESET)))
    program = "import sys; from cardcage_cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "run", "--kernel", kernel, "-m", "32M", "--timeout", "120"]
    done = subprocess.run([*command, "--accel", "tcg"], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (10, b"outcome: the guest panicked: VFS: no root")


def test_it_can_be_switched_off(guest: Panicking) -> None:
    """With ``on_panic = "ignore"`` neither the text nor pvpanic ends the machine."""
    with guest(LINE + END, PVPANIC[:-2] + OFF, machine={"on_panic": "ignore"}) as machine:
        assert machine.start().wait(120) == PoweredOff()


@pytest.mark.parametrize(
    ("port", "char", "append", "seen"),
    [
        (0x3F8, "null", "", True),
        (0x2F8, "console", "", True),
        (0x2F8, "null", "console=tty0 console=ttyS1,115200", True),
        (0x2F8, "null", "console=ttyS0", False),
    ],
)
def test_ports_that_may_be_a_console_are_watched(
    guest: Panicking, port: int, char: str, append: str, seen: bool
) -> None:
    """These are ttyS0 wherever it goes, the machine's console, and what the command line names; a data port is not."""
    port_table = {"type": "isa-serial", "port": port, "irq": 3, "char": char}
    with guest(
        f"{LINE}\r\n", RESET, port, devices=[port_table], append=append, machine={"on_reset": "stop"}
    ) as machine:
        outcome = machine.start().wait(120)
        assert isinstance(outcome, Panicked if seen else Reset)


@pytest.mark.once
def test_a_debug_exit_within_a_panic_is_the_panic(guest: Panicking) -> None:
    """A guest's own end after its panic's line counts as the panic, a debug exit included."""
    devices = [{"type": "isa-debug-exit"}]
    with guest(f"{LINE}\r\n", EXIT, devices=devices) as machine:
        assert machine.start().wait(120) == Panicked("VFS: no root")
    with guest("no panic\r\n", EXIT, devices=devices) as machine:
        assert machine.start().wait(120) == DebugExit(3)


def told(stream: bytes, cuts: list[int] | None = None) -> list[tuple[str, str]]:
    """What a watch that reads *stream*, cut into pieces, asks of its machine; and what once the grace is over."""
    slot = TestSlot()
    watch = PanicWatch(slot)
    while stream:
        size = cuts.pop() if cuts else len(stream)
        watch.feed(stream[:size])
        stream = stream[size:]
    requests: Any = list(slot.power.requests)
    slot.close()
    return requests


@given(st.lists(st.integers(1, 30), max_size=8))
def test_a_panic_is_seen_in_pieces(cuts: list[int]) -> None:
    """A panic is told when its line is whole and when it ended, with the same words, however the output is cut."""
    stream = f"noise\r\n{LINE}\r\nKernel panic - not syncing: again\n".encode()
    assert told(stream, list(cuts)) == [("panic soon", "VFS: no root")]
    assert told(stream + END.encode(), list(cuts)) == [("panic soon", "VFS: no root"), ("panic", "VFS: no root")]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("Kernel panic - not syncing: no time stamps", "no time stamps"),
        ("[   12.345678][    T1] Kernel panic - not syncing: caller", "caller"),
        ("~ # [   12.345678] Kernel panic - not syncing: after a prompt", "after a prompt"),
        ("lost ---[ end Kernel panic - not syncing: only the end ]---", "only the end"),
        ("[    1.000000] Kernel panic - not syncing:", ""),
        ("I read: Kernel panic - not syncing: a story", None),
        ("[    1.000000] Kernel panic - syncing: never was", None),
        ("[    1.000000] Kernel panic - not syncing: \x1b[2Jred\x07\u202eback", "\ufffd[2Jred\ufffd\ufffdback"),
    ],
)
def test_lines_that_are_a_panic(line: str, words: str | None) -> None:
    """A panic begins its line, or follows the kernel's time stamp; what could steer a terminal is not passed on."""
    assert [one[1] for one in told(f"{line}\r\n".encode())][:1] == ([] if words is None else [words])


def test_a_guest_cannot_make_the_watch_grow() -> None:
    """Of a line without an end, and of a panic's words, a kibibyte is kept."""
    slot = TestSlot()
    watch = PanicWatch(slot)
    for _ in range(64):
        watch.feed(b"x" * 4096)
    assert len(watch._line) == LINE_MAX
    watch.feed(b"\n[ 1.0] Kernel panic - not syncing: " + b"y" * 100_000 + b"\n")
    assert slot.power.requests == [("panic soon", "y" * LINE_MAX)]
    slot.close()


def test_a_kernel_that_hangs_in_its_panic_is_given_up() -> None:
    """Two seconds of guest time after the line the machine ends; a reset takes that back."""
    for reset in (False, True):
        slot = TestSlot()
        watch = PanicWatch(slot)
        watch.feed(f"{LINE}\r\n".encode())
        if reset:
            watch.reset("asked")
        slot.clock.advance(GRACE)
        assert slot.power.requests[1:] == ([] if reset else [("panic", "VFS: no root")])
        slot.close()
