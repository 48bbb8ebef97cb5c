"""The local APIC: registers, messages, priorities, timers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage_conformance.conformance import Program

if TYPE_CHECKING:
    from cardcage_conformance.lab import Lab

LAPIC, LEVEL = 0xFEE00000, 0xC000


def _extint(lab: Lab, value: int) -> None:
    lab.raise_extint(value)


def _msi(lab: Lab, value: int) -> None:
    lab.vm.signal_msi(LAPIC, value)


def _level_msi(lab: Lab, value: int) -> None:
    lab.vm.signal_msi(LAPIC, value | LEVEL)


PROGRAMS = (
    Program(
        "lapic-registers",
        "The local APIC shows ID, version and registers as after reset, and holds what is written",
        """
    mov ebp, LAPIC
    mov r8d, [rbp + 0x20]
    movzx r9, byte [rbp + 0x30]
    and r9, 0xF0
    mov r10d, [rbp + 0xF0]
    mov r11d, [rbp + 0x320]
    mov dword [rbp + 0xF0], 0x1FF
    mov r12d, [rbp + 0xF0]
    mov dword [rbp + 0x80], 0x35
    mov r13d, [rbp + 0x80]
    mov rax, cr8
    mov r14, rax
    mov dword [rbp + 0x320], 0x10041
    mov r15d, [rbp + 0x320]
    mov ecx, 0x1B
    rdmsr
    done
""",
        irqchip="split",
        registers={
            "r8": 0,
            "r9": 0x10,
            "r10": 0xFF,
            "r11": 0x10000,
            "r12": 0x1FF,
            "r13": 0x35,
            "r14": 3,
            "r15": 0x10041,
            "rax": 0xFEE00900,
        },
    ),
    Program(
        "msi-edge",
        "An edge-triggered message interrupts spinning code and wakes HLT, once for each message",
        """
    apic_on
    host 0x41
    spin_irq 0x41, 1
    host 0x42
    wait_irq 0x42, 1
    host 0x41
    host 0x41                   ; the same edge twice before it is taken
    sti
    mov ecx, 3000
    loop $
    cli
    mov r8d, [abs IRQS + 0x41 * 4]
    done
""",
        irqchip="split",
        registers={"r8": 2},
        interrupts=(0x41, 0x42, 0x41),
        on_host=_msi,
    ),
    Program(
        "msi-level-eoi",
        "The EOI of a level-triggered message is broadcast to the machine, that of an edge-triggered one is not",
        """
    apic_on
    host 0x51
    wait_irq 0x51, 1
    mov dword [rbp + 0x320], 0x10000
    host 0x52
    wait_irq 0x52, 1
    host 0x51
    wait_irq 0x51, 2
    mov dword [rbp + 0x300], 0x44000 | 0x53     ; to itself
    wait_irq 0x53, 1
    done
""",
        irqchip="split",
        interrupts=(0x51, 0x52, 0x51, 0x53),
        eois=(0x51, 0x52, 0x51),
        on_host=_level_msi,
    ),
    Program(
        "apic-priority",
        "Pending vectors are taken by priority, and the task priority holds lower classes back",
        """
    apic_on
    host 0x41
    host 0x61
    host 0x51
    mov eax, 5
    mov cr8, rax
    sti
    mov ecx, 3000
    loop $
    mov r8d, [abs IRQLOG]
    xor eax, eax
    mov cr8, rax
    mov ecx, 3000
    loop $
    cli
    done
""",
        irqchip="split",
        registers={"r8": 1},
        interrupts=(0x61, 0x51, 0x41),
        on_host=_msi,
    ),
    Program(
        "apic-nesting",
        "While a vector is in service, only higher classes interrupt; the lower one follows the EOI",
        """
    apic_on
    set_gate 0x55, handler
    host 0x55
    wait_irq 0x41, 1
    done
handler:
    host 0x41
    host 0x65
    sti
    mov ecx, 3000
    loop $
    cli
    mov r8d, [abs IRQLOG]
    movzx r9, byte [abs IRQLOG + 4]
    mov dword [rbp + 0xB0], 0
    iretq
