"""Translations that an accelerator must forget: mappings, modes, rights, bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.memory import RamBlock, RamRange

from cardcage_conformance.conformance import Fault, Program

if TYPE_CHECKING:
    from cardcage_conformance.lab import Lab


def _swap_code(lab: Lab, value: int) -> None:
    block = RamBlock(4096, "swapped")
    block.view[:6] = b"\xb8" + bytes([value, 0, 0, 0]) + b"\xc3"  # mov eax, value; ret
    old = tuple(one for one in lab.memory.ranges if one.priority == 2)
    with lab.vm.quiesce():
        lab.memory.change(add=(RamRange(0x600000, 4096, block, readonly=True, priority=2),), remove=old)


def _rewrite_many(lab: Lab, value: int) -> None:
    """A device writes the functions of many pages through views, and reports them together."""
    ranges = [(0x600000 + at * 4096, 6) for at in range(64)]
    for at, (address, size) in enumerate(ranges):
        lab.memory.view(address, size)[:] = b"\xb8" + bytes([value + at, 0, 0, 0]) + b"\xc3"  # mov eax, ...; ret
    lab.memory.written_many(ranges)


PROGRAMS = (
    Program(
        "remap-code-page",
        "After INVLPG, calls and jumps to an address run the code of the page that is mapped there now",
        """
    mov byte [abs 0x61000], 0xB8        ; mov eax, 1; ret
    mov dword [abs 0x61001], 1
    mov byte [abs 0x61005], 0xC3
    mov byte [abs 0x62000], 0xB8
    mov dword [abs 0x62001], 2
    mov byte [abs 0x62005], 0xC3
    mov ecx, 50
    xor ebx, ebx
again:
    mov qword [abs PTE(0x65000)], 0x61007
    invlpg [abs 0x65000]
    mov edx, 0x65000
    call rdx
    add ebx, eax
    call 0x65000
    add ebx, eax
    mov qword [abs PTE(0x65000)], 0x62007
    invlpg [abs 0x65000]
    call rdx
    add ebx, eax
    call 0x65000
    add ebx, eax
    dec ecx
    jnz again
    done
""",
        registers={"rbx": 300},
    ),
    Program(
        "switch-address-spaces",
        "A CR3 load changes which code and data an address shows, back and forth",
        """
    mov esi, 0x50000                    ; a copy of all tables but the last level's other page
    mov edi, 0x70000
    mov ecx, 0x6000 / 8
    rep movsq
    mov qword [abs 0x70000], 0x71007
    mov qword [abs 0x71000], 0x72007
    mov qword [abs 0x72000], 0x75007
    mov qword [abs PTE(0x65000)], 0x61007
    mov qword [abs PTE(0x65000) + 0x20000], 0x62007
    mov rax, cr3
    mov cr3, rax
    mov byte [abs 0x61000], 0xB8
    mov dword [abs 0x61001], 1
    mov byte [abs 0x61005], 0xC3
    mov byte [abs 0x62000], 0xB8
    mov dword [abs 0x62001], 2
    mov byte [abs 0x62005], 0xC3
    mov dword [abs 0x61010], 10
    mov dword [abs 0x62010], 20
    mov r8d, 0x50000
    mov r9d, 0x70000
    mov ecx, 30
again:
    mov cr3, r8
    call 0x65000
    add ebx, eax
    add ebx, [abs 0x65010]
    mov cr3, r9
    call 0x65000
    add ebx, eax
    add ebx, [abs 0x65010]
    dec ecx
    jnz again
    mov cr3, r8
    done
""",
        registers={"rbx": 33 * 30},
    ),
    Program(
        "same-bytes-in-two-modes",
        "The same bytes at the same address mean what the current code segment says",
        """
    mov eax, 5
    call bytes_                         ; 64-bit: REX prefix, so one increment
    mov r8d, eax
    mov rbx, rsp
    mov dword [abs DATA], compat
    mov word [abs DATA + 4], CS32
    mov eax, 5
    jmp dword far [abs DATA]
    bits 32
