"""The local APIC: registers, messages, priorities, timers, IPIs, starting a second processor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.testing.conformance import Program

if TYPE_CHECKING:
    from cardcage.testing.lab import Lab

LAPIC, LEVEL = 0xFEE00000, 0xC000


def _extint(lab: Lab, value: int) -> None:
    lab.raise_extint(value)


def _msi(lab: Lab, value: int) -> None:
    lab.vm.signal_msi(LAPIC, value)


def _level_msi(lab: Lab, value: int) -> None:
    lab.vm.signal_msi(LAPIC, value | LEVEL)


def _msi_to_second(lab: Lab, value: int) -> None:
    lab.vm.signal_msi(LAPIC | 1 << 12, value)


def _nmis_at_labels(lab: Lab) -> list[str]:
    registers, labels = lab.state().registers, lab.code.labels
    wanted = (
        ("first NMI", registers.r9, "at_sent"),
        ("second NMI", registers.r10, "at_sent"),
        ("interrupt to self", registers.r11, "at_ipi"),
        ("interrupt that POPF lets in", registers.r13, "at_popf"),
    )
    return [f"the {name} came at {rip:#x}, not at {at}" for name, rip, at in wanted if rip != labels[at]]


PROGRAMS = (
    Program(
        "nmi-by-message",
        "An NMI to oneself is taken after the store that sent it; of more during its handler one waits for the IRET",
        """
    mov ebp, LAPIC
    mov dword [rbp + 0xF0], 0x1FF
    set_gate 2, handler
    set_gate 0x51, interrupt
    set_gate 0x52, interrupt
    xor ecx, ecx
    mov dword [rbp + 0x310], 0
    mov dword [rbp + 0x300], 0x4400
at_sent:
    mov r12d, ecx
    sti
    nop
    mov dword [rbp + 0x300], 0x44051            ; to self
at_ipi:
    cli
    mov dword [rbp + 0x300], 0x44052            ; waits
    pushfq
    or dword [rsp], 0x200
    popfq
at_popf:
    cli
    mov r14d, 7
    done
handler:
    inc ecx
    cmp ecx, 1
    jne second
    mov r9, [rsp]
    mov dword [rbp + 0x300], 0x4400
    mov dword [rbp + 0x300], 0x4400
    mov dword [rbp + 0x300], 0x4400
    mov r8d, ecx
    iretq
second:
    mov r10, [rsp]
    iretq
interrupt:
    mov r11, r13
    mov r13, [rsp]
    mov dword [rbp + 0xB0], 0
    iretq
""",
        irqchip="split",
        registers={"rcx": 2, "r8": 1, "r12": 2, "r14": 7},
        check=_nmis_at_labels,
        emulated="interrupts wait for the end of what it emulates",
    ),
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
    Program(
        "init-sipi",
        "INIT and SIPI start the second processor in real mode at the vector's page, and IPIs go both ways",
        """
    apic_on
    mov dword [rbp + 0x310], 1 << 24
    mov dword [rbp + 0x300], 0x4500     ; INIT
    mov dword [rbp + 0x310], 1 << 24
    mov dword [rbp + 0x300], 0x4609     ; SIPI, page 9
    wait_irq 0x61, 1                    ; the other's greeting
    mov dword [rbp + 0x310], 1 << 24
    mov dword [rbp + 0x300], 0x4062
    wait_irq 0x63, 1
    mov r8d, [abs DATA]
    mov r9d, [abs DATA + 4]
    done
    times 0x1000 - ($ - $$) nop
    ap_start second, 0x38000
second:
    mov ebp, LAPIC
    mov dword [rbp + 0xF0], 0x1FF
    mov eax, [rbp + 0x20]
    shr eax, 24
    mov [abs DATA], eax
    set_gate 0x62, answered
    mov dword [rbp + 0x310], 0
    mov dword [rbp + 0x300], 0x4061
    sti
sleep:
    hlt
    jmp sleep
answered:
    mov dword [abs DATA + 4], 77
    mov dword [rbp + 0xB0], 0
    mov dword [rbp + 0x300], 0x4063
    iretq
