"""Faults that leave everything as it was: registers, flags, memory, and where they are reported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage_conformance.conformance import Fault, Program

if TYPE_CHECKING:
    from cardcage_conformance.lab import Lab


def _flags_at_faults(lab: Lab) -> list[str]:
    wanted = (0x845, 0x1, 0x90)
    have = tuple(record[4] & 0x8D5 for record in lab.faults())
    return [] if have == wanted else [f"flags saved at the faults are {[hex(one) for one in have]}"]


def _interrupt_soon(lab: Lab, value: int) -> None:
    lab.raise_extint(value)


PROGRAMS = (
    Program(
        "flags-at-a-fault",
        "The flags that a fault saves, where code reads them later, are those of the last instruction that set them",
        """
    mov edx, 0x65000
    mov qword [abs PTE(0x65000)], 0
    invlpg [rdx]
    expect_fault one
    mov rcx, 0x8000000000000000
    add rcx, rcx                        ; OF, ZF, PF, CF
at_one:
    mov eax, [rdx]
    pushfq
one:
    expect_fault two
    xor ebx, ebx
    inc ebx
    stc
at_two:
    mov [rdx], eax
    pushfq
two:
    expect_fault three
    mov ebx, 0x10
    sub bl, 0x1F
    and ebx, 0xF1
    sub bl, 2
    clc
    lea rcx, [rdx + 8]
at_three:
    xchg [rdx], eax
    pushfq
three:
    done
""",
        faults=(
            Fault(14, 0, rip="at_one", cr2=0x65000),
            Fault(14, 2, rip="at_two", cr2=0x65000),
            Fault(14, 2, rip="at_three", cr2=0x65000),
        ),
        check=_flags_at_faults,
    ),
    Program(
        "stack-faults",
        "PUSH, CALL, POP, RET, LEAVE and ENTER that fault leave RSP, RBP and memory as they were",
        """
    mov byte [abs IDT + 14 * 16 + 4], 1     ; page faults on the stack IST1
    mov qword [abs PTE(0x65000)], 0
    invlpg [abs 0x65000]
    mov rsp, 0x66000
    expect_fault one
at_push:
    push rax
one:
    mov r8, rsp
    expect_fault two
at_call:
    call two
two:
    mov r9, rsp
    mov rsp, 0x65FF8
    expect_fault three
at_pop:
    pop rbx
three:
    mov r10, rsp
    expect_fault four
at_ret:
    ret
four:
    mov r11, rsp
    mov rsp, 0x64000
    mov rbp, 0x65800
    expect_fault five
at_leave:
    leave
five:
    mov r12, rsp
    mov r13, rbp
    mov rsp, 0x66000
    expect_fault six
at_enter:
    enter 16, 0
six:
    mov r14, rsp
    mov r15, rbp
    mov rsp, 0x28000
    done
""",
        registers={
            "r8": 0x66000,
            "r9": 0x66000,
            "r10": 0x65FF8,
            "r11": 0x65FF8,
            "r12": 0x64000,
            "r13": 0x65800,
            "r14": 0x66000,
            "r15": 0x65800,
            "rbx": 0,
        },
        faults=(
            Fault(14, 2, rip="at_push", cr2=0x65FF8),
            Fault(14, 2, rip="at_call", cr2=0x65FF8),
            Fault(14, 0, rip="at_pop", cr2=0x65FF8),
            Fault(14, 0, rip="at_ret", cr2=0x65FF8),
            Fault(14, 0, rip="at_leave", cr2=0x65800),
            Fault(14, 2, rip="at_enter", cr2=0x65FF8),
        ),
    ),
    Program(
        "memory-to-stack-faults",
        "PUSH and POP of memory operands fault on either side with neither side changed",
        """
    mov qword [abs PTE(0x65000)], 0
    invlpg [abs 0x65000]
    mov edx, 0x65000
    mov rcx, rsp
    expect_fault one
at_push:
    push qword [rdx]
one:
    mov r8, rsp
    sub r8, rcx
    push 0x77
    expect_fault two
at_pop:
    pop qword [rdx + 8]
two:
    mov r9, rsp
    sub r9, rcx
    pop r10
    expect_fault three
at_call:
    call [rdx + 16]
three:
    mov r11, rsp
    sub r11, rcx
    done
