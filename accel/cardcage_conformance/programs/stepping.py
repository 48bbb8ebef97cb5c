"""Single-stepping: which instructions RFLAGS.TF traps behind, and where (Intel SDM vol. 3, 17.3.1.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage_conformance.conformance import Fault, Program

if TYPE_CHECKING:
    from cardcage_conformance.lab import Lab

OFF = ("last", "pushed", "masked", "off")
"""Where the traps of the macro ``step_off`` are, and that before it."""


def _traps(*labels: str) -> tuple[Fault, ...]:
    return tuple(Fault(1, rip=f"at_{label}") for label in labels)


def _status(lab: Lab) -> list[str]:
    """DR6 shows a single step after the last trap."""
    found = lab.state().debug[4]
    return [] if found == 0xFFFF4FF0 else [f"DR6 is {found:#x}"]


def _saved_flags(lab: Lab) -> list[str]:
    """RF in the image of each trap: set between two iterations, clear otherwise."""
    found = [record[4] >> 16 & 1 for record in lab.faults()]
    wanted = [1, 1, 0, 1, 0, 0, 0, 0, 0, 0]
    return [] if found == wanted else [f"RF in the saved flags is {found}"]


PROGRAMS = (
    Program(
        "single-step-branches",
        "TF traps at the target of each branch that is taken, and behind each that is not",
        """
    step_on
    cmp eax, eax
at_compared:
    jne at_behind_jne
at_behind_jne:
    je at_je
    failed
at_je:
    jmp near at_jmp
    failed
at_jmp:
    lea rdx, [rel at_indirect]
at_lea:
    jmp rdx
    failed
at_indirect:
    mov ecx, 2
at_count:
    loop at_count
at_behind_loop:
    jrcxz at_jrcxz
    failed
at_jrcxz:
    call at_called
at_returned:
    lea rdx, [rel at_returned_8]
at_other:
    push rdx
at_push:
    ret
at_called:
    ret 0
at_returned_8:
    call [rel pointer]
at_second:
    jmp over
pointer: dq at_pointed
at_pointed:
    nop
at_nop:
    ret
over:
at_last:
    step_off
    nop
    done
""",
        faults=_traps(
            *("compared", "behind_jne", "je", "jmp", "lea", "indirect", "count", "count", "behind_loop", "jrcxz"),
            *("called", "returned", "other", "push", "returned_8", "pointed", "nop", "second", *OFF),
        ),
        registers={"rcx": 0},
        check=_status,
    ),
    Program(
        "single-step-strings",
        "TF traps behind each iteration of each repeated string instruction, with RF set but behind the last one",
        """
    mov edi, DATA
    mov esi, DATA + 0x100
    mov ecx, 3
    step_on
at_string:
    repe cmpsb
at_compared:
    mov ecx, 2
at_movs:
    rep movsw
at_moved:
    rep lodsb
at_none:
    scasb
at_last:
    step_off
    nop
    done
""",
        faults=_traps("string", "string", "compared", "movs", "movs", "moved", "none", *OFF),
        registers={"rcx": 0, "rsi": 0x60107, "rdi": 0x60008},
        emulated="its emulator runs several iterations in one step",
    ),
    Program(
        "single-step-segment-loads",
        "TF does not trap between MOV SS or POP SS and the next instruction, but traps behind LSS and STI themselves",
        """
    mov eax, ss
    push rax
    push 0
    mov dword [rsp], 0x28000
    mov word [rsp + 4], ax
    step_on
    mov ss, eax
    nop
at_mov:
    mov ds, eax
at_ds:
    sti
at_sti:
    nop
at_nop:
    cli
at_cli:
    mov ss, eax
    mov ss, eax                         ; the second one holds nothing back
at_twice:
    pushfq
at_pushfq:
    lss esp, [rsp + 8]
at_lss:
    lea rsp, [rsp - 8]
at_last:
    step_off
    nop
    done
""",
        faults=_traps("mov", "ds", "sti", "nop", "cli", "twice", "pushfq", "lss", *OFF),
        emulated="its emulator traps behind MOV SS",
    ),
    Program(
        "single-step-events",
        "TF traps behind no instruction that raises an exception or enters a handler, and traps behind all the others",
        """
    set_gate 0, divide
    mov ecx, 0x277
    step_on
    rdmsr
at_rdmsr:
    wrmsr
at_wrmsr:
    xor eax, eax
at_xor:
    cpuid
at_cpuid:
    in al, 0x21
at_in:
    out 0x20, al
at_out:
    xor ebx, ebx
at_ebx:
    div ebx
    nop
at_behind_div:
    int3
at_int3:
    int 0x80
at_int:
    nop
at_nop:
    db 0xF1
at_int1:
    hlt
at_hlt:
    pushfq
at_pushfq:
    pop r8
at_last:
    step_off
    nop
    done
divide:
    add qword [rsp], 2
    iretq
""",
        faults=(
            *_traps("rdmsr", "wrmsr", "xor", "cpuid", "in", "out", "ebx", "behind_div"),
            Fault(3, rip="at_int3"),
            *_traps("nop", "int1", "hlt", "pushfq", *OFF),
        ),
        registers={"r8": 0x146},
        emulated="its emulator does not trap behind all of them",
    ),
    Program(
        "single-step-returns",
        "IRET that sets TF does not trap, one that clears it does; so do far transfers and loads of CR0 and CR3",
        """
    push DS0
    push 0x27F00
    push 0x102
    push CS64
    push at_target
    iretq
