"""Code that changes: by itself, through an alias, by the host; and a loop that must be interrupted."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from cardcage_conformance.conformance import Program

if TYPE_CHECKING:
    from cardcage_conformance.lab import Lab


def _kick_from_outside(lab: Lab, value: int) -> None:
    threading.Thread(target=lab.stop).start()


def _patch_by_dma(lab: Lab, value: int) -> None:
    lab.write(0x9000, b"\xb8" + bytes([value]) + b"\0\0\0\xc3")  # mov eax, value; ret


PROGRAMS = (
    Program(
        "kick-out-of-a-loop",
        "A kick from another thread brings a processor out of a jump to itself",
        """
    mov ebx, 77
    host 1
at_spin:
    jmp at_spin
""",
        registers={"rbx": 77, "rip": 0x8009},
        on_host=_kick_from_outside,
    ),
    Program(
        "patch-next-instruction",
        "A store to the very next instruction takes effect when it runs",
        """
    xor eax, eax
    mov byte [abs patched + 1], 42
patched:
    mov al, 1
    mov ebx, eax
    lea rdi, [rel later]
    mov ecx, 3
again:
    mov byte [rdi], 0xFF            ; inc eax: FF C0
    mov byte [rdi + 1], 0xC0
    jmp later
later:
    nop
    nop
    dec ecx
    jnz again
    done
""",
        registers={"rbx": 42, "rax": 45},
    ),
    Program(
        "patch-loop",
        "A function that is called, rewritten and called again runs its newest bytes each time",
        """
    xor ebx, ebx
    mov ecx, 200
again:
    mov [abs function + 1], ecx
    call function
    add rbx, rax
    dec ecx
    jnz again
    done
    align 4096
function:
    mov eax, 0
    ret
""",
        registers={"rbx": 20100, "rcx": 0},
    ),
    Program(
        "patch-through-alias",
        "A store through another address of the same page changes the code",
        """
    call function
    mov r8, rax
    mov rdi, HIGH + function
    mov dword [rdi + 1], 99
    call function
    mov r9, rax
    mov qword [abs PTE(0x61000)], function + 7 ; the code's page, at DATA + 0x1000
    invlpg [abs 0x61000]
    mov dword [abs 0x61001], 111
    call function
    mov r10, rax
    done
    align 4096
function:
    mov eax, 11
    ret
""",
        registers={"r8": 11, "r9": 99, "r10": 111},
    ),
    Program(
        "patch-by-dma",
        "Code that the host wrote over runs with the new bytes",
        """
    xor ebx, ebx
    call function
    mov r8, rax
    host 22
    call function
    mov r9, rax
    host 33
    call function
    mov r10, rax
    done
    align 4096
function:
    mov eax, 11
    ret
""",
        registers={"r8": 11, "r9": 22, "r10": 33},
        on_host=_patch_by_dma,
    ),
    Program(
        "code-across-pages",
        "An instruction whose bytes lie on two pages runs, and follows changes of either page",
        """
    call function
    mov r8, rax
    mov byte [abs at_page], 0x22        ; second page: upper byte of the immediate
    call function
    mov r9, rax
    mov byte [abs at_page - 1], 0x33
    call function
    mov r10, rax
    done
    times 0x1000 - 2 - ($ - $$) nop
function:
    db 0xB8, 0x11                   ; mov eax, imm32
at_page:
    db 0, 0, 0
    ret
""",
        registers={"r8": 0x11, "r9": 0x2211, "r10": 0x2233},
    ),
)