""",
        irqchip="split",
        registers={"r8": 1, "r9": 0x65},
        interrupts=(0x65, 0x41),
        on_host=_msi,
        emulated="its local APIC shows nothing in service",
    ),
    Program(
        "extint-through-lint0",
        "With a local APIC, the PIC's interrupt comes through LINT0 in ExtINT mode, and not while that is masked",
        """
    mov ebp, LAPIC
    mov dword [rbp + 0xF0], 0x1FF
    mov dword [rbp + 0x350], 0x10700
    host 0x34
    sti
    mov ecx, 200
again:
    loop again
    cli
    mov r8d, [abs IRQLOG]
    mov dword [rbp + 0x350], 0x700
    wait_irq 0x34, 1
    host 0x35
    spin_irq 0x35, 1
    done
""",
        irqchip="split",
        registers={"r8": 0},
        interrupts=(0x34, 0x35),
        on_host=_extint,
    ),
    Program(
        "apic-timer-one-shot",
        "The local APIC's timer counts down and interrupts once",
        """
    apic_on
    mov dword [rbp + 0x3E0], 0xB        ; divide by 1
    mov dword [rbp + 0x320], 0x45
    mov dword [rbp + 0x380], 200000
    wait_irq 0x45, 1
    mov r8d, [rbp + 0x390]              ; stopped at 0
    mov dword [rbp + 0x380], 200000
    spin_irq 0x45, 2
    mov dword [rbp + 0x380], 0xFFFFFFFF
    mov ecx, [rbp + 0x390]
    mov edx, [rbp + 0x390]
    cmp edx, ecx
    setbe r9b
    movzx r9, r9b
    mov dword [rbp + 0x380], 0
    done
""",
        irqchip="split",
        registers={"r8": 0, "r9": 1},
        interrupts=(0x45, 0x45),
    ),
    Program(
        "apic-timer-periodic",
        "The periodic timer interrupts again and again until its count is cleared",
        """
    apic_on
    mov dword [rbp + 0x3E0], 0xB
    mov dword [rbp + 0x320], 0x20046
    mov dword [rbp + 0x380], 1000000
    wait_irq 0x46, 3
    spin_irq 0x46, 5
    mov dword [rbp + 0x320], 0x10000
    mov dword [rbp + 0x380], 0
    done
""",
        irqchip="split",
        check=lambda lab: [] if set(lab.interrupts()) == {0x46} else [f"interrupts {lab.interrupts()}"],
    ),
    Program(
        "tsc-deadline-timer",
        "In TSC-deadline mode the timer fires when the TSC passes the MSR's value, which then reads 0",
        """
    apic_on
    mov dword [rbp + 0x320], 0x40047
    rdtsc
    shl rdx, 32
    or rax, rdx
    add rax, 100000
    mov r12, rax
    mov rdx, rax
    shr rdx, 32
    mov ecx, 0x6E0
    wrmsr
    wait_irq 0x47, 1
    rdtsc
    shl rdx, 32
    or rax, rdx
    cmp rax, r12
    setae r8b
    movzx r8, r8b
    mov ecx, 0x6E0
    rdmsr
    mov r9d, eax
    or r9d, edx
    rdtsc                               ; a deadline in the past fires at once
    mov ecx, 0x6E0
    mov eax, 1
    xor edx, edx
    wrmsr
    spin_irq 0x47, 2
    done
""",
        irqchip="split",
        registers={"r8": 1, "r9": 0},
        interrupts=(0x47, 0x47),
        needs=("tsc_deadline_timer",),
    ),
    Program(
        "x2apic",
        "In x2APIC mode registers are MSRs: ID, self IPI, EOI, ICR; the page answers no more; reserved MSRs give #GP",
        """
    mov ecx, 0x1B
    rdmsr
    or eax, 0x400
    wrmsr
    wrmsr64 0x80F, 0x1FF
    mov byte [abs EOI], 2
    mov ecx, 0x802
    rdmsr
    mov r8d, eax
    mov ecx, 0x80D
    rdmsr
    mov r9d, eax                        ; logical ID: cluster 0, bit 0
    wrmsr64 0x83F, 0x48
    wait_irq 0x48, 1
    wrmsr64 0x830, 0x4049               ; physical, to 0
    wait_irq 0x49, 1
    host 0x4A
    wait_irq 0x4A, 1
    wrmsr64 0x808, 0x20
    mov rax, cr8
    mov r10, rax
    done
""",
        irqchip="split",
        registers={"r8": 0, "r9": 1, "r10": 2},
        interrupts=(0x48, 0x49, 0x4A),
        on_host=_msi,
        needs=("x2apic",),
    ),
)
