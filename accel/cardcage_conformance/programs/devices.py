"""Ports and memory-mapped registers in all sizes and instruction shapes, ROM, DMA."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage_conformance.conformance import Program

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage_conformance.lab import Lab


def _made(*wanted: tuple[str, int, int, int | str]) -> Callable[[Lab], list[str]]:
    """A check of all accesses, whose values may be labels."""

    def check(lab: Lab) -> list[str]:
        expected = [(*one[:3], lab.code.labels[one[3]] if isinstance(one[3], str) else one[3]) for one in wanted]
        return [] if lab.accesses == expected else [f"accesses are {lab.accesses}, expected {expected}"]

    return check


def _forms_32(lab: Lab) -> list[str]:
    made = [one[:3] for one in lab.accesses]
    top = 0xD0000100
    wanted = [
        *(("write", top - 4 - 4 * at, 4) for at in range(8)),
        *(("read", top - 32 + 4 * at, 4) for at in range(8) if at != 3),  # ESP's is passed over
        *(("write", 0xD0000000 + at, 4) for at in (0, 4)),
        *(("read", 0xD0000000 + at, 4) for at in (0, 4)),
        *(("read", 0xD0000008, 2), ("write", 0xD0000008, 2)),
        *(("write", 0xD0000010, 4), ("write", 0xD0000014, 2), ("read", 0xD0000010, 4), ("read", 0xD0000014, 2)),
    ]
    found = [] if made == wanted else [f"accesses are {made}"]
    pushed = lab.accesses[0][3]
    return found if pushed & 0xFF == 0xFF else [*found, f"AL after SALC is {pushed & 0xFF:#x}"]


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
        "mmio-strings-compared",
        "REPE CMPS and REPNE SCAS over a device read each element once, up to the one that ends them",
        """
    mov dword [abs DATA], 0x13121110
    mov dword [abs DATA + 4], 0x17160014
    mov esi, MMIO + 0x10
    mov edi, DATA
    mov ecx, 8
    repe cmpsb
    flags r8
    mov edi, MMIO + 0x20
    mov eax, 0x2726
    mov ecx, 5
    repne scasw
    flags r9
    mov r10d, edi
    mov r11d, ecx
    mov esi, MMIO + 0x30
    mov edi, MMIO + 0x40
    cmpsd
    done
""",
        registers={"r8": 0x0, "r9": 0x44, "r10": 0xD0000028, "r11": 1, "rsi": 0xD0000034, "rdi": 0xD0000044},
        accesses=(
            *(("read", 0xD0000010 + at, 1, 0x10 + at) for at in range(6)),
            *(("read", 0xD0000020 + at, 2, 0x2120 + at * 0x101) for at in range(0, 8, 2)),
            ("read", 0xD0000030, 4, 0x33323130),
            ("read", 0xD0000040, 4, 0x43424140),
        ),
    ),
    Program(
        "mmio-system-operands",
        "System instructions, XLAT and far jumps read and write a device's operand once, in its size",
        """
    mov ebx, MMIO
    smsw [rbx]
    sldt [rbx + 2]
    sgdt [rbx + 0x10]
    lgdt [rbx + 0x10]
    mov word [rbx + 0x20], DS0
    lar eax, [rbx + 0x20]
    verr [rbx + 0x20]
    mov ds, [rbx + 0x20]
    mov [rbx + 0x22], fs
    mov eax, 3
    xlatb
    mov dword [rbx + 0x30], at_target
    mov word [rbx + 0x34], CS64
    db 0xFF, 0x6B, 0x30                 ; jmp far [rbx + 0x30]
    failed
at_target:
    done
