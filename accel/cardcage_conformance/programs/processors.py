"""Two processors without local APICs: both start at the program, with their number in RDI."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.memory import RamBlock, RamRange

from cardcage_conformance.conformance import Program

if TYPE_CHECKING:
    from cardcage_conformance.lab import Lab


def _patch_by_dma(lab: Lab, value: int) -> None:
    lab.write(0x9001, bytes([value]))  # one byte of the immediate: the other processor never sees half of a change


def _swap_memory(lab: Lab, value: int) -> None:
    block = RamBlock(4096, "swapped")
    block.view[:4] = value.to_bytes(4, "little")
    old = tuple(one for one in lab.memory.ranges if one.priority == 2)
    with lab.vm.quiesce():
        lab.memory.change(add=(RamRange(0x600000, 4096, block, priority=2),), remove=old)


PROGRAMS = (
    Program(
        "smp-locked-counter",
        "LOCK INC, LOCK XADD and XCHG from two processors lose nothing",
        """
    mov ecx, 2000
again:
    lock inc dword [abs DATA]
    mov eax, 1
    lock xadd [abs DATA + 0x40], rax
    lock add word [abs DATA + 0x7F], 1  ; across a cache line
take:
    mov eax, 1
    xchg [abs DATA + 0x100], eax
    test eax, eax
    jnz take
    inc qword [abs DATA + 0x140]
    mov dword [abs DATA + 0x100], 0
    dec ecx
    jnz again
    lock inc dword [abs DATA + 0x200]
    test edi, edi
    jnz rest
wait_:
    cmp dword [abs DATA + 0x200], 2
    jne wait_
    mov r8d, [abs DATA]
    mov r9, [abs DATA + 0x40]
    mov r10, [abs DATA + 0x140]
    movzx r11, word [abs DATA + 0x7F]
    done
rest:
    pause
    jmp rest
""",
        cpus=2,
        registers={"r8": 4000, "r9": 4000, "r10": 4000, "r11": 4000},
    ),
    Program(
        "smp-message-passing",
        "Stores become visible to the other processor in program order",
        """
    test edi, edi
    jnz reader
    mov ecx, 1
writer:
    mov [abs DATA], rcx
    mov [abs DATA + 0x80], rcx
wait_:
    cmp [abs DATA + 0x100], rcx
    jne wait_
    inc ecx
    cmp ecx, 1000
    jne writer
    mov r8, [abs DATA + 0x180]
    done
reader:
    mov ecx, 1
next:
    mov rax, [abs DATA + 0x80]
    cmp rax, rcx
    jb next
    mov rbx, [abs DATA]
    cmp rbx, rcx
    je good
    inc qword [abs DATA + 0x180]
good:
    mov [abs DATA + 0x100], rcx
    inc ecx
    jmp next
""",
        cpus=2,
        registers={"r8": 0},
    ),
    Program(
        "smp-patch-others-code",
        "A processor that calls a function sees each change of its code that the other processor makes",
        """
    test edi, edi
    jnz runner
    mov ecx, 1
patch:
    mov [abs function_value], ecx
wait_:
    cmp [abs DATA], ecx
    jne wait_
    inc ecx
    cmp ecx, 200
    jne patch
    done
runner:
    call function
    mov [abs DATA], eax
    jmp runner
    align 4096
    times 3 nop
function:
    mov eax, 0
function_value equ $ - 4
    ret
""",
        cpus=2,
        registers={"rcx": 200},
    ),
    Program(
        "smp-patch-each-other",
        "Two processors that rewrite each other's code, each running its own, both see every change",
        """
    test edi, edi
    jnz second
    mov ebx, 1
first_loop:
    mov [abs code_b + 1], ebx
again_a:
    call code_a
    cmp eax, ebx
    jne again_a
    inc ebx
    cmp ebx, 100
    jne first_loop
    done
second:
    mov ebx, 1