""",
        registers={"r8": 0, "r9": (1 << 64) - 8, "r10": 0x77, "r11": 0},
        faults=(
            Fault(14, 0, rip="at_push", cr2=0x65000),
            Fault(14, 2, rip="at_pop", cr2=0x65008),
            Fault(14, 0, rip="at_call", cr2=0x65010),
        ),
    ),
    Program(
        "read-modify-write-faults",
        "Instructions that read and write memory fault as writes on read-only pages, and change no register",
        """
    and qword [abs PTE(0x65000)], ~2
    mov dword [abs 0x64FF0], 5
    invlpg [abs 0x65000]
    mov edx, 0x65000
    mov eax, 1
    mov ecx, 3
    mov ebx, 7
    expect_fault one
at_one:
    xadd [rdx], ecx
one:
    expect_fault two
at_two:
    lock cmpxchg [rdx], ebx             ; writes even when the compare fails
two:
    expect_fault three
at_three:
    xchg [rdx], ebx
three:
    expect_fault four
at_four:
    shl dword [rdx], cl
four:
    expect_fault five
at_five:
    bts dword [rdx + 4], 3
five:
    expect_fault six
at_six:
    setz [rdx + 8]
six:
    expect_fault seven
    mov r8d, 100
    bts [abs 0x64000], r8               ; byte 12: the page before, writable
    mov r8d, 0x1000 * 8
at_seven:
    bts [abs 0x64000], r8
seven:
    done
""",
        registers={"rax": 1, "rcx": 3, "rbx": 7},
        memory={0x6400C: b"\x10"},
        faults=tuple(
            Fault(14, 3, rip=f"at_{name}", cr2=cr2)
            for name, cr2 in (
                ("one", 0x65000),
                ("two", 0x65000),
                ("three", 0x65000),
                ("four", 0x65000),
                ("five", 0x65004),
                ("six", 0x65008),
                ("seven", 0x65000),
            )
        ),
    ),
    Program(
        "conditional-move-reads",
        "CMOV reads its memory operand, and faults, even when the condition is false",
        """
    mov qword [abs PTE(0x65000)], 0
    invlpg [abs 0x65000]
    mov rax, -1
    cmp eax, eax
    expect_fault over
at_move:
    cmovnz eax, [abs 0x65000]
over:
    done
""",
        registers={"rax": (1 << 64) - 1},
        faults=(Fault(14, 0, rip="at_move", cr2=0x65000),),
    ),
    Program(
        "fetch-faults",
        "A fetch that crosses into an absent page faults with that page's address, at the instruction's start",
        """
    mov qword [abs PTE(0x66000)], 0
    invlpg [abs 0x66000]
    mov byte [abs 0x65FFD], 0x90        ; nop
    mov word [abs 0x65FFE], 0x00B8      ; the start of mov eax, imm32
    mov ebx, 5
    expect_fault over
    mov eax, 0x65FFD
    jmp rax
over:
    mov r8, [abs FAULTS + 64 + 16]
    mov qword [abs PTE(0x66000)], 0x66007
    mov dword [abs 0x66000], 0xC3000000
    mov eax, 0x65FFD
    call rax
    done
""",
        registers={"r8": 0x65FFE, "rax": 0},
        faults=(Fault(14, 0x10, cr2=0x66000),),
    ),
    Program(
        "iret-faults",
        "IRETQ to a bad selector, a non-canonical address or the wrong ring raises #GP and keeps the frame",
        """
    mov rbx, rsp
    push DS0
    push rbx
    push 2
    push DS0                            ; not code
    push 0x8000
    mov rcx, rsp
    expect_fault one
at_data:
    iretq
one:
    mov r8, rsp
    sub r8, rcx
    mov qword [rsp + 8], 0x2000 | 3
    expect_fault two
at_limit:
    iretq
two:
    mov qword [rsp + 8], CS64
    mov rax, 0x8000000000000000
    mov [rsp], rax
    expect_fault three                  ; at the IRETQ or at its target, as processors differ
    iretq
three:
    mov rsp, rcx
    mov qword [rsp + 8], CS64
    mov qword [rsp], four
    pushfq
    pop qword [rsp + 16]
    iretq
four:
    mov r9, rsp
    sub r9, rbx
    done
""",
        registers={"r8": 0, "r9": 0},
        faults=(Fault(13, 0x10, rip="at_data"), Fault(13, 0x2000, rip="at_limit"), Fault(13, 0)),
        emulated="a fault of its IRETQ changes registers and names no selector",
    ),
    Program(
        "user-flags",
        "POPF and IRET in ring 3 change neither IF nor IOPL, and CLI faults; with IOPL 3 they all may",
        """
    enter_user user