""",
        check=_made(
            ("write", 0xD0000000, 2, 0x33),
            ("write", 0xD0000002, 2, 0),
            ("write", 0xD0000010, 2, 0xFFF),
            ("write", 0xD0000012, 8, 0x1000),
            ("read", 0xD0000010, 2, 0xFFF),
            ("read", 0xD0000012, 8, 0x1000),
            ("write", 0xD0000020, 2, 0x10),
            ("read", 0xD0000020, 2, 0x10),
            ("read", 0xD0000020, 2, 0x10),
            ("read", 0xD0000020, 2, 0x10),
            ("write", 0xD0000022, 2, 0x10),
            ("read", 0xD0000003, 1, 0),
            ("write", 0xD0000030, 4, "at_target"),
            ("write", 0xD0000034, 2, 8),
            ("read", 0xD0000030, 4, "at_target"),
            ("read", 0xD0000034, 2, 8),
        ),
        emulated="its emulator reads what SLDT writes",
    ),
    Program(
        "mmio-stack",
        "PUSHF, POPF, ENTER, LEAVE, far calls, far returns and IRET work on a stack that is a device's",
        """
    mov esp, MMIO + 0x100
    pushfq
    popfq
    enter 8, 0
    leave
    db 0x48, 0xFF, 0x1C, 0x25           ; call far [pointer], 64 bits each
    dd pointer
at_returned:
    push DS0
    push 0x28000
    push 0x2
    push CS64
    push at_back
    iretq
at_called:
    retfq
pointer: dq at_called
    dw CS64
at_back:
    mov rax, rsp
    done
""",
        registers={"rax": 0x28000},
        check=_made(
            ("write", 0xD00000F8, 8, 2),
            ("read", 0xD00000F8, 8, 2),
            ("write", 0xD00000F8, 8, 0),
            ("read", 0xD00000F8, 8, 0),
            ("write", 0xD00000F8, 8, 8),
            ("write", 0xD00000F0, 8, "at_returned"),
            ("read", 0xD00000F0, 8, "at_returned"),
            ("read", 0xD00000F8, 8, 8),
            ("write", 0xD00000F8, 8, 0x10),
            ("write", 0xD00000F0, 8, 0x28000),
            ("write", 0xD00000E8, 8, 2),
            ("write", 0xD00000E0, 8, 8),
            ("write", 0xD00000D8, 8, "at_back"),
            ("read", 0xD00000D8, 8, "at_back"),
            ("read", 0xD00000E0, 8, 8),
            ("read", 0xD00000E8, 8, 2),
            ("read", 0xD00000F0, 8, 0x28000),
            ("read", 0xD00000F8, 8, 0x10),
        ),
        emulated="its emulator takes 32 bits in a far call",
    ),
    Program(
        "mmio-32-bit-forms",
        "PUSHAD, POPAD, BOUND, ARPL, LES and SALC in 32-bit code, with a device as stack and operand",
        """
    mov ebx, MMIO
    mov ebp, esp
    lea esp, [ebx + 0x100]
    stc
    db 0xD6                             ; salc
    mov ecx, 0x11
    pushad
    xor ecx, ecx
    popad
    mov esp, ebp
    mov dword [ebx], 1
    mov dword [ebx + 4], 0x20
    bound ecx, [ebx]
    mov eax, 3
    arpl [ebx + 8], ax
    mov dword [ebx + 0x10], 0x12345678
    mov word [ebx + 0x14], DS0
    les edx, [ebx + 0x10]
    done
""",
        start="protected32",
        registers={"rcx": 0x11, "rdx": 0x12345678, "rax": 3},
        check=_forms_32,
        emulated="its emulator does not know BOUND and ARPL",
    ),
    Program(
        "mmio-page-ends",
        "An operand that is partly RAM's and partly a device's is read and written where each part is",
        """
    mov rax, MMIO + 3                   ; present, writable
    mov [abs PTE(0x66000)], rax
    invlpg [abs 0x66000]
    mov rax, 0x1122334455667788
    mov [abs 0x65FFC], rax
    mov rcx, [abs 0x65FFD]
    add dword [abs 0x65FFE], 0x01010101
    push qword [abs 0x65FFA]
    pop rdx
    done
""",
        registers={"rcx": 0x0411223344556677, "rdx": 0x3445566777880000},
        memory={0x65FFC: bytes([0x88, 0x77, 0x67, 0x56])},
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