at_target:
    nop
at_nop:
    mov rax, cr0
at_cr0:
    mov cr0, rax
at_set_cr0:
    mov rax, cr3
at_cr3:
    mov cr3, rax
at_set_cr3:
    push CS64
at_selector:
    push at_far
at_offset:
    retfq
    failed
at_far:
    db 0xFF, 0x1C, 0x25                 ; call far [far_pointer], 32 bits each
    dd far_pointer
at_back:
    push DS0
at_1:
    push 0x27F00
at_2:
    push 2
at_3:
    push CS64
at_4:
    push at_end
at_5:
    iretq
    failed
far_pointer:
    dd at_far_called
    dw CS64
at_far_called:
    retf
at_end:
    nop
    done
""",
        faults=_traps(
            *("nop", "cr0", "set_cr0", "cr3", "set_cr3", "selector", "offset", "far", "far_called", "back"),
            *("1", "2", "3", "4", "5", "end"),
        ),
        emulated="its emulator cannot step a far call",
    ),
    Program(
        "single-step-syscall",
        "TF as SYSCALL and SYSRET leave it decides about the trap behind them: SFMASK keeps it from the kernel",
        """
    wrmsr64 0xC0000081, CS64 << 32 | 0x23 << 48
    wrmsr64 0xC0000082, at_kernel
    wrmsr64 0xC0000084, 0x100
    enter_user user
user:
    step_on
    mov ebx, 1
at_user:
    syscall
at_returned:
    nop
at_nop:
    step_off
    mov ebx, 2
    syscall
at_kernel:
    pushfq
    pop r8
    mov r9, r11
    cmp ebx, 2
    je second
    o64 sysret
second:
    wrmsr64 0xC0000084, 0
    wrmsr64 0xC0000082, at_third
    mov rcx, again
    mov r11d, 2
    o64 sysret
again:
    step_on
    syscall
at_third:
    pushfq
at_pushed_3:
    and qword [rsp], ~0x100
at_masked_3:
    popfq
at_end:
    nop
    done
""",
        faults=_traps("user", "returned", "nop", "pushed", "masked", "off", "third", "pushed_3", "masked_3", "end"),
        registers={"r8": 2, "r9": 2},
        emulated="its emulator keeps SYSCALL's trap for the kernel",
    ),
    Program(
        "single-step-sysenter",
        "SYSENTER keeps TF: the kernel's first instruction is trapped before",
        """
    flat_segments_at_58
    sysenter_to at_kernel
    push UDS
    push USER_STACK
    push 0x4002                                 ; NT
    push UCS32
    push user
    iretd
user:
    step_on
    sysenter
at_kernel:
    mov ebx, esp
at_last:
    step_off
    nop
    mov eax, [ss:FAULTS + 64 + 32]
    and eax, 0x4300
    done
""",
        start="protected32",
        registers={"rax": 0x4100, "rbx": 0x2C000},
        faults=_traps("kernel", *OFF),
        emulated="its emulator does not trap behind SYSENTER",
    ),
    Program(
        "single-step-32",
        "TF traps in 32-bit code behind JECXZ, INTO that does nothing, PUSHAD, far jumps and interrupt returns",
        """
    step_on
    xor ecx, ecx
at_xor:
    jecxz at_jecxz
    failed
at_jecxz:
    into
at_into:
    pushad
at_pushad:
    popad
at_popad:
    jmp CS32:at_far
at_far:
    call CS32:at_called
at_returned:
    enter 8, 1
at_enter:
    leave
at_leave:
    jmp over
at_called:
    retf
over:
at_last:
    step_off
    nop
    done
""",
        start="protected32",
        faults=_traps(
            *("xor", "jecxz", "into", "pushad", "popad", "far", "called", "returned", "enter", "leave", *OFF),
        ),
    ),
    Program(
        "single-step-task",
        "A task whose TSS has TF set traps behind its first instruction, one whose TSS has the T bit before it",
        """
    mov dword [GDT + 0x58], 0x50000067
    mov dword [GDT + 0x5C], 0x00008906          ; 0x58 TSS at 0x65000
    mov edi, 0x65000
    mov dword [edi + 0x20], at_task
    mov dword [edi + 0x24], 0x102
    mov dword [edi + 0x38], 0x27000
    mov dword [edi + 0x48], DS0
    mov dword [edi + 0x4C], CS32
    mov dword [edi + 0x50], DS0
    mov dword [edi + 0x54], DS0
    mov dword [edi + 0x64], 0x680001            ; T
    mov eax, 0x55
    mov dr7, eax
    jmp 0x58:0
at_task:
    nop
at_last:
    step_off
    nop
    mov ebx, dr6
    mov ecx, dr7
    done
""",
        start="protected32",
        faults=_traps("task", *OFF),
        registers={"rbx": 0xFFFFCFF0, "rcx": 0x400},
        emulated="its emulator knows no T bit",
    ),
)
