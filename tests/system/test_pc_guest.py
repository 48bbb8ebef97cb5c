"""The PC platform under real guest code: small programs on each accelerator that is usable here."""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from typing import Any

import pytest
from cardcage import AcceleratorError, DebugExit, Host, Machine, Outcome, Panicked, PoweredOff, Reset
from cardcage.registry import AcceleratorOffer
from cardcage_snapshot.state import capture, dumps, loads, restore

HALT = b"\xf4\xeb\xfd"


def usable() -> list[str]:
    """Accelerators that say they work here."""
    registry = Host().registry
    return [
        name
        for name in registry.names(AcceleratorOffer)
        if registry.get(AcceleratorOffer, name).load()().probe().usable
    ]


accelerators = pytest.mark.parametrize("accel", usable())


def out(port: int, value: int, size: int = 1) -> bytes:
    """``mov dx, port; mov al/ax/eax, value; out dx, al/ax/eax`` in 16-bit code."""
    opcode, form = {1: (b"\xb0", "<B"), 2: (b"\xb8", "<H"), 4: (b"\x66\xb8", "<I")}[size]
    write = {1: b"\xee", 2: b"\xef", 4: b"\x66\xef"}[size]
    return b"\xba" + struct.pack("<H", port) + opcode + struct.pack(form, value) + write


def guest(tmp_path: Path, code: bytes, accel: str, irqchip: str = "auto", **keys: Any) -> Machine:
    """A machine that runs *code* in real mode."""
    image = tmp_path / "image"
    image.write_bytes(code)
    boot = {"protocol": "raw", "image": str(image)}
    return Machine(boot=boot, memory="4M", accel=accel, machine={"on_reset": "stop", "irqchip": irqchip}, **keys)


@accelerators
@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        (out(0x604, 0x2000, 2), PoweredOff()),
        (out(0x64, 0xFE), Reset("keyboard controller")),
        (out(0x92, 0x03), Reset("port 0x92")),
        (out(0xCF9, 0x06), Reset("port 0xCF9")),
        (out(0x505, 0x01), Panicked("the guest reported a panic (pvpanic)")),
        (out(0xF4, 0x10), DebugExit(0x10)),
    ],
)
def test_how_a_guest_ends(tmp_path: Path, accel: str, code: bytes, outcome: Outcome) -> None:
    """ACPI S5, the three resets, pvpanic and the debug exit each end the machine with their own outcome."""
    with guest(tmp_path, code + HALT, accel, devices=[{"type": "isa-debug-exit"}]) as vm:
        vm.start()
        assert vm.wait(timeout=60) == outcome


def ticking() -> bytes:
    """A program that sets up PIC and 8254 and writes a T to COM1 at each interrupt 0, halting in between."""
    handler = b"\x50\x52" + out(0x3F8, ord("T")) + b"\xb0\x20\xe6\x20\x5a\x58\xcf"
    setup = b"\xfa\x31\xc0\x8e\xd8\x8e\xd0\xbc\x00\x70"  # cli; ds = ss = 0; sp = 0x7000
    chips = ((0x20, 0x11), (0x21, 8), (0x21, 4), (0x21, 1), (0x21, 0xFE), (0x43, 0x34), (0x40, 0x9C), (0x40, 0x2E))
    program = b"".join(b"\xb0" + bytes((value, 0xE6, port)) for port, value in chips) + b"\xfb" + HALT
    at = 0x7C00 + len(setup) + 12 + len(program)
    vector = b"\xc7\x06\x20\x00" + struct.pack("<H", at) + b"\xc7\x06\x22\x00\0\0"  # mov [0x20], handler; [0x22], 0
    return setup + vector + program + handler


@accelerators
@pytest.mark.parametrize("irqchip", ["none", "split", "full"])
def test_the_timer_interrupts_through_the_8259(tmp_path: Path, accel: str, irqchip: str) -> None:
    """IRQ 0 of the 8254 reaches a real-mode handler through our PIC or KVM's, again and again, also out of HLT."""
    if irqchip == "full" and accel == "tcg":
        with pytest.raises(AcceleratorError, match="irqchip"):
            guest(tmp_path, ticking(), accel, irqchip=irqchip)
        return
    with guest(tmp_path, ticking(), accel, irqchip=irqchip) as vm:
        vm.start()
        vm.console.expect("TTTTTTTTTT", timeout=60)


@pytest.mark.once
@accelerators
def test_the_platform_goes_on_from_a_saved_state(tmp_path: Path, accel: str) -> None:
    """RAM and state of a paused machine, given to new ones, let timer, PIC and UART go on where they were."""
    with guest(tmp_path, ticking(), accel) as vm:
        vm.start()
        vm.console.expect("TTT", timeout=60)
        vm.pause()
        state = dumps(capture(vm))
        ram = [(slot.address, vm.memory.read(slot.address, slot.size)) for slot in vm.memory.slots]
    for _ in range(2):
        with Machine(memory="4M", accel=accel) as vm:
            for address, data in ram:
                vm.memory.write(address, data)
            restore(vm, loads(state))
            vm.start(boot=False)
            vm.console.expect("TTTTTTTTTT", timeout=60)


@accelerators
@pytest.mark.parametrize("irqchip", ["none", "split"])
def test_an_interrupt_that_waits_is_taken_after_a_load(tmp_path: Path, accel: str, irqchip: str) -> None:
    """A machine is saved while its processor halts and the 8259 has a request: where it goes on, it is woken by it."""
    with guest(tmp_path, ticking(), accel, irqchip=irqchip) as vm:
        vm.start()
        vm.console.expect("TTT", timeout=60)
        while True:
            vm.pause()
            state = capture(vm)
            master = state.devices["pic"].fields["master"]
            if state.vcpus[0].events.halted and not master["isr"]:
                break
            vm.resume()
        master["edges"] |= 1
        ram = [(slot.address, vm.memory.read(slot.address, slot.size)) for slot in vm.memory.slots]
    with Machine(memory="4M", accel=accel, machine={"irqchip": irqchip}) as vm:
        for address, data in ram:
            vm.memory.write(address, data)
        restore(vm, loads(dumps(state)))
        vm.start(boot=False)
        vm.console.expect("TTTTTTTTTT", timeout=60)


@accelerators
def test_a_serial_port_on_a_socket_echoes(tmp_path: Path, accel: str) -> None:
    """What a peer sends to COM2's socket reaches the guest, and its answer the peer; the next peer is served too."""
    echo = b"\xba\xfd\x02\xec\xa8\x01\x74\xfb\xba\xf8\x02\xec\xee\xeb\xf1"  # poll LSR; in al, dx; out dx, al
    path = str(tmp_path / "com2")
    port = {"type": "isa-serial", "port": 0x2F8, "char": f"socket:{path}"}
    with guest(tmp_path, echo, accel, devices=[port]) as vm:
        vm.start()
        for _ in range(2):
            with socket.socket(socket.AF_UNIX) as peer:
                peer.settimeout(60)
                peer.connect(path)
                data = bytes(range(1, 201))
                peer.sendall(data)
                got = b""
                while len(got) < len(data):
                    got += peer.recv(100)
                assert got == data
    assert not Path(path).exists()