compat:
    call bytes_                         ; 32-bit: two increments
    mov esi, eax
    jmp CS64:back
    bits 64
back:
    mov eax, 5
    call bytes_
    mov r9d, eax
    done
bytes_:
    db 0x40, 0xFF, 0xC0                 ; inc eax; inc eax, or rex inc eax
    ret
""",
        registers={"r8": 6, "rsi": 7, "r9": 6},
    ),
    Program(
        "same-code-in-two-rings",
        "Code that ran in ring 0 runs in ring 3 with ring 3's rights, and again in ring 0 with its own",
        """
    mov qword [abs PTE(0x66000)], 0x66003
    invlpg [abs 0x66000]
    call touch
    mov r8d, eax
    set_gate 0x80, back
    enter_user user
user:
    mov qword [abs RESUME], refused
    call touch
    failed
refused:
    int 0x80
back:
    call touch
    mov r9d, eax
    done
touch:
    mov eax, 1
at_touch:
    mov [abs 0x66000], eax
    mov eax, [abs 0x66000]
    ret
""",
        registers={"r8": 1, "r9": 1},
        faults=(Fault(14, 7, rip="at_touch", cr2=0x66000, cs=0x33),),
        emulated="its ring 3 runs natively with gates of its own",
    ),
    Program(
        "revoke-execute-right",
        "Code that ran faults once its page is no-execute, absent or supervisor-only to ring 3, and runs again after",
        """
    mov word [abs 0x65000], 0xC390      ; nop; ret
    mov edx, 0x65000
    call rdx
    bts qword [abs PTE(0x65000)], 63
    invlpg [rdx]
    expect_fault one
    call rdx
    failed
one:
    mov qword [abs PTE(0x65000)], 0
    invlpg [rdx]
    expect_fault two
    call rdx
    failed
two:
    mov qword [abs PTE(0x65000)], 0x65007
    call rdx                            ; an absent page may be mapped without INVLPG
    mov rsp, 0x28000
    done
""",
        faults=(Fault(14, 0x11, cr2=0x65000), Fault(14, 0x10, cr2=0x65000)),
    ),
    Program(
        "revoke-write-right",
        "A page that was written faults on the next write once it is read-only, and on any access once it is absent",
        """
    mov edx, 0x65000
    mov byte [rdx], 1
    mov byte [rdx], 2
    and qword [abs PTE(0x65000)], ~2
    invlpg [rdx]
    mov al, [rdx]
    expect_fault one
at_write:
    mov byte [rdx], 3
one:
    or qword [abs PTE(0x65000)], 2
    invlpg [rdx]
    mov byte [rdx], 4
    mov qword [abs PTE(0x65000)], 0
    mov rax, cr3
    mov cr3, rax
    expect_fault two
at_read:
    mov al, [rdx]
two:
    mov qword [abs PTE(0x65000)], 0x65007
    mov r8b, [rdx]
    movzx r8, r8b
    done
""",
        registers={"r8": 4},
        faults=(Fault(14, 3, rip="at_write", cr2=0x65000), Fault(14, 0, rip="at_read", cr2=0x65000)),
    ),
    Program(
        "accessed-dirty-again",
        "Accessed and dirty bits that the guest cleared are set again by the next access after INVLPG",
        """
    mov edx, 0x65000
    mov ecx, 5
again:
    mov al, [rdx]
    mov [rdx], al
    mov rax, [abs PTE(0x65000)]
    and eax, 0x60
    add r8d, eax
    and qword [abs PTE(0x65000)], ~0x60
    invlpg [rdx]
    mov al, [rdx]
    mov rax, [abs PTE(0x65000)]
    and eax, 0x60
    add r9d, eax
    dec ecx
    jnz again
    done
""",
        registers={"r8": 0x60 * 5, "r9": 0x20 * 5},
    ),
    Program(
        "task-switched-between-runs",
        "The same SSE instruction runs, faults with #NM while CR0.TS is set, and runs again",
        """
    mov ecx, 3
