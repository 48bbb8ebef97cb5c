"""Interrupts without a local APIC: ExtINT as a PIC gives it, NMI, shadows, halts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage_conformance.conformance import Fault, Program

if TYPE_CHECKING:
    from cardcage_conformance.lab import Lab


def _extint(lab: Lab, value: int) -> None:
    lab.raise_extint(value)


def _two_extints(lab: Lab, value: int) -> None:
    lab.raise_extint(value, value + 1)


def _withdrawn_extint(lab: Lab, value: int) -> None:
    lab.raise_extint(value)
    lab.extints.clear()
    lab.vm.set_extint(False)


def _halt_then_extint(lab: Lab) -> bool:
    lab.raise_extint(0x33)
    return True


def _nmi(lab: Lab, value: int) -> None:
    lab.vm.inject_nmi(0)


def _nmi_and_extint(lab: Lab, value: int) -> None:
    lab.vm.inject_nmi(0)
    lab.raise_extint(value)


PROGRAMS = (
    Program(
        "extint-spinning",
        "Without a local APIC, an external interrupt is acknowledged and taken once IF allows it, in spinning code",
        """
    host 0x31
    mov eax, [abs IRQS + 0x31 * 4]
    mov r8d, eax
    spin_irq 0x31, 1
    done
""",
        interrupts=(0x31,),
        registers={"r8": 0},
        on_host=_extint,
    ),
    Program(
        "extint-two-in-order",
        "The next external interrupt is acknowledged after the first was taken, not before",
        """
    host 0x31
    sti
    nop
    nop
    spin_irq 0x32, 1
    done
""",
        interrupts=(0x31, 0x32),
        on_host=_two_extints,
    ),
    Program(
        "extint-withdrawn",
        "An external interrupt that went away before IF was set is not taken",
        """
    host 0x31
    sti
    mov ecx, 100
again:
    loop again
    cli
    done
""",
        interrupts=(),
        on_host=_withdrawn_extint,
    ),
    Program(
        "extint-wakes-halt",
        "Without a local APIC, HLT is an exit; the interrupt that follows is taken and returns behind the HLT",
        """
    set_gate 0x33, handler
    sti
    hlt
at_behind:
    cli
    mov ebx, 5
    done
handler:
    mov rcx, [rsp]
    sub rcx, at_behind
    iretq
""",
        registers={"rbx": 5, "rcx": 0},
        on_halt=_halt_then_extint,
    ),
    Program(
        "sti-shadow",
        "STI lets one more instruction run before a pending interrupt, so STI and CLI in a row let none in",
        """
    set_gate 0x31, handler
    host 0x31
    sti
    cli
    xor ebx, ebx
    sti
    mov ebx, 1
    mov ebx, 2
    mov edx, 3000               ; an accelerator may take it late
again:
    dec edx
    jnz again
    cli
    done
handler:
    mov r9d, 1
    test ebx, ebx
    setz r8b
    iretq
""",
        registers={"r8": 0, "r9": 1, "rbx": 2},
        on_host=_extint,
    ),
    Program(
        "mov-ss-shadow",
        "MOV SS and POP SS hold a single-step trap off until the instruction behind them is done",
        """
    mov ecx, DS0
    push 0x102
    popfq
    nop
at_one:
    mov ss, ecx
    nop
at_two:
    nop
at_three:
    push 2
at_four:
    popfq
at_five:
    nop
    done
""",
        faults=tuple(Fault(1, rip=f"at_{name}") for name in ("one", "two", "three", "four", "five")),
        emulated="its emulator traps behind MOV SS",
    ),
    Program(
        "nmi",
        "An NMI is taken with IF clear, and ahead of an external interrupt",
        """
    set_gate 2, handler
    host 0x31
    nop
    nop
    mov r8d, [abs IRQS + 0x31 * 4]
    spin_irq 0x31, 1
    done
handler:
    inc ebx
    iretq
""",
        registers={"rbx": 1, "r8": 0},
        interrupts=(0x31,),
        on_host=_nmi_and_extint,
    ),
    Program(
        "nmi-blocked-until-iret",
        "A second NMI waits for the first one's IRET",
        """
    set_gate 2, handler
    host 1
    mov edx, 3000
spin:
    dec edx
    jnz spin
    done
handler:
    inc ebx
    cmp ebx, 2
    je second
    host 2
    mov r8d, ebx                ; still 1
    mov ecx, 50
again:
    loop again
    mov r9d, ebx
    iretq
second:
    mov r10d, 1
    iretq
""",
        registers={"rbx": 2, "r8": 1, "r9": 1, "r10": 1},
        on_host=_nmi,
    ),
)
