"""x87, SSE and AVX: results, state that survives exits, exceptions."""

from __future__ import annotations

from cardcage_conformance.conformance import Fault, Program

PROGRAMS = (
    Program(
        "sse-moves-across-exits",
        "XMM registers keep all their bits while the machine serves ports and memory accesses",
        """
    mov ecx, 64
    lea rdi, [abs DATA]
    mov eax, 0x5A
fill:
    mov [rdi + rcx * 4 - 4], eax
    imul eax, eax, 0x01000193
    add eax, ecx
    dec ecx
    jnz fill
%assign at 0
%rep 16
    movdqu xmm %+ at, [rdi + at * 16]
    %assign at at + 1
%endrep
    out 0x10, al
    in al, 0x11
    mov ebx, MMIO
    mov eax, [rbx]
    mov [rbx], eax
%assign at 0
%rep 16
    movdqu [rdi + 0x200 + at * 16], xmm %+ at
    %assign at at + 1
%endrep
    mov ecx, 32
    mov esi, DATA
    lea rdi, [abs DATA + 0x200]
    repe cmpsq
    setz al
    movzx eax, al
    done
""",
        registers={"rax": 1, "rcx": 0},
    ),
    Program(
        "sse-arithmetic",
        "Scalar and packed SSE2 arithmetic, conversions, compares and shuffles give IEEE results",
        """
    mov eax, 3
    cvtsi2sd xmm0, eax
    mov eax, 7
    cvtsi2sd xmm1, rax
    movapd xmm2, xmm0
    divsd xmm2, xmm1
    movq r8, xmm2                   ; 3/7
    sqrtsd xmm3, xmm1
    movq r9, xmm3
    cvttsd2si r10, xmm3
    cvtsd2si r11d, xmm3             ; 2.6: to nearest
    ucomisd xmm0, xmm1
    flags r12
    movd xmm4, eax
    pshufd xmm4, xmm4, 0
    paddd xmm4, xmm4
    movq r13, xmm4
    pxor xmm5, xmm5
    divsd xmm5, xmm5
    ucomisd xmm5, xmm5
    flags r14
    mulpd xmm0, xmm0
    addsd xmm0, xmm1
    cvtsd2ss xmm6, xmm0
    movd r15d, xmm6
    done
""",
        registers={
            "r8": 0x3FDB6DB6DB6DB6DB,
            "r9": 0x40052A7FA9D2F8EA,
            "r10": 2,
            "r11": 3,
            "r12": 0x01,
            "r13": 0xE0000000E,
            "r14": 0x45,
            "r15": 0x41800000,
        },
    ),
    Program(
        "mxcsr",
        "MXCSR's rounding, flush-to-zero and sticky flags are the guest's own, across exits too",
        """
    mov dword [abs DATA], 0x7F80            ; round towards zero
    ldmxcsr [abs DATA]
    mov dword [abs DATA + 4], 0x40066666    ; 2.1
    cvtss2si eax, [abs DATA + 4]
    mov r8d, eax
    mov dword [abs DATA + 8], 0x402CCCCD    ; 2.7
    cvtss2si eax, [abs DATA + 8]
    mov r9d, eax
    out 0x10, al
    mov dword [abs DATA], 0x5F80            ; round up
    ldmxcsr [abs DATA]
    cvtss2si eax, [abs DATA + 4]
    mov r10d, eax
    out 0x10, al
    stmxcsr [abs DATA + 12]
    mov r11d, [abs DATA + 12]
    mov dword [abs DATA], 0x10000           ; a reserved bit
    expect_fault over
at_reserved:
    ldmxcsr [abs DATA]
over:
    xor eax, eax
    done
""",
        registers={"r8": 2, "r9": 2, "r10": 3, "r11": 0x5FA0},
        faults=(Fault(13, 0, rip="at_reserved"),),
    ),
    Program(
        "x87-arithmetic",
        "The x87 stack computes with 80 bits, and keeps registers, status and control across exits",
        """
    fninit
    fld1
    fldpi
    fmul st0, st1
    out 0x10, al
    fld1
    fadd st0, st0
    fdivr st1, st0                          ; st1 = 2 / pi
    fnstsw ax
    mov r8d, eax
    and r8d, 0x3800                         ; three registers in use
    fstp qword [abs DATA]
    fstp tword [abs DATA + 16]
    fstp st0
    fld tword [abs DATA + 16]
    fistp dword [abs DATA + 32]
    mov r9, [abs DATA]
    mov r10, [abs DATA + 16]
    movzx r11, word [abs DATA + 24]
    mov r12d, [abs DATA + 32]
    fnstcw [abs DATA + 40]
    movzx r13, word [abs DATA + 40]
    fild qword [abs DATA + 16]              ; 64 bits exactly
    fistp qword [abs DATA + 48]
    mov r14, [abs DATA + 48]
    xor r14, r10
    xor eax, eax
    done
""",
        registers={
            "r8": 0x2800,
            "r9": 0x4000000000000000,
            "r10": 0xA2F9836E4E44152A,
            "r11": 0x3FFE,
            "r12": 1,
            "r13": 0x37F,
            "r14": 0,
        },
    ),
    Program(
        "device-not-available",
        "CR0.TS makes x87 and SSE instructions raise #NM until CLTS; CR0.EM makes SSE raise #UD",
        """
    fninit
    mov rax, cr0
    bts rax, 3
    mov cr0, rax
    expect_fault one
at_x87:
    fld1
one:
    expect_fault two
at_sse:
    movups xmm0, [abs DATA]
two:
    clts
    movups xmm0, [abs DATA]
    fld1
    fstp st0
    mov rax, cr0
    bts rax, 2
    btr rax, 1
    mov cr0, rax
    expect_fault three
at_emulated:
    movups xmm0, [abs DATA]
three:
    expect_fault four
at_x87_again:
    fld1
four:
    mov rax, cr0
    btr rax, 2
    bts rax, 1
    mov cr0, rax
    mov rax, cr4
    btr rax, 9
    mov cr4, rax
    expect_fault five
at_no_osfxsr:
    movups xmm0, [abs DATA]
five:
    xor eax, eax
    done
""",
        faults=(
            Fault(7, rip="at_x87"),
            Fault(7, rip="at_sse"),
            Fault(6, rip="at_emulated"),
            Fault(7, rip="at_x87_again"),
            Fault(6, rip="at_no_osfxsr"),
        ),
    ),
    Program(
        "float-exceptions",
        "Unmasked SSE exceptions raise #XM at the instruction, x87 ones #MF at the next waiting one",
        """
    mov dword [abs DATA], 0x1F80 & ~0x200   ; division by zero unmasked
    ldmxcsr [abs DATA]
    mov eax, 1
    cvtsi2sd xmm0, eax
    pxor xmm1, xmm1
    expect_fault one
at_sse:
    divsd xmm0, xmm1
one:
    movq r8, xmm0                           ; unchanged
    mov word [abs DATA], 0x37F & ~4
    fninit
    fldcw [abs DATA]
    fld1
    fldz
    fdivp st1, st0
    mov ebx, 1
    expect_fault two
at_wait:
    fwait
two:
    fnstsw ax
    and eax, 0x84
    fnclex
    fwait
    done
""",
        registers={"r8": 0x3FF0000000000000, "rax": 0x84, "rbx": 1},
        faults=(Fault(19, rip="at_sse"), Fault(16, rip="at_wait")),
    ),
    Program(
        "misaligned-sse",
        "MOVAPS and memory operands of SSE arithmetic demand 16-byte alignment, MOVUPS and scalars do not",
        """
    movups xmm0, [abs DATA + 1]
    movups [abs DATA + 0x21], xmm0
    expect_fault one
at_load:
    movaps xmm1, [abs DATA + 8]
one:
    expect_fault two
at_store:
    movdqa [abs DATA + 4], xmm0
two:
    movsd xmm2, [abs DATA + 3]
    expect_fault three
at_operand:
    paddd xmm0, [abs DATA + 8]
three:
    done
""",
        faults=tuple(Fault(13, 0, rip=f"at_{name}") for name in ("load", "store", "operand")),
    ),
    Program(
        "fxsave-fxrstor",
        "FXSAVE stores x87, MMX and SSE state in its layout, FXRSTOR brings it back, and unaligned areas raise #GP",
        """
    fninit
    fld1
    fldpi
    mov rax, 0x1122334455667788
    movq xmm7, rax
    movq xmm15, rax
    mov dword [abs DATA], 0x3F80
    ldmxcsr [abs DATA]
    fxsave64 [abs DATA + 0x100]
    fninit
    pxor xmm7, xmm7
    pxor xmm15, xmm15
    mov dword [abs DATA], 0x1F80
    ldmxcsr [abs DATA]
    fxrstor64 [abs DATA + 0x100]
    movq r8, xmm7
    movq r9, xmm15
    stmxcsr [abs DATA]
    mov r10d, [abs DATA]
    fstp tword [abs DATA + 16]
    mov r11, [abs DATA + 16]
    movzx r12, byte [abs DATA + 0x104]      ; abridged tag: two in use
    mov r13d, [abs DATA + 0x118]
    expect_fault over
at_unaligned:
    fxsave [abs DATA + 0x108]
over:
    xor eax, eax
    done
""",
        registers={
            "r8": 0x1122334455667788,
            "r9": 0x1122334455667788,
            "r10": 0x3F80,
            "r11": 0xC90FDAA22168C235,
            "r12": 0xC0,
            "r13": 0x3F80,
        },
        faults=(Fault(13, 0, rip="at_unaligned"),),
    ),
    Program(
        "avx-across-exits",
        "With XCR0's AVX bit, YMM registers hold 256 bits across exits, and legacy SSE keeps their upper halves",
        """
    expect_fault one
at_off:
    vzeroupper
one:
    mov rax, cr4
    bts rax, 18
    mov cr4, rax
    xor ecx, ecx
    mov eax, 7
    xor edx, edx
    xsetbv
    xor ecx, ecx
    xgetbv
    mov r8d, eax
    mov ecx, 8
    mov esi, DATA
fill:
    mov [rsi + rcx * 4 - 4], ecx
    dec ecx
    jnz fill
    vmovdqu ymm3, [rsi]
    out 0x10, al
    vmovdqu [rsi + 0x40], ymm3
    mov r9, [rsi + 0x58]
    pxor xmm3, xmm3                         ; legacy: bits 128 up stay
    vmovdqu [rsi + 0x80], ymm3
    mov r10, [rsi + 0x80]
    mov r11, [rsi + 0x98]
    vpxor xmm3, xmm3, xmm3                  ; VEX: cleared
    vmovdqu [rsi + 0xC0], ymm3
    mov r12, [rsi + 0xD8]
    vpaddd xmm4, xmm4, xmm4
    mov ecx, 1
    expect_fault two
at_xsetbv:
    xsetbv
two:
    xor eax, eax
    xor edx, edx
    done
""",
        registers={"r8": 7, "r9": 0x800000007, "r10": 0, "r11": 0x800000007, "r12": 0},
        faults=(Fault(6, rip="at_off"), Fault(13, 0, rip="at_xsetbv")),
        needs=("avx", "xsave"),
    ),
    Program(
        "xsave-xrstor",
        "XSAVE writes enabled components and a header, XRSTOR restores them and initialises what the header leaves out",
        """
    mov rax, cr4
    bts rax, 18
    mov cr4, rax
    xor ecx, ecx
    mov eax, 3
    xor edx, edx
    xsetbv
    mov rbx, 0x0123456789ABCDEF
    movq xmm5, rbx
    fninit
    fld1
    mov eax, 7
    xor edx, edx
    xsave64 [abs DATA + 0x100]
    mov r8, [abs DATA + 0x300]              ; XSTATE_BV
    and r8, 3
    pxor xmm5, xmm5
    fninit
    mov eax, 3
    xrstor64 [abs DATA + 0x100]
    movq r9, xmm5
    fnstsw ax
    mov r10d, eax
    and r10d, 0x3800
    mov qword [abs DATA + 0x300], 1         ; SSE left out: to be initialised
    mov eax, 3
    xor edx, edx
    xrstor64 [abs DATA + 0x100]
    movq r11, xmm5
    xor eax, eax
    done
""",
        registers={"r8": 3, "r9": 0x0123456789ABCDEF, "r10": 0x3800, "r11": 0},
        needs=("xsave",),
    ),
    Program(
        "sse4-and-popcnt",
        "SSSE3, SSE4 and POPCNT instructions of x86-64-v2 give their results",
        """
    mov eax, 0xFFFFFFFF
    mov ecx, 0x12345678
    crc32 eax, ecx
    mov r8d, eax
    popcnt r9, rcx
    mov rax, 0x0706050403020100
    movq xmm0, rax
    mov rax, 0x8001020304050607
    movq xmm1, rax
    pshufb xmm0, xmm1
    movq r10, xmm0
    mov eax, 0x55AA
    pinsrd xmm2, eax, 3
    pextrd r11d, xmm2, 3
    pcmpeqb xmm3, xmm3
    ptest xmm3, xmm3
    flags r12
    movmskpd r13d, xmm3
    pabsb xmm4, xmm3
    movq r14, xmm4
    xor eax, eax
    done
""",
        registers={
            "r8": 0x4DECE20C,
            "r9": 13,
            "r10": 0x0001020304050607,
            "r11": 0x55AA,
            "r12": 0x01,
            "r13": 3,
            "r14": 0x0101010101010101,
        },
        needs=("sse4_2", "popcnt", "ssse3"),
    ),
    Program(
        "mmx",
        "MMX registers alias the x87 stack, and EMMS frees it",
        """
    fninit
    mov eax, 0x01020304
    movd mm0, eax
    movq mm1, mm0
    paddb mm1, mm0
    movd r8d, mm1
    fnstenv [abs DATA]
    movzx r9, word [abs DATA + 8]           ; tag word: all valid
    emms
    fnstenv [abs DATA]
    movzx r10, word [abs DATA + 8]
    fninit
    fld1
    movq r11, mm7                           ; significand of 1.0
    emms
    xor eax, eax
    done
""",
        registers={"r8": 0x02040608, "r10": 0xFFFF, "r11": 1 << 63},
    ),
    Program(
        "sse-mmio",
        "A 16-byte SSE access to a device arrives as two of 8 bytes, lower one first",
        """
    mov ebx, MMIO
    movdqu xmm0, [rbx + 0x20]
    movdqu [rbx + 0x40], xmm0
    movdqu [abs DATA], xmm0
    mov r8, [abs DATA]
    done
""",
        registers={"r8": 0x2726252423222120},
        accesses=(
            ("read", 0xD0000020, 8, 0x2726252423222120),
            ("read", 0xD0000028, 8, 0x2F2E2D2C2B2A2928),
            ("write", 0xD0000040, 8, 0x2726252423222120),
            ("write", 0xD0000048, 8, 0x2F2E2D2C2B2A2928),
        ),
    ),
)