again:
    call use
    mov rax, cr0
    bts rax, 3
    mov cr0, rax
    mov rbx, rsp
    expect_fault back
    call use
    failed
back:
    mov rsp, rbx
    clts
    call use
    dec ecx
    jnz again
    done
use:
    inc r8d
at_use:
    movups xmm0, [abs DATA]
    ret
""",
        registers={"r8": 9},
        faults=(Fault(7, rip="at_use"),) * 3,
    ),
    Program(
        "code-in-changing-slots",
        "Code in memory that the machine replaces runs with the new bytes, also from read-only memory",
        """
    mov byte [abs 0x600000], 0xB8
    mov dword [abs 0x600001], 1
    mov byte [abs 0x600005], 0xC3
    mov edx, 0x600000
    call rdx
    mov r8d, eax
    host 2
    call rdx
    mov r9d, eax
    host 3
    call rdx
    mov r10d, eax
    mov byte [rdx + 1], 9               ; ROM now
    call rdx
    mov r11d, eax
    done
""",
        registers={"r8": 1, "r9": 2, "r10": 3, "r11": 3},
        accesses=(("write", 0x600001, 1, 9),),
        on_host=_swap_code,
    ),
    Program(
        "code-written-in-many-pages",
        "Code in many pages that a device writes, and reports all at once, runs with the new bytes",
        """
    host 1
    call all
    mov r8d, ebx
    host 2
    call all
    mov r9d, ebx
    done
all:
    xor ebx, ebx
    mov edx, 0x600000
next:
    call rdx
    add ebx, eax
    add edx, 0x1000
    cmp edx, 0x640000
    jne next
    ret
""",
        registers={"r8": 63 * 32 + 64, "r9": 63 * 32 + 128},
        on_host=_rewrite_many,
    ),
    Program(
        "data-beside-code",
        "Variables on the page of the code that uses them work, at any speed",
        """
    mov ecx, 3000
again:
    inc dword [abs counter]
    mov eax, [abs counter]
    add [abs total], rax
    dec ecx
    jnz again
    mov r8, [abs total]
    done
    align 8
counter: dd 0, 0
total: dq 0
""",
        registers={"r8": 3000 * 3001 // 2},
    ),
    Program(
        "string-store-over-code",
        "REP STOS and MOVS that overwrite code, behind and ahead of the running instruction, take effect",
        """
    lea rdi, [abs ahead]
    mov ecx, 4
    mov al, 0x90
    rep stosb                           ; the first two and the last INC become NOPs
    xor ebx, ebx
    mov word [abs ahead + 6], 0x9090
ahead:
    inc ebx
    inc ebx
    inc ebx
    inc ebx
    mov r8d, ebx
    mov esi, replacement
    mov edi, function
    mov ecx, 6
    call function
    mov r9d, eax
    rep movsb
    call function
    mov r10d, eax
    done
replacement:
    mov eax, 22
    ret
    align 4096
function:
    mov eax, 11
    ret
""",
        registers={"r8": 1, "r9": 11, "r10": 22},
    ),
    Program(
        "store-within-own-block",
        "A loop that rewrites an instruction a few bytes ahead of itself runs the new one each time round",
        """
    mov ecx, 20
again:
    mov [abs changing + 1], cl
    nop
changing:
    mov al, 0
    movzx eax, al
    add ebx, eax
    dec ecx
    jnz again
    done
""",
        registers={"rbx": 210},
    ),
    Program(
        "stale-through-host-alias",
        "A store through a large page changes code that runs through small pages",
        """
    mov qword [abs 0x52000 + 8], 0x83   ; 2 to 4 MiB shows 0 to 2 MiB, as one large page
    invlpg [abs 0x200000]
    mov ecx, 40
again:
    mov [abs 0x200000 + function + 1], ecx
    call function
    add ebx, eax
    dec ecx
    jnz again
    done
    align 4096
function:
    mov eax, 0
    ret
""",
        registers={"rbx": 820},
    ),
)
