"""Breakpoints in the debug registers: code, data and ports (Intel SDM vol. 3, chapter 17)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from cardcage_conformance.conformance import Fault, Program

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage_conformance.lab import Lab

B0, B1, B2, B3, BD, BS = 1, 2, 4, 8, 0x2000, 0x4000
RECORDS = 0x62000
HANDLER = """
%define RECORDS 0x62000         ; dword count; records of 32 bytes from +64: rip dr6 rflags dr7
%macro break_at 3               ; register, address, its bits in DR7 (R/W and LEN); enabled globally
    mov rax, %2
    mov dr%1, rax
    mov rax, dr7
    or rax, (2 << (%1 * 2)) | ((%3) << (16 + %1 * 4))
    mov dr7, rax
%endmacro
%macro break_off 0
    xor eax, eax
    mov dr7, rax
%endmacro
%define CODE 0
%define WRITE(size) (1 | (((size) - 1) & 1) << 2 | ((size) > 2) << 3)
%define ACCESS(size) (3 | (((size) - 1) & 1) << 2 | ((size) > 2) << 3)
%define PORT(size) (2 | (((size) - 1) & 1) << 2 | ((size) > 2) << 3)
    set_gate 1, on_debug
    mov byte [abs IDT + 16 + 4], 1      ; its frame is not to meet breakpoints
    jmp start
on_debug:                       ; goes on where it was, over a code breakpoint there
    push rax
    push rbx
    mov ebx, [abs RECORDS]
    inc dword [abs RECORDS]
    shl ebx, 5
    mov rax, [rsp + 16]
    mov [rbx + RECORDS + 64], rax
    mov rax, dr7
    mov [rbx + RECORDS + 88], rax
    mov rax, dr6
    mov [rbx + RECORDS + 72], rax
    mov rax, [rsp + 32]
    mov [rbx + RECORDS + 80], rax
    mov eax, 0xFFFF0FF0
    mov dr6, rax
    or dword [rsp + 32], 0x10000
    pop rbx
    pop rax
    iretq
start:
"""
# LEN is 0, 1, 3 for 1, 2, 4 bytes and 2 for 8
EIGHT = {"WRITE8": 1 | 2 << 2, "ACCESS8": 3 | 2 << 2}
DEFINES = "".join(f"%define {name} {value}\n" for name, value in EIGHT.items())


def _records(lab: Lab) -> list[tuple[str, int, bool]]:
    names = {address: name for name, address in lab.code.labels.items()}
    found = []
    for at in range(min(lab.word(RECORDS, 4), 60)):
        rip, dr6, flags, _ = struct.unpack("<4Q", lab.read(RECORDS + 64 + 32 * at, 32))
        found.append((names.get(rip, hex(rip)).removeprefix("at_"), dr6 ^ 0xFFFF0FF0, bool(flags & 0x10000)))
    return found


def _traps(*wanted: str) -> Callable[[Lab], list[str]]:
    """A check of where the handler was entered, whatever DR6 said."""
    return lambda lab: _differing([name for name, _, _ in _records(lab)], [*wanted])


def _seen(*wanted: tuple[str, int] | tuple[str, int, bool]) -> Callable[[Lab], list[str]]:
    """A check of the handler's records: label at the saved RIP, DR6's bits, and where it is set the saved RF."""
    return lambda lab: _differing(_records(lab), [(*one, False)[:3] for one in wanted])


def _differing(found: list[Any], expected: list[Any]) -> list[str]:
    return [] if found == expected else [f"debug exceptions were {found}, expected {expected}"]


PROGRAMS = (
    Program(
        "code-breakpoints",
        "A code breakpoint faults before its instruction each time it is reached, and RF lets the handler go on",
        HANDLER
        + """
    break_at 0, at_one, CODE
    break_at 1, at_two, CODE
    break_at 3, at_three, CODE
    mov ecx, 2
again:
    nop
at_one:
    inc ebx
    loop again
    jmp at_two
    failed
at_two:
    mov [abs DATA], ebx
    call at_three
    jmp over
at_three:
    ret
over:
    break_off
    call at_three
    done
""",
        registers={"rbx": 2},
        check=_seen(("one", B0), ("one", B0), ("two", B1), ("three", B3)),
    ),
    Program(
        "code-breakpoint-places",
        "A code breakpoint on a repeated string instruction faults once, on the instruction behind MOV SS never",
        HANDLER
        + """
    mov r8d, ss
    mov edi, DATA
    break_at 0, at_string, CODE
    break_at 1, at_behind, CODE
    break_at 2, at_fault, CODE
    mov ecx, 5
at_string:
    rep stosb
    mov ss, r8d
at_behind:
    nop
    break_at 1, at_ret, CODE
    call at_ret
    expect_fault over
at_fault:
    ud2
    failed
at_ret:
    ret
over:
    mov rcx, [abs FAULTS + 64 + 32]
    break_off
    done
