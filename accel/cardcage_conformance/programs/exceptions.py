"""Exceptions with their error codes, traps and faults that end the machine."""

from __future__ import annotations

from cardcage.vcpu import Exit

from cardcage_conformance.conformance import Fault, Program

PROGRAMS = (
    Program(
        "divide-error",
        "DIV by zero and overflow raise #DE at the instruction, with operands unchanged",
        """
    mov eax, 100
    xor edx, edx
    xor ecx, ecx
    expect_fault one
at_zero:
    div ecx
one:
    mov rdx, 5
    mov rax, 7
    mov rcx, 5
    expect_fault two
at_overflow:
    div rcx
two:
    mov r8, rdx
    mov r9, rax
    mov eax, 0x80000000
    cdq
    mov ecx, -1
    expect_fault three
at_signed:
    idiv ecx
three:
    done
""",
        registers={"r8": 5, "r9": 7, "rax": 0x80000000, "rdx": 0xFFFFFFFF},
        faults=(Fault(0, rip="at_zero"), Fault(0, rip="at_overflow"), Fault(0, rip="at_signed")),
    ),
    Program(
        "breakpoint-and-int",
        "INT3 and INT n are traps: the saved RIP is behind them",
        """
    int3
at_one:
    int 3
at_two:
    int 0x80
    mov eax, [abs IRQS + 0x80 * 4]
    done
""",
        registers={"rax": 1},
        faults=(Fault(3, rip="at_one"), Fault(3, rip="at_two")),
    ),
    Program(
        "undefined-opcodes",
        "UD2, 64-bit mode's removed opcodes and a misplaced LOCK raise #UD at the instruction",
        """
    expect_fault one
at_ud2:
    ud2
one:
    expect_fault two
at_removed:
    db 0x06                 ; push es
two:
    expect_fault three
at_lock:
    db 0xF0, 0x89, 0xC0     ; lock mov eax, eax
three:
    expect_fault four
at_ud0:
    db 0x0F, 0xFF, 0xC0
four:
    expect_fault five
at_daa:
    db 0x27
five:
    done
""",
        faults=tuple(Fault(6, rip=f"at_{name}") for name in ("ud2", "removed", "lock", "ud0", "daa")),
    ),
    Program(
        "general-protection",
        "Non-canonical addresses, bad selectors, reserved control bits and unknown MSRs raise #GP",
        """
    mov rbx, 0x8000000000000000
    expect_fault one
at_load:
    mov rax, [rbx]
one:
    mov eax, 0x2003
    expect_fault two
at_selector:
    mov ds, ax              ; beyond the GDT's limit
two:
    mov ecx, 0x12345678
    expect_fault three
at_msr:
    rdmsr
three:
    mov rax, cr4
    bts rax, 15
    expect_fault four
at_cr4:
    mov cr4, rax
four:
    mov rax, cr0
    btr rax, 0              ; PG without PE
    expect_fault five
at_cr0:
    mov cr0, rax
five:
    mov rax, 0x8000000000000000
    expect_fault six
    push six
    mov r8, rsp
    jmp over
six:
    done
over:
at_jump:
    jmp rax
""",
        faults=(
            Fault(13, 0, rip="at_load"),
            Fault(13, 0x2000, rip="at_selector"),
            Fault(13, 0, rip="at_msr"),
            Fault(13, 0, rip="at_cr4"),
            Fault(13, 0, rip="at_cr0"),
            Fault(13, 0, rip="at_jump"),
        ),
    ),
    Program(
        "page-fault-codes",
        "#PF tells read, write, present and fetch apart, puts the address in CR2, and faults before anything changed",
        """
    mov qword [abs PTE(0x65000)], 0
    mov qword [abs PTE(0x66000)], 0x66005       ; read-only
    bts qword [abs PTE(0x67000)], 63            ; no execute
    mov rax, cr3
    mov cr3, rax
    expect_fault one
at_read:
    mov eax, [abs 0x65123]
one:
    expect_fault two
at_write:
    mov [abs 0x65FFF], eax
two:
    mov ecx, 7
    expect_fault three
at_readonly:
    add [abs 0x66010], ecx
three:
    mov r8d, [abs 0x66010]
    expect_fault four
    mov rax, 0x67000
    jmp rax
four:
    expect_fault five
    mov eax, 0x65008
    jmp rax
five:
    mov byte [abs IDT + 14 * 16 + 4], 1         ; deliver on a good stack
    expect_fault six
    mov rbx, rsp
    mov rsp, 0x66800
at_push:
    push rax
six:
    mov r9, rsp
    mov rsp, rbx
    done
""",
        registers={"r8": 0, "r9": 0x66800},
        faults=(
            Fault(14, 0, rip="at_read", cr2=0x65123),
            Fault(14, 2, rip="at_write", cr2=0x65FFF),
            Fault(14, 3, rip="at_readonly", cr2=0x66010),
            Fault(14, 0x11, cr2=0x67000),
            Fault(14, 0x10, cr2=0x65008),
            Fault(14, 3, rip="at_push", cr2=0x667F8),
        ),
    ),
    Program(
        "single-step",
        "RFLAGS.TF traps behind each instruction, and the handler runs with TF clear",
        """
    step_on
    nop
at_one:
    mov eax, 5
at_two:
    pushfq
at_three:
    and qword [rsp], ~0x100
at_four:
    popfq
at_five:
    nop
    done
""",
        registers={"rax": 5},
        faults=tuple(Fault(1, rip=f"at_{name}") for name in ("one", "two", "three", "four", "five")),
    ),
    Program(
        "triple-fault",
        "An exception that cannot be delivered, twice over, ends the run as a shutdown",
        """
    lidt [abs empty]
    ud2
empty: dw 0
    dq 0
""",
        exit=Exit.SHUTDOWN,
    ),
    Program(
        "double-fault",
        "A contributory fault while a contributory fault is delivered becomes #DF with error code 0, on its IST stack",
        """
    expect_fault over
    mov word [abs IDT + 2], 0x2000              ; #DE's gate names a selector beyond the GDT
    xor ecx, ecx
at_first:
    div ecx
over:
    mov rax, [abs FAULTS + 64 + 40]
    done
""",
        registers={"rax": 0x28000},
        faults=(Fault(8, 0, rip="at_first"),),
    ),
    Program(
        "stack-fault-64",
        "A non-canonical stack address raises #SS where a data access would raise #GP",
        """
    mov byte [abs IDT + 12 * 16 + 4], 1         ; deliver on a good stack
    mov byte [abs IDT + 13 * 16 + 4], 1
    mov rbx, rsp
    mov rsp, 0x8000000000000000
    mov rbp, rsp
    expect_fault one
at_pop:
    pop rax
one:
    expect_fault two
at_bp:
    mov al, [rbp + 8]
two:
    expect_fault three
at_push:
    push rax
three:
    mov r8, rsp
    mov rsp, rbx
    mov rcx, rbp
    expect_fault four
at_data:
    mov al, [rcx + 8]
four:
    done
""",
        registers={"r8": 1 << 63},
        faults=(
            Fault(12, 0, rip="at_pop"),
            Fault(12, 0, rip="at_bp"),
            Fault(12, 0, rip="at_push"),
            Fault(13, 0, rip="at_data"),
        ),
    ),
    Program(
        "alignment-check",
        "With CR0.AM and RFLAGS.AC, a misaligned access raises #AC in ring 3 and never in ring 0",
        """
    mov rax, cr0
    bts rax, 18
    mov cr0, rax
    push 0x40002
    popfq
    mov eax, [abs DATA + 1]
    push UDS
    push USER_STACK
    push 0x40002
    push UCS64
    push user
    iretq
user:
    mov eax, [abs DATA + 4]
    mov [abs DATA + 1], al
    mov qword [abs RESUME], over
at_misaligned:
    mov eax, [abs DATA + 2]
over:
    push 2
    popfq
    mov eax, [abs DATA + 2]
    done
""",
        faults=(Fault(17, 0, rip="at_misaligned"),),
        emulated="its emulator knows no alignment checks",
    ),
    Program(
        "single-step-string",
        "TF traps behind each iteration of a repeated string instruction",
        """
    mov edi, DATA
    mov ecx, 3
    mov eax, 0x11
    step_on
at_string:
    rep stosb
at_behind:
    pushfq
at_pushed:
    and qword [rsp], ~0x100
at_cleared:
    popfq
at_end:
    nop
    done
""",
        registers={"rcx": 0, "rdi": 0x60003},
        faults=tuple(Fault(1, rip=f"at_{name}") for name in ("string", "string", "behind", "pushed", "cleared", "end")),
        emulated="its emulator runs several iterations in one step",
    ),
    Program(
        "icebp",
        "INT1 (opcode F1) is a trap of vector 1",
        """
    db 0xF1
at_behind:
    done
""",
        faults=(Fault(1, rip="at_behind"),),
    ),
    Program(
        "debug-registers",
        "Debug registers hold their values, DR6 and DR7 their fixed bits, and reserved bits raise #GP",
        """
    mov eax, DATA
    mov dr0, rax
    mov dr3, rax
    mov r8, dr0
    mov r9, dr3
    mov eax, 0x400
    mov dr7, rax
    mov r10, dr7
    mov eax, 1 << 16                    ; RTM: fixed where there is none
    mov dr6, rax
    mov r11, dr6
    bts rax, 40
    expect_fault over
at_reserved:
    mov dr7, rax
over:
    xor eax, eax
    mov dr0, rax
    mov dr3, rax
    done
""",
        registers={"r8": 0x60000, "r9": 0x60000, "r10": 0x400, "r11": 0xFFFF0FF0},
        faults=(Fault(13, 0, rip="at_reserved"),),
    ),
    Program(
        "invalid-tss",
        "A ring change to a stack segment of the wrong ring in the TSS raises #TS with that selector",
        """
    mov dword [GDT + 0x58], 0x0000FFFF
    mov dword [GDT + 0x5C], 0x00CFBB00          ; 0x58 code of ring 1
    mov word [GDT + 0x60], gated
    mov word [GDT + 0x62], 0x59
    mov dword [GDT + 0x64], 0x0000EC00          ; 0x60 call gate to it
    mov dword [TSS + 12], 0x2E000
    mov dword [TSS + 16], DS0                   ; SS1
    enter_user user
user:
    mov ax, UDS
    mov ds, ax
    mov dword [RESUME], over
at_call:
    call 0x60:0
gated:
    failed
over:
    done
""",
        start="protected32",
        faults=(Fault(10, 0x10, rip="at_call", cs=0x23),),
    ),
    Program(
        "exceptions-32",
        "32-bit code gets #OF, #BR, #NP, #SS, #GP and #TS with their error codes",
        """
    mov al, 0x7F
    add al, 1
    into
at_into:
    mov dword [DATA], 1
    mov dword [DATA + 4], 5
    mov ecx, 6
    expect_fault one
at_bound:
    bound ecx, [DATA]
one:
    mov dword [GDT + 0x58], 0x0000FFFF
    mov dword [GDT + 0x5C], 0x00CF1300      ; not present
    mov ax, 0x58
    expect_fault two
at_absent:
    mov es, ax
two:
    expect_fault three
at_stack:
    mov ss, ax
three:
    mov ax, CS32
    expect_fault four
at_code:
    mov ss, ax
four:
    done
""",
        start="protected32",
        faults=(
            Fault(4, rip="at_into"),
            Fault(5, rip="at_bound"),
            Fault(11, 0x58, rip="at_absent"),
            Fault(12, 0x58, rip="at_stack"),
            Fault(13, 0x18, rip="at_code"),
        ),
    ),
    Program(
        "segment-limits-32",
        "32-bit accesses beyond a segment's limit, or through a null selector, raise #GP",
        """
    mov dword [GDT + 0x60], 0x00000FFF
    mov dword [GDT + 0x64], 0x00409306      ; base 0x60000, limit 0xFFF
    mov ax, 0x60
    mov fs, ax
    expect_fault one
at_limit:
    mov eax, [fs:0xFFD]
one:
    mov eax, [fs:0xFFC]
    mov dword [fs:0xFFC], 0x55
    expect_fault two
at_write:
    mov byte [fs:0x1000], 1
two:
    mov dword [GDT + 0x68], 0x00000FFF
    mov dword [GDT + 0x6C], 0x00409106      ; the same, read-only
    mov ax, 0x68
    mov gs, ax
    expect_fault three
at_readonly:
    mov [gs:0], eax
three:
    xor eax, eax
    mov es, ax
    expect_fault four
at_null:
    mov ebx, [es:DATA]
four:
    done
""",
        start="protected32",
        memory={0x60FFC: b"\x55"},
        faults=tuple(Fault(13, 0, rip=f"at_{name}") for name in ("limit", "write", "readonly", "null")),
    ),
)
