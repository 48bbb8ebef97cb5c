"""Segments and descriptor tables: bases, far transfers, what may be loaded."""

from __future__ import annotations

from cardcage_conformance.conformance import Fault, Program

PROGRAMS = (
    Program(
        "swapgs-and-bases",
        "FS and GS bases come from MSRs, SWAPGS exchanges GS's with its shadow, and loading a selector sets the base",
        """
    wrmsr64 0xC0000100, DATA
    wrmsr64 0xC0000101, DATA + 0x100
    wrmsr64 0xC0000102, DATA + 0x200
    mov dword [fs:8], 1
    mov dword [gs:8], 2
    swapgs
    mov dword [gs:8], 3
    mov ecx, 0xC0000101
    rdmsr
    mov r8d, eax
    mov ecx, 0xC0000102
    rdmsr
    mov r9d, eax
    swapgs
    mov r10d, [gs:8]
    mov rbx, -8
    mov eax, [fs:rbx + 16]
    mov r11d, eax
    lea r12, [fs:rbx + 16]          ; LEA ignores segments
    mov ax, DS0
    mov fs, ax
    mov ecx, 0xC0000100
    rdmsr
    mov r13d, eax
    xor eax, eax
    done
""",
        registers={"r8": 0x60200, "r9": 0x60100, "r10": 2, "r11": 1, "r12": 8, "r13": 0},
        memory={0x60008: b"\1", 0x60108: b"\2", 0x60208: b"\3"},
    ),
    Program(
        "fsgsbase",
        "RDFSBASE and its relatives read and write bases at any ring when CR4.FSGSBASE is set, #UD otherwise",
        """
    expect_fault one
at_off:
    rdfsbase rax
one:
    mov rax, cr4
    bts rax, 16
    mov cr4, rax
    mov rax, HIGH + DATA
    wrfsbase rax
    rdfsbase r8
    mov eax, DATA + 0x40
    wrgsbase rax
    mov dword [gs:0], 5
    mov rax, 0x8000000000000000
    expect_fault two
at_bad:
    wrgsbase rax
two:
    rdgsbase r9
    done
""",
        registers={"r8": 0xFFFF800000060000, "r9": 0x60040},
        memory={0x60040: b"\5"},
        faults=(Fault(6, rip="at_off"), Fault(13, 0, rip="at_bad")),
        needs=("fsgsbase",),
        emulated="it does not heed CR4.FSGSBASE",
    ),
    Program(
        "far-transfers-64",
        "Far jumps, calls and returns change between 64-bit and compatibility segments",
        """
    mov rbx, rsp
    call dword far [abs pointer]
    mov r9, rsp
    sub r9, rbx
    push qword CS64
    push qword back
    o64 retf
back:
    mov r10, rsp
    sub r10, rbx
    mov dword [abs DATA], compat
    mov word [abs DATA + 4], CS32
    jmp dword far [abs DATA]
    bits 32
compat:
    mov esi, cs
    jmp CS64:again
    bits 64
again:
    mov edi, cs
    done
target:
    mov r8d, cs
    retf
pointer: dd target
    dw CS64
""",
        registers={"r8": 8, "r9": 0, "r10": 0, "rsi": 0x18, "rdi": 8},
    ),
    Program(
        "null-and-nested-selectors",
        "Null selectors may be loaded into data segments and not used in 32-bit code; ring checks on SS and CS hold",
        """
    xor eax, eax
    mov es, ax
    mov fs, ax
    expect_fault two
at_ss:
    mov ss, ax
two:
    mov ax, UDS
    expect_fault three
at_user_ss:
    mov ss, ax
three:
    expect_fault four
at_data:
    jmp DS0:0
four:
    expect_fault five
at_null:
    jmp 0:0x1234
five:
    mov ax, DS0
    mov es, ax
    done
""",
        start="protected32",
        faults=(
            Fault(13, 0, rip="at_ss"),
            Fault(13, 0x28, rip="at_user_ss"),
            Fault(13, 0x10, rip="at_data"),
            Fault(13, 0, rip="at_null"),
        ),
    ),
    Program(
        "task-and-table-registers",
        "LTR marks its TSS busy, STR, SLDT, SGDT and SIDT read back; a busy or wrong descriptor faults",
        """
    mov eax, TSS_SELECTOR
    str ebx
    and byte [abs GDT + TSS_SELECTOR + 5], ~2   ; available again
    ltr ax
    movzx ecx, byte [abs GDT + TSS_SELECTOR + 5]
    expect_fault one
at_busy:
    ltr ax
one:
    sgdt [abs DATA]
    sidt [abs DATA + 16]
    movzx r8, word [abs DATA]
    mov r9, [abs DATA + 2]
    movzx r10, word [abs DATA + 16]
    mov r11, [abs DATA + 18]
    xor eax, eax
    lldt ax
    sldt edx
    mov ax, DS0
    expect_fault two
at_wrong:
    lldt ax
two:
    smsw rsi
    and esi, 0x3F
    done
""",
        registers={
            "rbx": 0x48,
            "rcx": 0x8B,
            "r8": 0xFFF,
            "r9": 0x1000,
            "r10": 0xFFF,
            "r11": 0x2000,
            "rdx": 0,
            "rsi": 0x33,
        },
        faults=(Fault(13, 0x48, rip="at_busy"), Fault(13, 0x10, rip="at_wrong")),
    ),
)