""",
        registers={"rdi": 0x60005},
        check=_seen(("string", B0), ("ret", B1), ("fault", B2)),
        emulated="its emulator faults behind MOV SS, on processors of AMD",
        faults=(Fault(6, rip="at_fault"),),
    ),
    Program(
        "data-breakpoints",
        "A data breakpoint traps behind each access that overlaps it: writes, or reads too, of 1 to 16 bytes",
        HANDLER
        + DEFINES
        + """
    break_at 0, DATA + 2, WRITE(2)
    break_at 1, DATA + 0x10, ACCESS(4)
    break_at 2, DATA + 0x20, WRITE8
    break_at 3, DATA + 0x30, ACCESS(1)
    mov ebx, DATA
    mov eax, [rbx]
    mov [rbx], ax
    mov [rbx + 4], eax
    mov [rbx + 3], al
at_byte:
    mov [rbx], rax
at_eight:
    mov [rbx + 1], ax
at_odd:
    add dword [rbx], 5
at_rmw:
    lock xadd [rbx], eax
at_xadd:
    mov ecx, [rbx + 0x10]
at_read:
    movups xmm0, [rbx + 8]
at_sse:
    movups [rbx + 0x14], xmm0
at_store:
    movzx eax, byte [rbx + 0x13]
at_zx:
    cmp word [rbx + 0x0F], 3
at_cmp:
    mov qword [rbx + 0x27], 0
at_27:
    mov rax, [rbx + 0x20]
    fld qword [rbx + 0x2C]
at_fld:
    fstp qword [rbx + 0x2C]
at_fstp:
    mov [rbx + 0x31], eax
    mov al, [rbx + 0x30]
at_al:
    nop
    break_off
    mov al, [rbx + 0x30]
    done
""",
        check=_seen(
            *(("byte", B0), ("eight", B0), ("odd", B0), ("rmw", B0), ("xadd", B0), ("read", B1), ("sse", B1)),
            *(("store", B2), ("zx", B1), ("cmp", B1), ("27", B2), ("fld", B3), ("fstp", B3), ("al", B3)),
        ),
        emulated="its emulator knows no data breakpoints",
    ),
    Program(
        "data-breakpoint-stack",
        "Data breakpoints see what PUSH, POP, CALL, RET, ENTER, PUSHF and IRET do on the stack",
        HANDLER
        + DEFINES
        + """
    break_at 0, 0x27FF8, ACCESS8
    push rax
at_push:
    pop rax
at_pop:
    call at_called
at_returned:
    pushfq
at_pushfq:
    popfq
at_popfq:
    enter 8, 0
at_enter:
    leave
at_leave:
    push qword [abs DATA]
at_push_memory:
    pop qword [abs DATA]
at_pop_memory:
    push fs
at_push_fs:
    pop fs
at_pop_fs:
    mov ebx, 0x27FF8
    xlatb
at_xlat:
    xchg [rbx], rax
at_xchg:
    push DS0
at_frame:
    push 0x28000
    push 2
    push CS64
    push at_iret
    iretq
at_called:
    ret
at_iret:
    nop
    break_off
    done
""",
        check=_seen(
            *(("push", B0), ("pop", B0), ("called", B0), ("returned", B0), ("pushfq", B0), ("popfq", B0)),
            *(("enter", B0), ("leave", B0), ("push_memory", B0), ("pop_memory", B0), ("push_fs", B0), ("pop_fs", B0)),
            *(("xlat", B0), ("xchg", B0), ("frame", B0), ("iret", B0)),
        ),
        emulated="its emulator knows no data breakpoints",
    ),
    Program(
        "data-breakpoint-strings",
        "A repeated string instruction traps behind the iterations that meet a data breakpoint, with RF saved",
        HANDLER
        + """
    break_at 0, DATA + 4, WRITE(4)
    mov edi, DATA
    mov ecx, 4
at_string:
    rep stosw
at_behind:
    mov esi, DATA
    mov edi, DATA + 0x100
    mov ecx, 8
    rep movsb
    break_off
    break_at 1, DATA + 6, ACCESS(2)
    mov esi, DATA
    mov edi, DATA + 0x100
    mov ecx, 4
    repe cmpsw
at_end:
    nop
    break_off
    done
""",
        check=_seen(("string", B0, True), ("behind", B0), ("end", B1)),
        emulated="its emulator knows no data breakpoints",
    ),
    Program(
        "data-breakpoint-pages",
        "Data breakpoints see accesses from the page before and from ring 3, but by their linear address alone",
        HANDLER
        + """
    mov rax, HIGH
    mov ecx, [rax + DATA + 0x1000]      ; in the TLB by another address
    mov ecx, [abs DATA + 0x1000]
    break_at 0, DATA + 0x1000, ACCESS(1)
    mov rax, HIGH
    mov ecx, [rax + DATA + 0x1000]
    mov ecx, [abs DATA + 0xFFE]
at_crossing:
    mov [abs DATA + 0xFFD], ecx
at_written:
    mov ecx, [abs DATA + 0xFFC]
    mov ecx, [abs DATA + 0x1001]
    enter_user user
user:
    mov ecx, [abs DATA + 0x1000]
at_user:
    inc dword [abs DATA + 0x1000]
at_inc:
    mov ecx, [abs DATA + 0x1004]
    done
