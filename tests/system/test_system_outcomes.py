"""The whole way, from the command line to a guest on a real accelerator and back: outcomes, reset, pause."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cardcage import Crashed, DebugExit, Machine, Panicked, PoweredOff
from cardcage._machine.building import probe_of
from cardcage.device import Pio, Slot
from cardcage.hookspecs import hookimpl
from cardcage.host import Host
from cardcage.registry import AcceleratorOffer, Registry
from cardcage_snapshot.state import capture, dumps, loads, restore

pytestmark = pytest.mark.usefixtures("runtime")  # the name of a machine is in what is told

ACCELERATORS = [
    name
    for host in [Host()]
    for name in host.registry.names(AcceleratorOffer)
    if probe_of(host.registry.get(AcceleratorOffer, name))[1].usable
]
"""Those usable on this host; the translator always is."""


TRIPLE_FAULT = "0f011d0e7c000066b8f8ff8ed8f4000000000000"
"""lidt [0x7c0e], whose limit is 0; mov ax,0xfff8; mov ds,ax; hlt (32-bit)."""


@pytest.fixture(params=ACCELERATORS)
def accel(request: pytest.FixtureRequest) -> str:
    """Each usable accelerator."""
    name: str = request.param
    return name


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    """Where a guest's code is put."""
    return tmp_path / "guest.bin"


def pc(accel: str, guest: Path, code: str, mode: int = 16, **more: object) -> Machine:
    """A PC that runs *code* (hexadecimal) at 0x7C00."""
    guest.write_bytes(bytes.fromhex(code))
    devices = [{"type": "isa-debug-exit", "iobase": 0xF4}, {"type": "pvpanic"}]
    boot = {"protocol": "raw", "image": str(guest), "address": 0x7C00, "mode": mode}
    return Machine(accel=accel, memory="16M", boot=boot, devices=devices, **more)  # type: ignore[arg-type]  # keys of any type


def test_the_translator_is_always_usable() -> None:
    """The translator works on every host of the wheel's platform."""
    assert "tcg" in ACCELERATORS


def test_debug_exit(accel: str, guest: Path) -> None:
    """A guest's write to the debug exit port ends the machine with its code."""
    with pc(accel, guest, "b02ae6f4f4") as vm:  # mov al,0x2a; out 0xf4,al; hlt
        assert vm.start().wait(60) == DebugExit(0x2A)


class Fetcher:
    """Reads and writes guest memory at 16 MiB times what the guest wrote, as anyone would write it."""

    def plug(self, slot: Slot, /) -> None:
        self.memory, self.address = slot.memory, 0

    def read(self, offset: int, size: int, /) -> int:
        return self.memory.read(self.address, size)[0]

    def write(self, offset: int, size: int, value: int, /) -> None:
        self.address = value << 24
        self.memory.write(self.address, b"x")


class FetcherCard:
    @hookimpl
    def cardcage_register(self, registry: Registry) -> None:
        registry.device("fetcher", Fetcher, regions=(Pio(1, 0x2A0),))