second_loop:
again_b:
    call code_b
    cmp eax, ebx
    jne again_b
    mov [abs code_a + 1], ebx
    inc ebx
    jmp second_loop
    align 4096
    times 3 nop
code_a:
    mov eax, 0
    ret
    align 4096
    times 3 nop
code_b:
    mov eax, 0
    ret
""",
        cpus=2,
        registers={"rbx": 100},
    ),
    Program(
        "smp-jump-patching",
        "A jump that the other processor turns into another one, inside a running loop, takes effect",
        """
    test edi, edi
    jnz runner
    mov ecx, 50
toggle:
    mov byte [abs jump + 1], two - jump - 2
wait_two:
    cmp dword [abs DATA], 2
    jne wait_two
    mov byte [abs jump + 1], one - jump - 2
wait_one:
    cmp dword [abs DATA], 1
    jne wait_one
    dec ecx
    jnz toggle
    done
runner:
    align 4096
jump:
    jmp short one
one:
    mov dword [abs DATA], 1
    jmp jump
two:
    mov dword [abs DATA], 2
    jmp jump
""",
        cpus=2,
        registers={"rcx": 0},
    ),
    Program(
        "smp-page-table-change",
        "After INVLPG, a processor sees the page table entry that the other one wrote",
        """
    test edi, edi
    jnz second
    mov ecx, 1
next:
    mov eax, 0x61007
    test ecx, 1
    jz even_
    mov eax, 0x62007
even_:
    mov dword [abs 0x61000], 1
    mov dword [abs 0x62000], 2
    mov [abs PTE(0x64000)], rax
    mov [abs DATA], ecx
wait_:
    cmp [abs DATA + 4], ecx
    jne wait_
    mov eax, ecx
    and eax, 1
    inc eax
    cmp [abs DATA + 8], eax
    je good
    inc ebx
good:
    inc ecx
    cmp ecx, 100
    jne next
    done
second:
    mov ecx, 1
poll:
    cmp [abs DATA], ecx
    jne poll
    invlpg [abs 0x64000]
    mov eax, [abs 0x64000]
    mov [abs DATA + 8], eax
    mov [abs DATA + 4], ecx
    inc ecx
    jmp poll
""",
        cpus=2,
        registers={"rbx": 0, "rcx": 100},
    ),
    Program(
        "smp-dma-over-others-code",
        "A processor in a loop of calls runs the code that a device wrote over the old one",
        """
    test edi, edi
    jnz runner
    mov ecx, 1
patch:
    mov al, cl
    out 0xE0, al
wait_:
    cmp [abs DATA], ecx
    jne wait_
    inc ecx
    cmp ecx, 60
    jne patch
    done
runner:
    mov edx, 0x9000
run:
    call rdx
    mov [abs DATA], eax
    jmp run
    times 0x1000 - ($ - $$) nop
    mov eax, 0
    ret
""",
        cpus=2,
        registers={"rcx": 60},
        on_host=_patch_by_dma,
    ),
    Program(
        "smp-slots-change-under-others",
        "While one processor has memory replaced, the other never sees the gap, nor an old page after a new one",
        """
    test edi, edi
    jnz reader
    mov ecx, 1
change:
    mov al, cl
    out 0xE0, al
wait_:
    cmp [abs DATA], ecx
    jne wait_
    inc ecx
    cmp ecx, 40
    jne change
    mov r8d, [abs DATA + 8]
    done
reader:
    xor ebx, ebx
    mov edx, 0x600000
read:
    mov eax, [rdx]
    cmp eax, ebx
    jae later
    inc dword [abs DATA + 8]            ; went back
later:
    cmp eax, 40
    jb good
    inc dword [abs DATA + 8]            ; saw nothing there
good:
    mov ebx, eax
    inc esi
    mov [rdx + 8], esi
    mov [abs DATA], eax
    jmp read
""",
        cpus=2,
        registers={"rcx": 40, "r8": 0},
        accesses=(),
        on_host=_swap_memory,
    ),
)