""",
        check=_seen(("crossing", B0), ("written", B0), ("user", B0), ("inc", B0)),
        emulated="its emulator knows no data breakpoints",
    ),
    Program(
        "data-breakpoint-device",
        "A data breakpoint on a device's register traps behind the access, which is made once",
        HANDLER
        + """
    break_at 0, MMIO + 4, ACCESS(4)
    mov ebx, MMIO
    mov ecx, [rbx + 4]
at_read:
    mov eax, 0x01020304
    mov [rbx + 4], eax
at_written:
    add [rbx + 4], eax
at_added:
    mov [rbx + 8], eax
    mov ecx, [rbx]
    break_off
    done
""",
        accesses=(
            ("read", 0xD0000004, 4, 0x07060504),
            ("write", 0xD0000004, 4, 0x01020304),
            ("read", 0xD0000004, 4, 0x01020304),
            ("write", 0xD0000004, 4, 0x02040608),
            ("write", 0xD0000008, 4, 0x01020304),
            ("read", 0xD0000000, 4, 0x03020100),
        ),
        check=_seen(("read", B0), ("written", B0), ("added", B0)),
        emulated="its emulator knows no data breakpoints",
    ),
    Program(
        "port-breakpoints",
        "With CR4.DE a breakpoint on ports traps behind IN, OUT, INS and OUTS that touch them; without it does nothing",
        HANDLER
        + """
    break_at 0, 0x22, PORT(2)
    in al, 0x23
    mov rax, cr4
    or eax, 8
    mov cr4, rax
    in al, 0x21
    in al, 0x23
at_in:
    out 0x22, ax
at_out:
    in eax, 0x20
at_wide:
    out 0x24, al
    mov edx, 0x22
    mov esi, DATA
    mov edi, DATA
    mov ecx, 2
at_outs:
    rep outsb
at_behind:
    insb
at_ins:
    nop
    break_off
    done
""",
        check=_seen(("in", B0), ("out", B0), ("wide", B0), ("outs", B0, True), ("behind", B0), ("ins", B0)),
        emulated="its emulator knows no breakpoints on ports",
    ),
    Program(
        "debug-register-access",
        "With DR7.GD moves of debug registers raise #DB with DR6.BD, and GD is clear in the handler",
        HANDLER
        + """
    mov eax, 0x2400
    mov dr7, rax
    mov ebx, 0x1234
at_move:
    mov rbx, dr0
    mov rcx, [abs RECORDS + 88]
    mov rdx, dr7
    done
""",
        registers={"rbx": 0, "rcx": 0x400, "rdx": 0x400},
        check=_seen(("move", BD)),
    ),
    Program(
        "breakpoint-behind-mov-ss",
        "What a MOV SS meets traps behind the next instruction, or at the first one of the handler of an INT n",
        HANDLER
        + """
    set_gate 0x80, at_handler
    mov r8d, ss
    mov [abs DATA], r8d
    break_at 0, DATA, ACCESS(2)
    mov ss, [abs DATA]
    nop
at_nop:
    nop
    mov ss, [abs DATA]
    int 0x80
    mov ss, [abs DATA]
    mov ss, r8d
at_second:
    break_off
    done
at_handler:
    iretq
""",
        check=_seen(("nop", B0), ("handler", B0), ("second", B0)),
        emulated="its emulator knows no data breakpoints",
    ),
    Program(
        "breakpoint-before-int1",
        "What a MOV SS meets is told with the #DB of an INT1 behind it: the handler is entered once",
        HANDLER
        + """
    mov r8d, ss
    mov [abs DATA], r8d
    break_at 0, DATA, ACCESS(2)
    mov ss, [abs DATA]
    db 0x2E, 0x2E, 0xF1
at_int1:
    break_off
    done
""",
        check=_traps("int1"),
        emulated="its emulator knows no data breakpoints",
    ),
    Program(
        "breakpoint-and-step",
        "A step that also meets a data breakpoint is one trap with both bits in DR6",
        HANDLER
        + """
    break_at 2, DATA, WRITE(4)
    step_on
    mov [abs DATA], eax
at_both:
    step_off
    nop
    break_off
    done
""",
        check=_seen(("both", BS | B2), ("pushed", BS), ("masked", BS), ("off", BS)),
        emulated="its emulator knows no data breakpoints",
    ),
    Program(
        "breakpoint-on-a-lock",
        "A locked instruction that meets a data breakpoint stays atomic for the other processor, and traps once",
        """
    test edi, edi
    jz first
    mov ecx, 20000
other:
    lock inc dword [abs DATA]
    loop other
    mov dword [abs DATA + 64], 1
rest:
    pause
    jmp rest
first:
"""
        + HANDLER
        + """
    break_at 0, DATA, WRITE(4)
    mov ecx, 400
again:
    lock inc dword [abs DATA]
    loop again
    break_off
wait_for_it:
    pause
    cmp dword [abs DATA + 64], 1
    jne wait_for_it
    mov eax, [abs DATA]
    mov ebx, [abs RECORDS]
    done
""",
        cpus=2,
        registers={"rax": 20400, "rbx": 400},
        emulated="its emulator knows no data breakpoints",
    ),
)
