"""String instructions: directions, counts, page crossings, faults in the middle, ports."""

from __future__ import annotations

from cardcage_conformance.conformance import Fault, Program

PROGRAMS = (
    Program(
        "rep-movs-stos",
        "REP MOVS and STOS move and fill in all widths, forwards and backwards, and leave counts and pointers right",
        """
    mov edi, DATA
    mov ecx, 16
    mov al, 0x11
    rep stosb
    mov r8, rdi
    mov ecx, 4
    mov rax, 0x2222222233333333
    rep stosq
    mov r9, rdi
    mov esi, DATA + 8
    mov edi, DATA + 0x100
    mov ecx, 5
    rep movsd
    mov r10, rsi
    mov r11, rdi
    std
    mov esi, DATA + 0x40 - 2
    mov edi, DATA + 0x240 - 2
    mov ecx, 8
    rep movsw
    mov r12, rsi
    mov r13, rdi
    cld
    mov r14, rcx
    xor eax, eax
    done
""",
        registers={
            "r8": 0x60010,
            "r9": 0x60030,
            "r10": 0x6001C,
            "r11": 0x60114,
            "r12": 0x6002E,
            "r13": 0x6022E,
            "r14": 0,
        },
        memory={
            0x60100: b"\x11" * 8 + b"\x33" * 4 + b"\x22" * 4 + b"\x33" * 4 + bytes(4),
            0x60230: bytes(16),
        },
    ),
    Program(
        "rep-overlap",
        "REP MOVSB over an overlap of one byte spreads it, as byte order demands",
        """
    mov esi, DATA
    mov byte [rsi], 0x5C
    lea rdi, [rsi + 1]
    mov ecx, 31
    rep movsb
    done
""",
        registers={"rsi": 0x6001F, "rdi": 0x60020, "rcx": 0},
        memory={0x60000: b"\x5c" * 32 + b"\0"},
    ),
    Program(
        "rep-zero-count",
        "A repeated string instruction with a zero count touches neither memory nor flags nor pointers",
        """
    xor esi, esi
    not rsi                 ; not canonical as a range: would fault
    mov rdi, 0x8000000000000000
    xor ecx, ecx
    cmp ecx, 1              ; CF, SF, AF
    flags r8
    rep movsb
    rep stosq
    repe cmpsb
    repne scasb
    rep lodsb
    flags r9
    cmp ecx, 1
    rep scasd
    rep cmpsw
    flags r10
    done
""",
        registers={"r8": 0x95, "r9": 4, "r10": 0x95, "rsi": (1 << 64) - 1, "rdi": 1 << 63, "rcx": 0},
    ),
    Program(
        "cmps-scas",
        "REPE CMPS and REPNE SCAS stop behind the deciding element with its flags",
        """
    mov edi, DATA
    mov rax, 0x0807060504030201
    mov [rdi], rax
    mov [rdi + 0x100], rax
    mov byte [rdi + 0x105], 0xFF
    mov esi, DATA
    mov edi, DATA + 0x100
    mov ecx, 8
    repe cmpsb
    flags r8
    mov r9, rcx
    mov r10, rsi
    mov edi, DATA
    mov ecx, 8
    mov al, 4
    repne scasb
    flags r11
    mov r12, rcx
    mov r13, rdi
    mov edi, DATA
    mov ecx, 2
    mov eax, 0x04030201
    repe scasd              ; the second differs
    mov r14, rcx
    setz r15b
    movzx r15, r15b
    mov esi, DATA
    lodsw
    movzx eax, ax
    done
""",
        registers={
            "r8": 0x11,
            "r9": 2,
            "r10": 0x60006,
            "r11": 0x44,
            "r12": 4,
            "r13": 0x60004,
            "r14": 0,
            "r15": 0,
            "rax": 0x0201,
        },
    ),
    Program(
        "rep-fault-midway",
        "A REP MOVSB or STOSQ that meets a page fault leaves the count and pointers of the iterations done",
        """
    mov qword [abs PTE(0x65000)], 0
    invlpg [abs 0x65000]
    mov esi, DATA
    mov edi, 0x65000 - 24
    mov ecx, 100
    expect_fault first
at_movs:
    rep movsb
first:
    mov r8, rcx
    mov r9, rsi
    mov r10, rdi
    mov edi, 0x65000 - 16
    mov ecx, 10
    mov rax, -1
    expect_fault second
at_stos:
    rep stosq
second:
    mov r11, rcx
    mov r12, rdi
    mov esi, 0x65000 - 3
    mov edi, DATA
    mov ecx, 10
    expect_fault third
at_source:
    rep movsb
third:
    done
""",
        registers={
            "r8": 76,
            "r9": 0x60018,
            "r10": 0x65000,
            "r11": 8,
            "r12": 0x65000,
            "rcx": 7,
            "rsi": 0x65000,
            "rdi": 0x60003,
        },
        faults=(
            Fault(14, 2, rip="at_movs", cr2=0x65000),
            Fault(14, 2, rip="at_stos", cr2=0x65000),
            Fault(14, 0, rip="at_source", cr2=0x65000),
        ),
    ),
    Program(
        "address-size",
        "32-bit addresses in long mode wrap at 4 GiB, for string instructions too",
        """
    mov rax, 0x1234567800000000 + DATA
    mov dword [eax], 0xCAFE
    mov rsi, 0x1111111100000000 + DATA
    mov rdi, 0x2222222200000000 + DATA + 0x40
    mov rcx, 0x3333333300000004
    a32 rep movsb
    mov r8, rcx
    mov r9, rsi
    mov r10, rdi
    mov rbx, 0xFFFFFFFF
    mov eax, [ebx + DATA + 1]
    lea r11d, [rbx + 2]
    lea r12, [ebx + 2]
    done
""",
        registers={"r8": 0, "r9": 0x60004, "r10": 0x60044, "rax": 0xCAFE, "r11": 1, "r12": 1},
        memory={0x60040: b"\xfe\xca\0\0"},
    ),
    Program(
        "string-io",
        "REP OUTS and INS move every element between memory and the port, in order",
        """
    mov esi, text
    mov ecx, 5
    mov dx, 0x100
    rep outsb
    mov r8, rsi
    sub r8, text
    mov edi, DATA
    mov ecx, 3
    mov dx, 0x200
    rep insw
    mov r9, rdi
    mov r10, rcx
    mov esi, text
    outsd
    xor ecx, ecx
    rep outsb
    done
text: db "hello world"
""",
        registers={"r8": 5, "r9": 0x60006, "r10": 0},
        memory={0x60000: b"\xcd\xab" * 3 + b"\0\0"},
        answers={0x200: 0xABCD},
        accesses=(
            *(("out", 0x100, 1, byte) for byte in b"hello"),
            *((("in", 0x200, 2, 0xABCD),) * 3),
            ("out", 0x200, 4, int.from_bytes(b"hell", "little")),
        ),
    ),
)
