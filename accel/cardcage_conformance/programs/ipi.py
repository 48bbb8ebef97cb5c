"""Messages between processors: NMIs, starting a second processor, broadcasts, waking each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage_conformance.conformance import Program

if TYPE_CHECKING:
    from cardcage_conformance.lab import Lab

LAPIC = 0xFEE00000


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
    second_processor
    mov eax, [rbp + 0x20]
    shr eax, 24
    mov [abs DATA], eax
    set_gate 0x62, answered
    greet_and_sleep 0x4061
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
    second_processor
    set_gate 2, by_nmi
    set_gate 0x63, by_broadcast
    set_gate 0x65, by_msi
    greet_and_sleep 0x4061
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
    second_processor
    greet_and_sleep 0x4071
""",
        irqchip="split",
        cpus=2,
        registers={"r8": 300},
    ),
    Program(
        "nmis-from-two",
        "An NMI from each of two processors at once are two, though the first is being taken when the second comes",
        """
    apic_on
    set_gate 2, by_nmi
    set_gate 0x62, behind
    mov dword [rbp + 0x300], 0xC4500
    mov dword [rbp + 0x300], 0xC4609
    mov dword [rbp + 0x310], 0
    sti
rounds:
    mov qword [abs DATA], 0
    inc dword [abs DATA + 8]            ; the other one sends, too
    mov ecx, [abs DATA + 8]
    and ecx, 0x3FF
delay:
    dec ecx
    jns delay
    mov dword [rbp + 0x300], 0x4400
wait_:
    pause
    cmp dword [abs DATA + 4], 0
    je wait_
    cmp dword [abs DATA], 2
    jne over
    cmp dword [abs DATA + 8], 8000
    jne rounds
over:
    cli
    mov r8d, [abs DATA]
    mov r9d, [abs DATA + 8]
    done
by_nmi:
    inc dword [abs DATA]
    iretq
behind:                                 ; sent behind the other's NMI
    inc dword [abs DATA + 4]
    mov dword [rbp + 0xB0], 0
    iretq
    second_processor
    xor ebx, ebx
    mov dword [rbp + 0x310], 0
next:
    pause
    cmp ebx, [abs DATA + 8]
    je next
    inc ebx
    mov dword [rbp + 0x300], 0x4400
    mov dword [rbp + 0x300], 0x4062
    jmp next
""",
        irqchip="split",
        cpus=2,
        registers={"r8": 2, "r9": 8000},
        emulated="8,000 rounds take it minutes",
    ),
)