""",
        irqchip="split",
        cpus=2,
        registers={"r8": 1, "r9": 77},
        interrupts=(0x61, 0x63),
    ),
    Program(
        "sipi-real-mode-state",
        "A started processor begins with CS:IP at its page, in real mode, with the register state after INIT",
        """
    apic_on
    mov dword [rbp + 0x310], 1 << 24
    mov dword [rbp + 0x300], 0x4500
    mov dword [rbp + 0x310], 1 << 24
    mov dword [rbp + 0x300], 0x460A
wait_:
    cmp dword [abs DATA], 0x12345678
    jne wait_
    movzx r8, word [abs DATA + 4]
    mov r9d, [abs DATA + 8]
    and r9d, 1
    movzx r10, word [abs DATA + 12]
    done
    times 0x2000 - ($ - $$) nop
    bits 16
    mov eax, cr0
    pushf
    pop bx
    mov cx, cs
    mov dx, 0x6000
    mov ds, dx
    mov [4], cx
    mov [8], eax
    mov [12], bx
    mov dword [0], 0x12345678
rest:
    hlt
    jmp rest
""",
        irqchip="split",
        cpus=2,
        registers={"r8": 0xA00, "r9": 0, "r10": 2},
    ),
    Program(
        "ipi-nmi-and-broadcast",
        "An NMI sent by IPI reaches a halted processor, all-but-self reaches the other only, and MSIs find it by ID",
        """
    apic_on
    mov dword [rbp + 0x300], 0xC4500    ; INIT, all but self
    mov dword [rbp + 0x300], 0xC4609
    wait_irq 0x61, 1
    mov dword [rbp + 0x310], 1 << 24
    mov dword [rbp + 0x300], 0x4400     ; NMI
    wait_irq 0x62, 1
    mov dword [rbp + 0x300], 0xC4063
    wait_irq 0x64, 1
    host 0x65
    wait_irq 0x66, 1
    done
    times 0x1000 - ($ - $$) nop
    ap_start second, 0x38000
second:
    mov ebp, LAPIC
    mov dword [rbp + 0xF0], 0x1FF
    set_gate 2, by_nmi
    set_gate 0x63, by_broadcast
    set_gate 0x65, by_msi
    mov dword [rbp + 0x310], 0
    mov dword [rbp + 0x300], 0x4061
    sti
sleep:
    hlt
    jmp sleep
by_nmi:
    mov dword [rbp + 0x300], 0x4062
    iretq
by_broadcast:
    mov dword [rbp + 0xB0], 0
    mov dword [rbp + 0x300], 0x4064
    iretq
by_msi:
    mov dword [rbp + 0xB0], 0
    mov dword [rbp + 0x300], 0x4066
    iretq
""",
        irqchip="split",
        cpus=2,
        interrupts=(0x61, 0x62, 0x64, 0x66),
        on_host=_msi_to_second,
    ),
    Program(
        "ipi-ping-pong",
        "Two processors that wake each other from HLT by IPI lose no wake-up in hundreds of rounds",
        """
    apic_on
    set_gate 0x71, first
    set_gate 0x72, second_
    mov dword [rbp + 0x300], 0xC4500
    mov dword [rbp + 0x300], 0xC4609
    mov r12d, 300
rounds:
    cli
    cmp r8d, r12d
    jae over
    sti
    hlt
    jmp rounds
over:
    done
first:                                  ; on processor 0
    inc r8d
    mov dword [rbp + 0xB0], 0
    cmp r8d, r12d
    jae enough
    mov dword [rbp + 0x310], 1 << 24
    mov dword [rbp + 0x300], 0x4072
enough:
    iretq
second_:                                ; on processor 1
    mov dword [rbp + 0xB0], 0
    mov dword [rbp + 0x310], 0
    mov dword [rbp + 0x300], 0x4071
    iretq
    times 0x1000 - ($ - $$) nop
    ap_start second, 0x38000
second:
    mov ebp, LAPIC
    mov dword [rbp + 0xF0], 0x1FF
    mov dword [rbp + 0x310], 0
    mov dword [rbp + 0x300], 0x4071
    sti
sleep:
    hlt
    jmp sleep
""",
        irqchip="split",
        cpus=2,
        registers={"r8": 300},
    ),
)
