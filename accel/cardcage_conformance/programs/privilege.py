"""Rings: gates with stack switches, I/O permission, what ring 3 may not do."""

from __future__ import annotations

from cardcage_conformance.conformance import Fault, Program

# Ring 3 code ends by the ports that the TSS's bitmap opens: the harness's own.
PROGRAMS = (
    Program(
        "user-mode-fault",
        "A fault in ring 3 switches to RSP0 and pushes the outer stack; error codes say user",
        """
    mov qword [abs PTE(0x66000)], 0x66003       ; supervisor only
    invlpg [abs 0x66000]
    expect_fault one
    enter_user user
user:
at_touch:
    mov al, [abs 0x66000]
one:
    mov qword [abs RESUME], two
at_write:
    mov [abs 0x66008], al
two:
    mov qword [abs RESUME], three
at_cli:
    cli
three:
    mov qword [abs RESUME], four
at_port:
    in al, 0x10
four:
    mov qword [abs RESUME], five
at_hlt:
    hlt
five:
    mov qword [abs RESUME], six
at_cr:
    mov rax, cr0
six:
    mov r8, [abs FAULTS + 64 + 40]
    mov r9, [abs FAULTS + 64 + 48]
    mov r10, rsp
    mov r11w, cs
    movzx r11, r11w
    done
""",
        registers={"r8": 0x2A000, "r9": 0x2B, "r10": 0x2A000, "r11": 0x33},
        faults=(
            Fault(14, 5, rip="at_touch", cr2=0x66000, cs=0x33),
            Fault(14, 7, rip="at_write", cr2=0x66008),
            Fault(13, 0, rip="at_cli"),
            Fault(13, 0, rip="at_port"),
            Fault(13, 0, rip="at_hlt"),
            Fault(13, 0, rip="at_cr"),
        ),
    ),
    Program(
        "interrupt-from-user",
        "INT 0x80 from ring 3 enters ring 0 on RSP0, aligned, and IRETQ comes back; a closed gate gives #GP",
        """
    set_gate 0x80, handler
    enter_user user
user:
    mov ebx, 1
    int 0x80
    mov r12, rsp
    mov r13w, ss
    mov qword [abs RESUME], closed
at_closed:
    int 0x81
closed:
    movzx r13, r13w
    done
handler:
    mov r8, rsp
    mov r9w, cs
    movzx r9, r9w
    mov r10, [rsp + 8]
    mov r11, [rsp + 24]
    inc ebx
    iretq
""",
        registers={
            "rbx": 2,
            "r8": 0x2C000 - 40,
            "r9": 8,
            "r10": 0x33,
            "r11": 0x2A000,
            "r12": 0x2A000,
            "r13": 0x2B,
        },
        faults=(Fault(13, 0x81 << 3 | 2, rip="at_closed", cs=0x33),),
        emulated="its ring 3 runs natively with gates of its own",
    ),
    Program(
        "ist-stack",
        "A gate with an IST number switches stacks even from ring 0, and aligns the frame to 16 bytes",
        """
    mov byte [abs IDT + 0x40 * 16 + 4], 1
    set_gate 0x40, handler
    lea rsp, [rsp - 3]
    mov rbx, rsp
    int 0x40
    mov r10, rsp
    sub r10, rbx
    mov byte [abs IDT + 0x40 * 16 + 4], 0
    int 0x40
    mov r11, r8
    and r11, 0xF
    mov r8, r12
    mov rsp, 0x28000
    done
handler:
    mov r12, r9
    mov r9, r8
    mov r8, rsp
    iretq
""",
        registers={"r10": 0, "r11": 8, "r9": 0x2E000 - 40},
    ),
    Program(
        "iret-to-user-32",
        "IRETD and INT change rings and stacks in 32-bit code, through the 32-bit TSS",
        """
    set_gate 0x80, handler
    enter_user user
user:
    mov ax, UDS
    mov ds, ax
    mov es, ax
    mov ebx, cs
    int 0x80
    mov ecx, esp
    mov dword [RESUME], over
at_cli:
    cli
over:
    mov edx, [FAULTS + 64 + 40]
    xor eax, eax
    done
handler:
    mov esi, esp
    mov edi, ss
    mov ebp, [esp + 12]
    iretd
""",
        start="protected32",
        registers={"rbx": 0x23, "rcx": 0x2A000, "rsi": 0x2C000 - 20, "rdi": 0x10, "rbp": 0x2A000, "rdx": 0x2A000},
        faults=(Fault(13, 0, rip="at_cli", cs=0x23),),
    ),
    Program(
        "call-gate-32",
        "A call gate from ring 3 switches to ESP0, copies its parameters and returns with RET n",
        """
    mov word [GDT + 0x58], gated
    mov word [GDT + 0x5A], CS32
    mov dword [GDT + 0x5C], 0x0000EC02          ; 32-bit call gate, DPL 3, two parameters
    enter_user user
user:
    push 0x1111
    push 0x2222
    call 0x58:0
    mov ebx, esp
    mov ecx, cs
    done
gated:
    mov edx, [esp + 8]
    mov esi, [esp + 12]
    mov edi, esp
    mov ebp, cs
    retf 8
""",
        start="protected32",
        registers={
            "rbx": 0x2A000,
            "rcx": 0x23,
            "rdx": 0x2222,
            "rsi": 0x1111,
            "rdi": 0x2C000 - 24,
            "rbp": 0x18,
        },
    ),
    Program(
        "privileged-msr-access",
        "MSRs hold what is written, refuse non-canonical addresses, and EFER its reserved bits",
        """
    wrmsr64 0xC0000082, HIGH + 0x1234
    mov ecx, 0xC0000082
    rdmsr
    mov r8d, eax
    mov r9d, edx
    mov edx, 0x80000000
    xor eax, eax
    expect_fault one
at_lstar:
    wrmsr
one:
    mov ecx, 0xC0000080
    rdmsr
    mov r10d, eax
    bts eax, 2
    expect_fault two
at_efer:
    wrmsr
two:
    mov ecx, 0x277
    rdmsr
    mov r11d, eax
    done
""",
        registers={"r8": 0x1234, "r9": 0xFFFF8000, "r10": 0xD01, "r11": 0x00070406},
        faults=(Fault(13, 0, rip="at_lstar"), Fault(13, 0, rip="at_efer")),
    ),
)
