"""Integer instructions, flags and the stack."""

from __future__ import annotations

from cardcage_conformance.conformance import Fault, Program

PROGRAMS = (
    Program(
        "add-sub-flags",
        "ADD, SUB, ADC, SBB, INC, DEC and NEG set the arithmetic flags as the manual says, INC and DEC keeping carry",
        """
    mov al, 0x7F
    add al, 1
    flags r8
    mov al, 0
    sub al, 1
    flags r9
    mov eax, 0xFFFFFFFF
    add eax, 1
    flags r10
    stc
    mov ax, 0x7FFF
    inc ax
    flags r11
    stc
    mov ecx, 0x10
    adc ecx, 0xFFFFFFFF
    flags r12
    mov rbx, 0x8000000000000000
    neg rbx
    flags r13
    clc
    mov dl, 0x80
    sbb dl, 1
    flags r14
    mov al, 0xFF
    cmp al, al
    flags r15
    done
""",
        registers={
            "r8": 0x890,
            "r9": 0x95,
            "r10": 0x55,
            "r11": 0x895,
            "rcx": 0x10,
            "r12": 0x11,
            "rbx": 1 << 63,
            "r13": 0x885,
            "r14": 0x810,
            "r15": 0x44,
        },
    ),
    Program(
        "partial-registers",
        "Writes of 8 and 16 bits keep the rest of a register, writes of 32 bits clear its upper half",
        """
    mov rax, 0x1122334455667788
    mov rbx, rax
    mov rcx, rax
    mov rdx, rax
    mov r8, rax
    mov al, 0xAA
    mov bh, 0xBB
    mov cx, 0xCCCC
    mov edx, 0xDDDDDDDD
    mov r8b, 0x5A
    mov r9, -1
    xor r9d, r9d
    mov rbp, -1
    movzx ebp, ah
    mov r11, 0x80
    movsx r11d, r11b
    mov r12d, 0x80000000
    movsxd r13, r12d
    mov r14, -1
    cmovc r14d, r12d        ; not taken: clears the upper half all the same
    done
""",
        registers={
            "rax": 0x11223344556677AA,
            "rbx": 0x112233445566BB88,
            "rcx": 0x112233445566CCCC,
            "rdx": 0xDDDDDDDD,
            "r8": 0x112233445566775A,
            "r9": 0,
            "rbp": 0x77,
            "r11": 0xFFFFFF80,
            "r13": 0xFFFFFFFF80000000,
            "r14": 0xFFFFFFFF,
        },
    ),
    Program(
        "multiply-divide",
        "MUL, IMUL, DIV and IDIV give full results in all sizes",
        """
    mov rax, 0xFFFFFFFFFFFFFFFF
    mov rcx, rax
    mul rcx
    mov r8, rax
    mov r9, rdx
    mov rax, -5
    mov rcx, 7
    imul rcx
    mov r10, rax
    mov r11, rdx
    imul r12, rcx, -3
    mov rdx, 1
    xor eax, eax
    mov rcx, 3
    div rcx
    mov r13, rax
    mov r14, rdx
    mov ax, -100
    mov cl, 7
    idiv cl
    movzx r15, ax
    mov ax, 0x1234
    mov bl, 0x10
    mul bl
    flags rbx
    and ebx, 0x801
    done
""",
        registers={
            "r8": 1,
            "r9": 0xFFFFFFFFFFFFFFFE,
            "r10": (1 << 64) - 35,
            "r11": (1 << 64) - 1,
            "r12": (1 << 64) - 21,
            "r13": 0x5555555555555555,
            "r14": 1,
            "r15": 0xFEF2,
            "rax": 0x5555555555550340,
            "rbx": 0x801,
        },
    ),
    Program(
        "shift-zero-count",
        "A shift or rotate by zero, or by a count that masks to zero, keeps every flag",
        """
    mov eax, 0x1234
    stc
    mov cl, 0
    shl eax, cl
    setc r8b
    stc
    mov cl, 32
    shr eax, cl
    setc r9b
    mov ecx, 64
    cmp ecx, ecx            ; ZF
    mov cl, 64
    sar rax, cl
    setz r10b
    stc
    mov cl, 0
    rol al, cl
    setc r11b
    stc
    mov cl, 9
    mov dl, 0x81
    rcl dl, cl              ; 9 bits around: as it was
    setc r12b
    movzx r8, r8b
    movzx r9, r9b
    movzx r10, r10b
    movzx r11, r11b
    movzx r12, r12b
    movzx rdx, dl
    done
""",
        registers={"rax": 0x1234, "r8": 1, "r9": 1, "r10": 1, "r11": 1, "r12": 1, "rdx": 0x81},
    ),
    Program(
        "shifts",
        "Shifts and rotates give results and carry, double shifts too",
        """
    mov eax, 0x80000001
    rol eax, 1
    setc r8b
    movzx r8, r8b
    mov ebx, 0x80000001
    sar ebx, 31
    mov rcx, 0x8000000000000000
    shr rcx, 63
    mov rdx, 0x123456789ABCDEF0
    mov rsi, 0xFEDCBA9876543210
    shld rdx, rsi, 12
    shrd rsi, rdx, 20
    mov r9b, 0x80
    shl r9b, 1
    setc r10b
    seto r11b
    movzx r10, r10b
    movzx r11, r11b
    clc
    mov r12d, 3
    rcr r12d, 1
    setc r13b
    movzx r13, r13b
    done
""",
        registers={
            "rax": 3,
            "r8": 1,
            "rbx": 0xFFFFFFFF,
            "rcx": 1,
            "rdx": 0x456789ABCDEF0FED,
            "rsi": 0xF0FEDFEDCBA98765,
            "r10": 1,
            "r11": 1,
            "r12": 1,
            "r13": 1,
        },
    ),
    Program(
        "bit-tests",
        "BT, BTS, BTR and BTC with a register offset reach memory outside their operand, forwards and backwards",
        """
    mov ebx, DATA + 64
    mov rcx, 200
    bts [rbx], rcx          ; byte 25, bit 0
    setc r8b
    bts qword [rbx], 200 % 64
    mov rcx, -1
    bts [rbx], rcx          ; byte -1, bit 7
    mov ecx, 200
    btr [rbx], ecx
    setc r9b
    mov cx, -16
    btc [rbx], cx           ; byte -2, bit 0
    movzx r8, r8b
    movzx r9, r9b
    mov eax, 0x100
    bt eax, 8 + 32
    setc r10b
    movzx r10, r10b
    bsf r11, rax
    bsr r12, rax
    done
""",
        registers={"r8": 0, "r9": 1, "r10": 1, "r11": 8, "r12": 8},
        memory={0x6003E: b"\x01\x80", 0x60040: b"\0\1\0\0", 0x60058: b"\0\0"},
    ),
    Program(
        "exchange",
        "XCHG, XADD, CMPXCHG and CMPXCHG8B give old values and ZF, the failing compare too",
        """
    mov ebx, DATA
    mov qword [rbx], 10
    mov rax, 5
    xchg [rbx], rax         ; rax 10, [rbx] 5
    mov rcx, 3
    lock xadd [rbx], rcx    ; rcx 5, [rbx] 8
    mov r8, rax
    mov eax, 8
    mov edx, 100
    lock cmpxchg [rbx], edx
    setz r9b
    mov r10d, [rbx]
    mov eax, 7
    lock cmpxchg [rbx], ecx
    setz r11b
    mov r12, rax
    mov dword [rbx + 8], 1
    mov dword [rbx + 12], 2
    push rbx
    mov edi, DATA + 8
    mov eax, 1
    mov edx, 2
    mov ebx, 3
    mov ecx, 4
    lock cmpxchg8b [rdi]
    setz r13b
    lock cmpxchg8b [rdi]
    setz r14b
    pop rbx
    movzx r9, r9b
    movzx r11, r11b
    movzx r13, r13b
    movzx r14, r14b
    done
""",
        registers={
            "r8": 10,
            "r9": 1,
            "r10": 100,
            "r11": 0,
            "r12": 100,
            "r13": 1,
            "r14": 0,
            "rax": 3,
            "rdx": 4,
        },
        memory={0x60008: bytes([3, 0, 0, 0, 4, 0, 0, 0])},
    ),
    Program(
        "cmpxchg16b",
        "CMPXCHG16B exchanges 16 bytes, and raises #GP when they are not aligned",
        """
    mov edi, DATA
    mov qword [rdi], 1
    mov qword [rdi + 8], 2
    mov eax, 1
    mov edx, 2
    mov ebx, 3
    mov ecx, 4
    lock cmpxchg16b [rdi]
    setz r8b
    movzx r8, r8b
    lock cmpxchg16b [rdi]
    setz r9b
    movzx r9, r9b
    expect_fault over
at_unaligned:
    lock cmpxchg16b [rdi + 8]
over:
    done
""",
        registers={"r8": 1, "r9": 0, "rax": 3, "rdx": 4},
        memory={0x60000: bytes([3, *bytes(7), 4, *bytes(7)])},
        faults=(Fault(13, 0, rip="at_unaligned"),),
        needs=("cx16",),
    ),
    Program(
        "decimal-adjust",
        "32-bit code has PUSHA, POPA, AAA, DAA, AAM, AAD, BOUND's pass, LES and INTO's pass",
        """
    mov eax, 0x0000009B
    stc
    daa
    movzx esi, al
    mov ax, 0x000F
    aaa
    movzx edi, ax
    mov ax, 99
    aam
    movzx ebp, ax
    aad
    movzx ebx, ax
    mov dword [DATA], 1
    mov dword [DATA + 4], 5
    mov ecx, 5
    bound ecx, [DATA]
    clc
    into
    mov dword [DATA + 8], 0x11223344
    mov word [DATA + 12], DS0
    les edx, [DATA + 8]
    pushad
    mov eax, esp
    popad
    done
""",
        start="protected32",
        registers={"rsi": 0x01, "rdi": 0x105, "rbp": 0x909, "rbx": 99, "rcx": 5, "rdx": 0x11223344, "rsp": 0x28000},
    ),
)
