"""CPUID, the stack, calls, and instructions about flags."""

from __future__ import annotations

from cardcage_conformance.conformance import Program

PROGRAMS = (
    Program(
        "cpuid-dump",
        "CPUID answers the leaves that the harness asks features from",
        """
    mov r8d, DATA
%macro leaf 1
    mov eax, %1
    xor ecx, ecx
    cpuid
    mov [r8], eax
    mov [r8 + 4], ebx
    mov [r8 + 8], ecx
    mov [r8 + 12], edx
    add r8, 16
%endmacro
    leaf 1
    leaf 7
    leaf 0x80000001
    leaf 0xD
    done
""",
        registers={"r8": 0x60040},
    ),
    Program(
        "cpuid-sane",
        "CPUID gives leaf counts, a vendor string and long mode, and writes zero-extended registers",
        """
    mov rax, -1
    mov rcx, -1
    xor eax, eax
    cpuid
    xor r8d, r8d
    cmp rax, 1
    setae r8b
    mov r9, rbx
    or r9, rcx
    or r9, rdx
    shr r9, 32
    mov eax, 0x80000000
    cpuid
    mov r10, rax
    shr r10, 16
    mov eax, 0x80000001
    cpuid
    bt edx, 29
    setc r11b
    movzx r11, r11b
    mov eax, 1
    xor ecx, ecx
    cpuid
    shr ebx, 24
    mov r12, rbx
    xor eax, eax
    xor ebx, ebx
    xor ecx, ecx
    xor edx, edx
    done
""",
        registers={"r8": 1, "r9": 0, "r10": 0x8000, "r11": 1, "r12": 0},
    ),
    Program(
        "stack-and-calls",
        "PUSH, POP, CALL, RET n, LEAVE and ENTER move RSP right, POP RSP and PUSH RSP included",
        """
    mov rbx, rsp
    push rsp
    pop r8
    sub r8, rbx
    push 0x1234
    push word 0x5678
    mov r9, rbx
    sub r9, rsp
    pop ax
    pop rcx
    push -1
    pop rdx
    push 7
    push 8
    call function
    mov r10, rbx
    sub r10, rsp
    mov rbp, 0x77
    enter 32, 0
    mov r11, rbx
    sub r11, rsp
    leave
    mov r12, rbp
    mov qword [abs DATA], target
    call [abs DATA]
    push DATA + 0x100
    pop rsp
    mov r14, rsp
    mov rsp, rbx
    movzx eax, ax
    done
function:
    mov r13, [rsp + 8]
    ret 16
target:
    mov r15d, 99
    ret
""",
        registers={
            "r8": 0,
            "r9": 10,
            "rax": 0x5678,
            "rcx": 0x1234,
            "rdx": (1 << 64) - 1,
            "r10": 0,
            "r11": 40,
            "r12": 0x77,
            "r13": 8,
            "r14": 0x60100,
            "r15": 99,
        },
    ),
    Program(
        "flag-instructions",
        "LAHF, SAHF, CMC, STD, CLD, PUSHF and POPF carry exactly their flags; reserved ones read as fixed",
        """
    mov ah, 0xFF
    sahf
    lahf
    movzx esi, ah
    mov ah, 0
    sahf
    lahf
    movzx ebp, ah
    stc
    cmc
    setc r10b
    movzx r10, r10b
    std
    pushfq
    pop r11
    cld
    mov eax, 0x240FD7 & ~0x300
    push rax
    popfq
    pushfq
    pop r12
    push 2
    popfq
    pushfq
    pop r13
    xor eax, eax
    done
""",
        registers={
            "rsi": 0xD7,
            "rbp": 0x02,
            "r10": 0,
            "r11": 0x402,
            "r12": 0x240CD7,
            "r13": 2,
        },
    ),
)
