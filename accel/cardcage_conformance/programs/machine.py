"""Acts of the machine on a running guest: state read and set, memory remapped, code and tables written; clocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import evolve
from cardcage.memory import RamBlock, RamRange

from cardcage_conformance.conformance import Fault, Program

if TYPE_CHECKING:
    from cardcage_conformance.lab import Lab


def _set_the_same_state(lab: Lab) -> bool:
    vcpu = lab.vcpus[0]
    before = vcpu.get_state()
    vcpu.set_state(evolve(before, events=evolve(before.events, halted=False)))
    return True


def _change_state(lab: Lab) -> bool:
    vcpu = lab.vcpus[0]
    state = vcpu.get_state()
    state.events.halted = False
    state.registers.r15 = 0xFEDCBA9876543210
    state.registers.rip = lab.code.labels["at_elsewhere"]
    state.registers.rflags |= 0x8D5
    state.system.cr2 = 0x1234
    state.system.fs = evolve(state.system.fs, base=0x60100)
    xsave = bytearray(state.fpu.xsave)
    xsave[160:176] = bytes(range(16))  # XMM0 in the FXSAVE layout
    xsave[512] |= 3
    state.fpu.xsave = bytes(xsave)
    vcpu.set_state(state)
    return True


def _inject_exception(lab: Lab) -> bool:
    vcpu = lab.vcpus[0]
    state = vcpu.get_state()
    state.events.halted = False
    state.events.exception, state.events.error_code = 13, 0x1234
    vcpu.set_state(state)
    return True


def _state_is_plausible(lab: Lab) -> list[str]:
    state = lab.state()
    system = state.system
    wanted = {
        "cs.selector": (system.cs.selector, 8),
        "cs.l": (system.cs.l, 1),
        "ss.selector": (system.ss.selector, 0x10),
        "ss.base": (system.ss.base, 0),
        "fs.base": (system.fs.base, 0x60000),
        "gs.base": (system.gs.base, 0xFFFF800000060000),
        "gdt.base": (system.gdt.base, 0x1000),
        "idt.limit": (system.idt.limit, 0xFFF),
        "tr.base": (system.tr.base, 0x3000),
        "cr0": (system.cr0, 0x80010033),
        "cr3": (system.cr3, 0x50000),
        "cr4": (system.cr4 & 0x6A0, 0x6A0),
        "efer": (system.efer, 0xD01),
        "MSR LSTAR": (state.msrs.get(0xC0000082), 0x123456),
        "MSR KERNEL_GS_BASE": (state.msrs.get(0xC0000102), 0x60200),
        "DR0": (state.debug[0], 0x61000),
        "XMM1": (int.from_bytes(state.fpu.xsave[176:192], "little"), 0x1122334455667788),
        "RFLAGS": (state.registers.rflags & 0xCD5, 0x401),
    }
    return [f"{name} read as {have!r}, expected {want:#x}" for name, (have, want) in wanted.items() if have != want]


def _swap_memory(lab: Lab, value: int) -> None:
    """1: RAM at 0x600000 becomes a device's; 2: it shows other RAM; 3: read-only RAM."""
    old = [one for one in lab.memory.ranges if one.priority == 2]
    if value == 1:
        low, high = RamRange(0, 0x600000, lab.ram), RamRange(0x601000, 0x1FF000, lab.ram, 0x601000)
        gone = tuple(one for one in lab.memory.ranges if one.address == 0)
        with lab.vm.quiesce():
            lab.memory.change(add=(low, high), remove=gone)
        return
    block = RamBlock(4096, "swapped")
    block.view[:4] = bytes([value]) * 4
    with lab.vm.quiesce():
        lab.memory.change(add=(RamRange(0x600000, 4096, block, readonly=value == 3, priority=2),), remove=tuple(old))


def _write_page_table(lab: Lab, value: int) -> None:
    lab.write(0x55000 + 0x65 * 8, (0x60007 + value * 0x1000).to_bytes(8, "little"))


def _write_bytes(lab: Lab, value: int) -> None:
    lab.write(0x60000, bytes([value]) * 8)


