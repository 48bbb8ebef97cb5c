"""Doorbells, irqfds and rings that another process serves: what an accelerator does without the machine."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Any

from cardcage_conformance.conformance import Program

if TYPE_CHECKING:
    from cardcage_conformance.lab import Lab

MMIO, LAPIC = 0xD0000000, 0xFEE00000
TABLE, AVAIL, USED, CODE = 0x61000, 0x61100, 0x61200, 0x64000


def _vm(lab: Lab) -> Any:
    """The VM with its capabilities, which its static type does not tell."""
    return lab.vm


def _add_memory_bells(lab: Lab) -> None:
    add = _vm(lab).add_doorbell
    add(lab.eventfd(), MMIO, 4, pio=False, value=None)
    add(lab.eventfd(), MMIO + 0x10, 2, pio=False, value=7)
    add(lab.eventfd(), MMIO + 0x10, 2, pio=False, value=9)
    add(lab.eventfd(), MMIO + 0x20, 0, pio=False, value=None)


def _move_memory_bell(lab: Lab, value: int) -> None:
    vm, fd = _vm(lab), lab.eventfds[0]
    if value == 1:
        vm.remove_doorbell(fd, MMIO, 4, pio=False, value=None)
    else:
        vm.add_doorbell(fd, MMIO + 0x100, 4, pio=False, value=None)


def _add_port_bells(lab: Lab) -> None:
    add = _vm(lab).add_doorbell
    add(lab.eventfd(), 0x10, 1, pio=True, value=7)
    add(lab.eventfd(), 0x1234, 2, pio=True, value=None)


def _counts(*expected: int) -> Any:
    def check(lab: Lab) -> list[str]:
        found = tuple(lab.counted(at) for at in range(len(expected)))
        return [] if found == expected else [f"eventfds counted {found}, expected {expected}"]

    return check


def _add_route(lab: Lab) -> None:
    lab.route = _vm(lab).add_irqfd(lab.eventfd(), LAPIC, 0x41)


def _signal(lab: Lab, value: int) -> None:
    vm, fd = _vm(lab), lab.eventfds[0]
    if value == 1:
        os.eventfd_write(fd, 1)
    elif value == 2:
        vm.remove_irqfd(fd, lab.route)
    else:
        lab.route = vm.add_irqfd(fd, LAPIC, value)


def _add_second_route(lab: Lab) -> None:
    lab.route = _vm(lab).add_irqfd(lab.eventfd(), LAPIC | 1 << 12, 0x42)


def _add_ring(lab: Lab) -> None:
    """A ring of 4 whose first descriptor is an indirect table with the page of code in it."""
    lab.memory.write(CODE, b"\xb8\x01\0\0\0\xc3")  # mov eax, 1; ret
    lab.memory.write(TABLE, struct.pack("<QIHH", TABLE + 0x800, 32, 4, 0))
    lab.memory.write(TABLE + 0x800, struct.pack("<QIHHQIHH", TABLE + 0x900, 16, 1, 1, CODE, 4096, 2, 0))
    if "foreign-rings" in lab.vm.capabilities:
        lab.route = _vm(lab).add_foreign_ring(4, TABLE, TABLE + 0xA00, USED)


def _serve(lab: Lab, value: int) -> None:
    """Another process, which reports nothing: new code, then the used ring."""
    lab.memory.view(CODE, 6)[:] = b"\xb8" + bytes([value, 0, 0, 0]) + b"\xc3"
    used = lab.memory.view(USED, 6 + 8 * 4)
    index = used.cast("H")[1]
    struct.pack_into("<II", used, 4 + 8 * (index & 3), 0, 0)
    used.cast("H")[1] = index + 1 & 0xFFFF
    if value == 9 and "foreign-rings" in lab.vm.capabilities:
        _vm(lab).remove_foreign_ring(lab.route)


PROGRAMS = (
    Program(
        "doorbell-memory",
        "A store that is as long as a doorbell, and of its value if it has one, is counted and not seen by the machine",
        """
    mov ebx, MMIO
    mov ecx, 3
again:
    mov [rbx], ecx
    dec ecx
    jnz again
    mov [rbx], cx                       ; of another size
    mov word [rbx + 0x10], 7
    mov word [rbx + 0x10], 8
    mov word [rbx + 0x10], 9
    mov byte [rbx + 0x20], 1
    mov qword [rbx + 0x20], 2
    add dword [rbx], 5                  ; the read is seen
    mov edi, MMIO
    mov eax, 6
    mov ecx, 2
    rep stosd                           ; the second is next to it
    host 1
    mov [rbx], ebx
    host 2
    mov [rbx + 0x100], ebx
    mov [rbx], ebx
    done
""",
        capabilities=("doorbells",),
        prepare=_add_memory_bells,
        on_host=_move_memory_bell,
        check=_counts(6, 1, 1, 2),
        accesses=(
            ("write", MMIO, 2, 0),
            ("write", MMIO + 0x10, 2, 8),
            ("read", MMIO, 4, 0x03020000),
            ("write", MMIO + 4, 4, 6),
            ("write", MMIO, 4, MMIO),
            ("write", MMIO, 4, MMIO),
        ),
    ),
    Program(
        "doorbell-ports",
        "OUT and OUTS to a port with a doorbell are counted and not seen by the machine, others are seen",
        """
    mov al, 7
    out 0x10, al
    mov al, 8
    out 0x10, al
    mov dx, 0x1234
    out dx, ax
    out dx, al
    mov word [abs DATA], 0x5555
    mov esi, DATA
    outsw
    done
""",
        capabilities=("doorbells",),
        prepare=_add_port_bells,
        check=_counts(1, 2),
        accesses=(("out", 0x10, 1, 8), ("out", 0x1234, 1, 8)),
    ),
    Program(
        "irqfd",
        "A routed eventfd interrupts and wakes HLT; without its route it only counts, which a new route delivers",
        """
    apic_on
    host 1
    spin_irq 0x41, 1
    host 1
    wait_irq 0x41, 2
    host 2
    host 1
    sti
    mov ecx, 3000
    loop $
    cli
    mov r8d, [abs IRQS + 0x41 * 4]
    host 0x43
    wait_irq 0x43, 1
    done
""",
        irqchip="split",
        capabilities=("irqfds",),
        prepare=_add_route,
        on_host=_signal,
        registers={"r8": 2},
        interrupts=(0x41, 0x41, 0x43),
    ),
    Program(
        "foreign-ring",
        "Code in a buffer that another process wrote runs with the new bytes once the guest sees the buffer as used",
        """
    mov r10d, 0x64000
    call r10
    mov r8d, eax
    host 5
wait1:
    cmp word [abs 0x61202], 1
    jne wait1
    call r10
    mov r9d, eax
    host 6
    mov esi, 0x61200
    mov edi, DATA
    movsd                               ; seen by a string instruction
    call r10
    mov r11d, eax
    host 7
    xor eax, eax
    lock xadd [abs 0x61202], ax         ; and by a read-modify-write
    movzx r12d, ax
    call r10
    mov r13d, eax
    host 9
    mov ax, [abs 0x61202]
    call r10
    mov r14d, eax
    mov eax, [abs DATA]
    done
""",
        prepare=_add_ring,
        on_host=_serve,
        registers={"r8": 1, "r9": 5, "r11": 6, "r12": 3, "r13": 7, "r14": 9, "rax": 0x20000},
    ),
)