user:
    push 0x3202
    popfq
    pushfq
    pop r8
    mov qword [abs RESUME], one
at_cli:
    cli
one:
    set_gate 0x80, kernel
    int 0x80
    cli
    sti
    cli
    cmp eax, eax
    pushfq
    pop r9
    done
kernel:
    or qword [rsp + 16], 0x3000
    iretq
""",
        registers={"r8": 2, "r9": 0x3046},
        faults=(Fault(13, 0, rip="at_cli", cs=0x33),),
        emulated="its ring 3 runs natively with gates of its own",
    ),
    Program(
        "interrupt-in-a-long-string",
        "An interrupt is taken in the middle of a long REP instruction, which then goes on to its end",
        """
    set_gate 0x31, handler
    mov edi, 0x100000
    mov ecx, 0x180000
    mov al, 0x5A
    host 0x31
    mov al, 0x5A
    sti
    nop
    rep stosb
    cli
    mov r8, rdi
    mov r9d, [abs 0x100000 + 0x180000 - 4]
    mov al, [abs 0x280000]
    movzx eax, al
    done
handler:
    inc r10d
    iretq
""",
        registers={"r8": 0x280000, "r9": 0x5A5A5A5A, "r10": 1, "rcx": 0, "rax": 0},
        on_host=_interrupt_soon,
    ),
    Program(
        "deep-recursion",
        "Calls and returns nest deeply, with returns that do not match their calls mixed in",
        """
    mov rbx, rsp
    mov ecx, 1500
    call down
    mov r8, rsp
    sub r8, rbx
    mov esi, 20
odd:
    push after                          ; a return without a call
    ret
after:
    dec esi
    jnz odd
    call skip
    failed
landed:
    mov r9, rsp
    sub r9, rbx
    done
down:
    inc eax
    dec ecx
    jz bottom
    call down
bottom:
    inc edx
    ret
skip:
    mov qword [rsp], landed
    ret
""",
        registers={"rax": 1500, "rdx": 1500, "r8": 0, "r9": 0},
    ),
    Program(
        "loops-and-counts",
        "LOOP, LOOPE, LOOPNE and JRCXZ count in RCX or ECX and keep the flags",
        """
    mov ecx, 5
one:
    inc r8d
    loop one
    mov ecx, 10
two:
    inc r9d
    cmp r9d, 4
    loopne two
    mov r10, rcx
    mov rcx, 0x100000000
    jrcxz wrong
    jecxz three
wrong:
    failed
three:
    a32 loop four                       ; ECX wraps: upper half cleared
four:
    mov r11, rcx
    mov ecx, 3
    stc
five:
    loop five
    setc r12b
    movzx r12, r12b
    done
""",
        registers={"r8": 5, "r9": 4, "r10": 6, "r11": 0xFFFFFFFF, "r12": 1},
    ),
    Program(
        "address-forms",
        "All forms of addresses give what the manual says: RIP-relative, scaled, absolute, high registers",
        """
    mov rax, 0x1111111111111111
    mov [rel slot], rax
    mov r8, [abs slot]
    mov rbx, DATA
    mov r13, DATA
    mov rbp, DATA
    mov r12, DATA
    mov ecx, 3
    mov dword [rbx + rcx * 8 + 4], 1
    mov dword [r13 + rcx * 4 + 0x40], 2
    mov dword [rbp + 0x50], 3
    mov dword [r12 + 0x54], 4
    push 99
    mov r9, [rsp]
    mov r10, [rsp + rcx * 8 - 24]
    mov dword [rcx * 8 + DATA + 0x60], 5
    mov al, [qword DATA + 0x60 + 24]
    movzx r11d, al
    lea r14, [rcx + rcx * 2 - 1]
    lea esi, [rbx + 0xFFFFFFFF80000000]
    mov rdi, -8
    mov r15d, [rbx + rdi + 0x78 + 8]
    pop rdx
    done
    align 8
slot: dq 0
""",
        registers={"r8": 0x1111111111111111, "r9": 99, "r10": 99, "r11": 5, "r14": 8, "rsi": 0x80060000, "r15": 5},
        memory={0x6001C: b"\1", 0x6004C: b"\2", 0x60050: b"\3\0\0\0\4", 0x60078: b"\5"},
    ),
)