PROGRAMS = (
    Program(
        "state-round-trip",
        "Reading all state and setting it again is invisible to the guest",
        """
    wrmsr64 0xC0000082, 0x123456
    wrmsr64 0xC0000102, DATA + 0x200
    wrmsr64 0xC0000100, DATA
    mov rax, 0x1122334455667788
    mov [abs DATA], rax
    movdqu xmm5, [abs DATA]
    mov [abs DATA + 0x208], rax
    mov r9, rax
    stc
    std
    hlt
    flags r8
    and r8, 0x401
    cld
    mov ecx, 0xC0000082
    rdmsr
    mov r10d, eax
    movdqu [abs DATA + 0x40], xmm5
    mov r11, [abs DATA + 0x40]
    mov r12, [fs:0]
    swapgs
    mov r13, [gs:8]
    sub r9, r12
    call over
over:
    pop rbx
    done
""",
        on_halt=_set_the_same_state,
        registers={
            "r8": 0x401,
            "r9": 0,
            "r10": 0x123456,
            "r11": 0x1122334455667788,
            "r12": 0x1122334455667788,
            "r13": 0x1122334455667788,
        },
    ),
    Program(
        "state-read",
        "What a processor holds is what its state shows: segments, control registers, MSRs, debug and SSE registers",
        """
    wrmsr64 0xC0000082, 0x123456
    wrmsr64 0xC0000102, DATA + 0x200
    wrmsr64 0xC0000100, DATA
    wrmsr64 0xC0000101, HIGH + DATA
    mov eax, 0x61000
    mov dr0, rax
    mov rax, 0x1122334455667788
    mov [abs DATA], rax
    mov qword [abs DATA + 8], 0
    movdqu xmm1, [abs DATA]
    xor eax, eax
    inc eax
    std
    stc
    done
""",
        registers={"rax": 1},
        check=_state_is_plausible,
    ),
    Program(
        "state-set",
        "State that the machine changed while the processor stood still is what the guest goes on with",
        """
    mov dword [abs DATA + 0x108], 0x55
    hlt
    failed
at_elsewhere:
    flags r8
    mov rax, cr2
    mov r9, rax
    mov r10d, [fs:8]
    movdqu [abs DATA], xmm0
    mov r11, [abs DATA]
    xor eax, eax
    done
""",
        on_halt=_change_state,
        registers={
            "r15": 0xFEDCBA9876543210,
            "r8": 0x8D5,
            "r9": 0x1234,
            "r10": 0x55,
            "r11": 0x0706050403020100,
        },
    ),
    Program(
        "pending-exception",
        "An exception that the machine left pending in the state is delivered first, with its error code",
        """
    expect_fault over
    hlt
at_behind:
    failed
over:
    done
""",
        on_halt=_inject_exception,
        faults=(Fault(13, 0x1234, rip="at_behind"),),
    ),
    Program(
        "memory-remapped-by-host",
        "Slots that change under quiescence show at once: RAM, then a device, other RAM, then ROM",
        """
    mov ebx, 0x600000
    mov dword [rbx], 0x11111111
    mov r8d, [rbx]
    host 1
    mov r9d, [rbx]
    mov [rbx], ebx
    host 2
    mov r10d, [rbx]
    mov dword [rbx + 4], 7
    mov r11d, [rbx + 4]
    host 3
    mov r12d, [rbx]
    mov dword [rbx], 9
    mov r13d, [rbx]
    done
""",
        on_host=_swap_memory,
        registers={
            "r8": 0x11111111,
            "r9": 0xFFFFFFFF,
            "r10": 0x02020202,
            "r11": 7,
            "r12": 0x03030303,
            "r13": 0x03030303,
        },
        accesses=(
            ("read", 0x600000, 4, 0xFFFFFFFF),
            ("write", 0x600000, 4, 0x600000),
            ("write", 0x600000, 4, 9),
        ),
    ),
    Program(
        "page-table-by-dma",
        "A page table entry that a device wrote counts after INVLPG",
        """
    mov dword [abs 0x61000], 1
    mov dword [abs 0x62000], 2
    host 1
    invlpg [abs 0x65000]
    mov r8d, [abs 0x65000]
    host 2
    invlpg [abs 0x65000]
    mov r9d, [abs 0x65000]
    done
""",
        on_host=_write_page_table,
        registers={"r8": 1, "r9": 2},
    ),
    Program(
        "data-by-dma",
        "Data that a device wrote is read at once",
        """
    mov r8, [abs DATA]
    host 0x5A
    mov r9, [abs DATA]
    host 0xA5
    mov r10, [abs DATA]
    done
""",
        on_host=_write_bytes,
        registers={"r8": 0, "r9": 0x5A5A5A5A5A5A5A5A, "r10": 0xA5A5A5A5A5A5A5A5},
    ),
    Program(
        "tsc",
        "RDTSC never goes backwards, advances, and follows a write of its MSR",
        """
    mov ebx, 100
    rdtsc
    shl rdx, 32
    or rax, rdx
    mov r8, rax
again:
    rdtsc
    shl rdx, 32
    or rax, rdx
    cmp rax, r8
    jb backwards
    mov r9, rax
    sub r9, r8
    add r10, r9
    mov r8, rax
    dec ebx
    jnz again
    test r10, r10
    setnz r11b
    movzx r11, r11b
    wrmsr64 0x10, 0x100000000000
    rdtsc
    shl rdx, 32
    or rax, rdx
    shr rax, 44
    mov r12, rax
    xor eax, eax
    xor edx, edx
    done
backwards:
    failed
""",
        registers={"r11": 1, "r12": 1},
        emulated="its guests cannot write their TSC",
    ),
    Program(
        "rdrand",
        "RDRAND succeeds within ten tries and does not repeat itself",
        """
    mov ecx, 10
one:
    rdrand rax
    jc first
    dec ecx
    jnz one
    failed
first:
    mov ecx, 10
two:
    rdrand rbx
    jc second
    dec ecx
    jnz two
    failed
second:
    cmp rax, rbx
    setne r8b
    movzx r8, r8b
    done
""",
        registers={"r8": 1},
        needs=("rdrand",),
    ),
)
