"""Ports and memory-mapped registers in all sizes and instruction shapes, ROM, DMA."""

from __future__ import annotations

from cardcage.testing.conformance import Program

ROM_BYTES = bytes((at & 0xFF) ^ 0x5A for at in range(16))

PROGRAMS = (
    Program(
        "port-sizes",
        "IN and OUT of 1, 2 and 4 bytes reach the machine with size and value, and IN keeps the rest of RAX",
        """
    mov rax, 0x1122334455667788
    out 0x10, al
    out 0x12, ax
    out 0x14, eax
    mov dx, 0x1234
    out dx, al
    mov dx, 0xFFF0
    out dx, ax
    in al, 0x21
    mov r8, rax
    in ax, 0x22
    mov r9, rax
    in eax, 0x24
    mov r10, rax
    mov dx, 0x1234
    in al, dx
    mov r11, rax
    done
""",
        answers={0x21: 0xAA, 0x22: 0xBBCC, 0x24: 0xDDEEFF00},
        registers={"r8": 0x11223344556677AA, "r9": 0x112233445566BBCC, "r10": 0xDDEEFF00, "r11": 0xDDEEFF88},
        accesses=(
            ("out", 0x10, 1, 0x88),
            ("out", 0x12, 2, 0x7788),
            ("out", 0x14, 4, 0x55667788),
            ("out", 0x1234, 1, 0x88),
            ("out", 0xFFF0, 2, 0x7788),
            ("in", 0x21, 1, 0xAA),
            ("in", 0x22, 2, 0xBBCC),
            ("in", 0x24, 4, 0xDDEEFF00),
            ("in", 0x1234, 1, 0x88),
        ),
    ),
    Program(
        "mmio-from-device-to-device",
        "PUSH and MOVS whose operands are both registers of devices read the one and write the other",
        """
    mov ebx, MMIO
    mov r8, rsp
    lea rsp, [rbx + 0x108]
    push qword [rbx + 8]
    mov rsp, r8
    lea rsi, [rbx + 0x10]
    lea rdi, [rbx + 0x200]
    movsd
    mov rax, rdi
    sub rax, rbx
    done
""",
        registers={"rax": 0x204},
        accesses=(
            ("read", 0xD0000008, 8, 0x0F0E0D0C0B0A0908),
            ("write", 0xD0000100, 8, 0x0F0E0D0C0B0A0908),
            ("read", 0xD0000010, 4, 0x13121110),
            ("write", 0xD0000200, 4, 0x13121110),
        ),
    ),
    Program(
        "mmio-moves",
        "Moves of 1, 2, 4 and 8 bytes, with zero and sign extension and immediates, reach the device whole",
        """
    mov ebx, MMIO
    mov rax, 0x1122334455667788
    mov [rbx], al
    mov [rbx + 2], ax
    mov [rbx + 4], eax
    mov [rbx + 8], rax
    mov byte [rbx + 0x10], 0x9A
    mov dword [rbx + 0x14], 0x12345678
    mov qword [rbx + 0x18], -2
    mov r8, [rbx + 8]
    mov r9d, [rbx + 4]
    movzx r10, word [rbx + 2]
    movsx r11, byte [rbx + 0x10]
    movsxd r12, dword [rbx + 0x18]
    movzx r13d, byte [rbx + 0x40]
    done
""",
        registers={
            "r8": 0x1122334455667788,
            "r9": 0x55667788,
            "r10": 0x7788,
            "r11": 0xFFFFFFFFFFFFFF9A,
            "r12": 0xFFFFFFFFFFFFFFFE,
            "r13": 0x40,
        },
        accesses=(
            ("write", 0xD0000000, 1, 0x88),
            ("write", 0xD0000002, 2, 0x7788),
            ("write", 0xD0000004, 4, 0x55667788),
            ("write", 0xD0000008, 8, 0x1122334455667788),
            ("write", 0xD0000010, 1, 0x9A),
            ("write", 0xD0000014, 4, 0x12345678),
            ("write", 0xD0000018, 8, (1 << 64) - 2),
            ("read", 0xD0000008, 8, 0x1122334455667788),
            ("read", 0xD0000004, 4, 0x55667788),
            ("read", 0xD0000002, 2, 0x7788),
            ("read", 0xD0000010, 1, 0x9A),
            ("read", 0xD0000018, 4, 0xFFFFFFFE),
            ("read", 0xD0000040, 1, 0x40),
        ),
    ),
    Program(
        "mmio-read-modify-write",
        "ADD, OR, INC, XCHG, XADD, CMPXCHG, PUSH and POP on a device read and write it once each, in order",
        """
    mov ebx, MMIO
    mov dword [rbx], 5
    add dword [rbx], 7
    or byte [rbx + 4], 0x80
    inc word [rbx + 8]
    mov eax, 0x77
    xchg [rbx + 12], eax
    mov r8, rax
    mov ecx, 2
    xadd [rbx + 16], ecx
    mov eax, 0x17161514
    mov edx, 0xABCD
    cmpxchg [rbx + 20], edx
    setz r9b
    movzx r9, r9b
    push qword [rbx + 24]
    pop r10
    push 0x4321
    pop qword [rbx + 32]
    cmp byte [rbx], 12
    setz r11b
    movzx r11, r11b
    test dword [rbx], 8
    done
""",
        registers={"r8": 0x0F0E0D0C, "rcx": 0x13121110, "r9": 1, "r10": 0x1F1E1D1C1B1A1918, "r11": 1},
        accesses=(
            ("write", 0xD0000000, 4, 5),
            ("read", 0xD0000000, 4, 5),
            ("write", 0xD0000000, 4, 12),
            ("read", 0xD0000004, 1, 4),
            ("write", 0xD0000004, 1, 0x84),
            ("read", 0xD0000008, 2, 0x0908),
            ("write", 0xD0000008, 2, 0x0909),
            ("read", 0xD000000C, 4, 0x0F0E0D0C),
            ("write", 0xD000000C, 4, 0x77),
            ("read", 0xD0000010, 4, 0x13121110),
            ("write", 0xD0000010, 4, 0x13121112),
            ("read", 0xD0000014, 4, 0x17161514),
            ("write", 0xD0000014, 4, 0xABCD),
            ("read", 0xD0000018, 8, 0x1F1E1D1C1B1A1918),
            ("write", 0xD0000020, 8, 0x4321),
            ("read", 0xD0000000, 1, 12),
            ("read", 0xD0000000, 4, 12),
        ),
    ),
    Program(
        "mmio-strings",
        "REP MOVS to and from a device and REP STOS access it element by element, in order",
        """
    mov rax, 0x0807060504030201
    mov [abs DATA], rax
    mov esi, DATA
    mov edi, MMIO
    mov ecx, 2
    rep movsd
    mov esi, MMIO + 0x10
    mov edi, DATA + 0x10
    mov ecx, 3
    rep movsw
    mov edi, MMIO + 0x20
    mov al, 0x33
    mov ecx, 3
    rep stosb
    mov esi, MMIO + 0x40
    lodsd
    done
""",
        registers={"rcx": 0, "rsi": 0xD0000044, "rdi": 0xD0000023, "rax": 0x43424140},
        memory={0x60010: bytes([0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0, 0])},
        accesses=(
            ("write", 0xD0000000, 4, 0x04030201),
            ("write", 0xD0000004, 4, 0x08070605),
            ("read", 0xD0000010, 2, 0x1110),
            ("read", 0xD0000012, 2, 0x1312),
            ("read", 0xD0000014, 2, 0x1514),
            ("write", 0xD0000020, 1, 0x33),
            ("write", 0xD0000021, 1, 0x33),
            ("write", 0xD0000022, 1, 0x33),
            ("read", 0xD0000040, 4, 0x43424140),
        ),
    ),
    Program(
        "unclaimed-memory",
        "Reads where nothing answers give what the machine says (ones), writes reach it too",
        """
    mov ebx, 0xE0000000
    mov eax, [rbx]
    movzx ecx, byte [rbx + 5]
    mov [rbx + 8], eax
    mov rdx, [abs 0x10000000]
    done
""",
        registers={"rax": 0xFFFFFFFF, "rcx": 0xFF, "rdx": (1 << 64) - 1},
        accesses=(
            ("read", 0xE0000000, 4, 0xFFFFFFFF),
            ("read", 0xE0000005, 1, 0xFF),
            ("write", 0xE0000008, 4, 0xFFFFFFFF),
            ("read", 0x10000000, 8, (1 << 64) - 1),
        ),
    ),
    Program(
        "rom",
        "Reads and execution see ROM; writes to it go to the machine and change nothing",
        """
    mov ebx, ROM
    mov rax, [rbx]
    mov byte [rbx], 0x12
    mov [rbx + 8], eax
    mov rcx, [rbx]
    done
""",
        registers={
            "rax": int.from_bytes(ROM_BYTES[:8], "little"),
            "rcx": int.from_bytes(ROM_BYTES[:8], "little"),
        },
        memory={0xF0000: ROM_BYTES},
        accesses=(("write", 0xF0000, 1, 0x12), ("write", 0xF0008, 4, int.from_bytes(ROM_BYTES[:4], "little"))),
    ),
)