def test_a_wild_address_is_open_bus(accel: str, guest: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A guest that gives a device an address without RAM reads all ones and goes on; the log names the card."""
    # mov dx,0x2a0; mov al,0xde; out dx,al; xor ax,ax; in al,dx; out 0xf4,al; hlt
    with Host([FetcherCard()]) as host, pc(accel, guest, "baa002b0deee31c0ece6f4f4", host=host) as vm:
        vm.add("fetcher")
        assert vm.start().wait(60) == DebugExit(0xFF)
    assert capfd.readouterr().err.count("card let a GuestMemoryError out") == 2


def test_panic(accel: str, guest: Path) -> None:
    """A guest's write to pvpanic ends the machine as a panic."""
    with pc(accel, guest, "ba0505b001eef4") as vm:  # mov dx,0x505; mov al,1; out dx,al; hlt
        assert isinstance(vm.start().wait(60), Panicked)


def test_a_triple_fault_shows_registers(accel: str, guest: Path) -> None:
    """A triple fault ends the machine, and the registers at the fault are in its detail."""
    with pc(accel, guest, TRIPLE_FAULT, mode=32) as vm:
        outcome = vm.start().wait(60)
        assert isinstance(outcome, Crashed)
        assert "rip" in outcome.detail.lower()


def test_reset_by_the_keyboard_controller(accel: str, guest: Path) -> None:
    """Pulsing the reset line boots again: RAM keeps a counter, and the third boot powers the debug exit."""
    # inc byte [0x500]; cmp byte [0x500],3; je done; mov al,0xfe; out 0x64,al; jmp $; done: mov al,[0x500]; out 0xf4,al
    with pc(accel, guest, "fe060005803e00050374 06b0fee664ebfe a00005e6f4".replace(" ", "")) as vm:
        resets: list[str] = []
        vm.observers.add("reset", resets.append)
        assert vm.start().wait(60) == DebugExit(3)
        assert len(resets) == 2


def test_pause_and_resume_a_running_guest(accel: str, guest: Path) -> None:
    """While paused a spinning guest's registers stand still; resumed it goes on to its end."""
    # mov byte [0x500],1; cmp byte [0x501],0; je $-5; out 0xf4,al
    with pc(accel, guest, "c606000501 803e010500 74f9 b001e6f4".replace(" ", "")) as vm:
        vm.start()
        while vm.memory.read(0x500, 1) != b"\1":
            vm.wait(0.01)
        vm.pause()
        first = vm.vcpus[0].get_state().registers
        assert 0x7C05 <= first.rip <= 0x7C0C
        assert vm.vcpus[0].get_state().registers == first
        vm.memory.write(0x501, b"\1")
        vm.resume()
        assert vm.wait(60) == DebugExit(1)


def test_stop_ends_a_guest_that_never_exits(accel: str, guest: Path) -> None:
    """A guest in an endless loop with interrupts off is stopped from outside, and closing returns."""
    with pc(accel, guest, "faebfe", cpus=2) as vm:  # cli; jmp $
        vm.start()
        vm.stop("enough")
        assert str(vm.wait(60)) == "stopped by the host (enough)"


def test_two_machines_at_once(accel: str, guest: Path, tmp_path: Path) -> None:
    """Two machines of one process run side by side, each to its own outcome."""
    with pc(accel, guest, "b001e6f4") as first, pc(accel, tmp_path / "second.bin", "b002e6f4") as second:
        first.start()
        second.start()
        assert (first.wait(60), second.wait(60)) == (DebugExit(1), DebugExit(2))


def test_the_command_line_end_to_end(accel: str, guest: Path, tmp_path: Path) -> None:
    """``cardcage run`` in a process of its own, without a terminal: status and outcome line, no traceback."""
    guest.write_bytes(bytes.fromhex(TRIPLE_FAULT))
    (tmp_path / "vm.toml").write_text(
        '[machine]\nmemory = "16M"\n[boot]\nprotocol = "raw"\nimage = "guest.bin"\nmode = 32\n'
    )
    code = "import sys; from cardcage_cli import main; sys.exit(main())"
    words = [sys.executable, "-c", code, "run", "vm.toml", "--accel", accel, "--timeout", "60"]
    done = subprocess.run(words, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    assert done.returncode == 12, done.stderr
    assert done.stderr.splitlines()[-1] == "outcome: the guest crashed: triple fault on cpu 0"
    assert "rip" in done.stderr.lower()
    assert "Traceback" not in done.stderr


def test_power_off_by_acpi(accel: str, guest: Path) -> None:
    """Writing S5 to the PM control register powers the machine off."""
    # mov dx,0x604; mov ax,0x2000|(5<<10); out dx,ax; the type is the platform's: each is tried
    code = "".join(f"ba0406b8{(0x2000 | kind << 10).to_bytes(2, 'little').hex()}ef" for kind in range(8)) + "ebfe"
    with pc(accel, guest, code) as vm:
        assert vm.start().wait(60) == PoweredOff()


def test_ctrl_c_ends_it_in_order(accel: str, guest: Path, tmp_path: Path) -> None:
    """SIGINT at a running machine: status 130, the outcome in one line, no traceback."""
    guest.write_bytes(bytes.fromhex("faebfe"))
    (tmp_path / "vm.toml").write_text('[machine]\nmemory = "16M"\n[boot]\nprotocol = "raw"\nimage = "guest.bin"\n')
    # A shell starts background jobs with SIGINT ignored, which is inherited, and which we then respect.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from cardcage_cli import main; sys.exit(main())"
    with subprocess.Popen(
        [sys.executable, "-c", code, "run", "vm.toml", "--accel", accel],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        try:
            assert process.stderr.readline().startswith("accelerator: ")
            process.send_signal(signal.SIGINT)
            said = process.stderr.read()
            assert process.wait(60) == 130
        finally:
            process.kill()  # its guest never ends by itself
    assert said == "outcome: interrupted\n"


def test_a_saved_machine_goes_on_elsewhere(accel: str, guest: Path) -> None:
    """A paused PC's state and RAM, through JSON, continue in another machine where the first one stood."""
    # inc dword [0x500]; cmp byte [0x510],0; je $-10; mov al,[0x510]; out 0xf4,al
    code = "66ff060005803e10050074f4a01005e6f4"
    with pc(accel, guest, code) as first:
        first.start()
        while first.memory.read(0x500, 4) == bytes(4):
            first.wait(0.01)
        first.pause()
        text = dumps(capture(first))
        ram = {slot.address: first.memory.read(slot.address, slot.size) for slot in first.memory.slots}
        stood = first.vcpus[0].get_state().registers
    for exit_code in (5, 6):  # as often as one likes
        with pc(accel, guest, code) as second:
            for address, data in ram.items():
                second.memory.write(address, data)
            restore(second, loads(text))
            assert second.vcpus[0].get_state().registers == stood
            second.memory.write(0x510, bytes([exit_code]))
            second.start(boot=False)
            assert second.wait(60) == DebugExit(exit_code)
            counted, before = second.memory.read(0x500, 4), ram[0][0x500:0x504]
            assert int.from_bytes(counted, "little") >= int.from_bytes(before, "little")
