"""Event delivery, system calls, flags and control registers of the translator's native half."""

from __future__ import annotations

import ctypes

import pytest
from cardcage_tcg import layout as L
from tcg_cpu import (
    CODE0,
    CODE3,
    CODE64,
    CODE64U,
    CS,
    DATA0,
    DATA3,
    DF,
    DS,
    ES,
    FS,
    GP,
    GS,
    IDT,
    IF,
    NP,
    PF,
    RAX,
    RCX,
    RDX,
    RSP,
    SF,
    SS,
    TABLES,
    TF,
    UD,
    VM,
    Cpu,
)


def test_real_interrupt_and_return(cpu: Cpu) -> None:
    """INT n in real mode pushes FLAGS, CS, IP of the next instruction and clears IF; IRET takes them back."""
    cpu.real()
    cpu.flags = 0x246
    cpu.write(0x21 * 4, "HH", 0x1234, 0x2000)
    assert cpu.do("INT", 0x21) == L.H_REDIRECT
    assert (cpu.rip, cpu.sel(CS), cpu.base(CS), cpu[RSP], cpu.flags) == (0x1234, 0x2000, 0x20000, 0xFFA, 0x46)
    assert cpu.read(0x30FFA, "HHH") == (0x7002, 0x100, 0x246)
    cpu.do("IRET", 2)
    assert (cpu.rip, cpu.base(CS), cpu[RSP], cpu.flags) == (0x7002, 0x1000, 0x1000, 0x246)


def test_real_mode_without_vectors_shuts_down(cpu: Cpu) -> None:
    """An interrupt table of no size turns any exception into a shutdown that names it and leaves the registers."""
    cpu.real()
    cpu.put32("IDT", 0, 8)
    assert cpu.do("RAISE", UD) == L.H_EXIT
    assert (cpu.get32("REASON"), cpu.get("INFO"), cpu.rip, cpu[RSP]) == (L.R_SHUTDOWN, UD, 0x7000, 0x1000)
    cpu.put32("REASON", 0)
    assert (cpu.call("check_events"), cpu.get32("REASON"), cpu.get("INFO")) == (L.H_EXIT, L.R_SHUTDOWN, UD)


@pytest.mark.parametrize("cpl", [0, 3])
def test_long_mode_fault_frame(cpu: Cpu, cpl: int) -> None:
    """A fault in 64-bit mode pushes an aligned frame with RF and its error code, from user mode on RSP0."""
    cpu.long(cpl)
    cpu.flags = 0x202
    cpu[RSP] = 0x40005
    assert cpu.call("raise", 14, 1, 6) == L.H_REDIRECT
    top = 0x50000 if cpl else 0x40000
    assert (cpu.taken(), cpu[RSP], cpu.flags, cpu.get32("CPL")) == (PF, top - 48, 2, 0)
    old_cs, old_ss = (CODE64U | 3, DATA3 | 3) if cpl else (CODE64, DATA0)
    assert cpu.read(top - 48, "QQQQQQ") == (6, 0x7000, old_cs, 0x10202, 0x40005, old_ss)
    assert cpu.sel(SS) == (0 if cpl else DATA0)
    cpu[RSP] += 8
    cpu.do("IRET", 8)
    assert (cpu.rip, cpu[RSP], cpu.sel(CS), cpu.sel(SS), cpu.get32("CPL"), cpu.flags) == (
        0x7000,
        0x40005,
        old_cs,
        old_ss,
        cpl,
        0x10202,
    )


def test_long_mode_ist(cpu: Cpu) -> None:
    """A gate with IST 1 switches stacks even within one privilege level."""
    cpu.long()
    cpu.write(IDT + 16 * 2 + 4, "B", 1)
    cpu.call("deliver_interrupt", 2)
    assert (cpu.taken(), cpu[RSP]) == (2, 0x60000 - 40)
    assert cpu.read(0x60000 - 40, "QQQQQ") == (0x7000, CODE64, 2, 0x40000, DATA0)


@pytest.mark.parametrize(
    ("vector", "access", "selector", "soft", "expected", "error"),
    [
        (0x30, 0x6E, CODE64, True, NP, 0x30 * 8 + 2),
        (0x30, 0x0E, CODE64, False, NP, 0x30 * 8 + 3),
        (0x30, 0x8C, CODE64, True, GP, 0x30 * 8 + 2),
        (0x30, 0x8E, CODE64, True, GP, 0x30 * 8 + 2),
        (0x30, 0xEE, CODE0, True, GP, CODE0),
        (0x30, 0xEE, DATA0, True, GP, DATA0),
        (0x30, 0xEE, 0, True, GP, 0),
        (0x30, 0x8E, 0, False, GP, 1),
        (0x30, 0xEE, 0xFFF8, True, GP, 0xFFF8),
    ],
)
def test_long_mode_bad_gates(
    cpu: Cpu, vector: int, access: int, selector: int, soft: bool, expected: int, error: int
) -> None:
    """A gate that cannot be used raises the manual's exception, with IDT and EXT bits in its error code."""
    cpu.long(cpl=3)
    cpu.write(IDT + 16 * vector + 2, "HBB", selector, 0, access)
    if soft:
        cpu.do("INT", vector)
    else:
        cpu.call("deliver_interrupt", vector)
    assert cpu.taken() == expected
    assert cpu.read(cpu[RSP], "QQ") == (error, 0x7000)


def test_double_and_triple_fault(cpu: Cpu) -> None:
    """#GP while #GP is delivered is #DF; without a gate for that the processor shuts down."""
    cpu.long()
    cpu.write(IDT + 16 * GP + 5, "B", 0)
    cpu.call("raise", GP, 1, 0)
    assert (cpu.taken(), cpu.read(cpu[RSP], "Q")) == (DF, (0,))
    cpu.long()
    cpu.write(IDT + 16 * GP + 5, "B", 0)
    cpu.write(IDT + 16 * DF + 5, "B", 0)
    assert (cpu.call("raise", GP, 1, 0), cpu.get32("REASON"), cpu[RSP]) == (L.H_EXIT, L.R_SHUTDOWN, 0x40000)


def test_benign_then_fault_is_no_double_fault(cpu: Cpu) -> None:
    """A fault while #UD is delivered is delivered as itself."""
    cpu.long()
    cpu.write(IDT + 16 * UD + 5, "B", 0x0E)
    cpu.do("RAISE", UD)
    assert (cpu.taken(), cpu.read(cpu[RSP], "Q")) == (NP, (UD * 8 + 3,))


def test_stack_fault_on_bad_stack(cpu: Cpu) -> None:
    """A not canonical RSP at delivery is #SS, and with no better stack a shutdown."""
    cpu.long()
    cpu[RSP] = 0x8000_0000_0000_0000
    cpu.write(IDT + 16 * SF + 4, "B", 1)
    cpu.do("RAISE", UD)
    assert (cpu.taken(), cpu.read(cpu[RSP], "QQ")) == (SF, (1, 0x7000))


@pytest.mark.parametrize("cpl", [0, 3])
def test_protected_interrupt(cpu: Cpu, cpl: int) -> None:
    """A 32-bit gate pushes ESP and SS only when privilege changes; IRETD undoes it."""
    cpu.protected(cpl)
    cpu.flags = 0x203
    cpu.do("INT", 0x80)
    if cpl:
        frame: tuple[int, ...] = (0x7002, CODE3 | 3, 0x203, 0x40000, DATA3 | 3)
        assert (cpu[RSP], cpu.sel(SS)) == (0x50000 - 20, DATA0)
    else:
        frame = (0x7002, CODE0, 0x203)
        assert cpu[RSP] == 0x40000 - 12
    assert cpu.read(cpu[RSP], f"{len(frame)}I") == frame
    assert (cpu.taken(), cpu.get32("CPL"), cpu.flags) == (0x80, 0, 3)
    cpu.do("IRET", 4)
    assert (cpu.rip, cpu[RSP], cpu.get32("CPL"), cpu.flags) == (0x7002, 0x40000, cpl, 0x203)


def test_return_to_user_drops_kernel_segments(cpu: Cpu) -> None:
    """IRET to an outer level makes data segments null that the level may not use, and keeps the others."""
    cpu.protected()
    cpu.call("load_segment", ES, DATA3)
    cpu.write(0x3F000, "IIIII", 0x9000, CODE3 | 3, 2, 0x1000, DATA3 | 3)
    cpu[RSP] = 0x3F000
    cpu.do("IRET", 4)
    assert (cpu.get32("CPL"), cpu.sel(ES), cpu.sel(DS), cpu.attr(DS) & 0x1000) == (3, DATA3, 0, 0x1000)


def test_virtual_8086(cpu: Cpu) -> None:
    """IRETD enters virtual-8086 mode, INT 0x80 leaves it to ring 0 with nine words pushed, and INT needs IOPL 3."""
    cpu.protected()
    cpu.write(0x3F000, "9I", 0x100, 0x2000, VM | 0x3002, 0xFFF0, 0x3000, 0x111, 0x222, 0x333, 0x444)
    cpu[RSP] = 0x3F000
    cpu.do("IRET", 4)
    assert cpu.get32("MODE") & (L.MODE_VM86 | L.MODE_PE | L.MODE_CPL3) == L.MODE_VM86 | L.MODE_CPL3
    assert [cpu.base(i) for i in (CS, SS, ES, DS, FS, GS)] == [0x20000, 0x30000, 0x1110, 0x2220, 0x3330, 0x4440]
    cpu.do("INT", 0x80)
    assert (cpu.taken(), cpu.get32("CPL"), cpu.sel(DS), cpu[RSP]) == (0x80, 0, 0, 0x50000 - 36)
    assert cpu.read(cpu[RSP], "9I") == (0x102, 0x2000, VM | 0x3002, 0xFFF0, 0x3000, 0x111, 0x222, 0x333, 0x444)
    cpu.write(cpu[RSP] + 8, "I", VM | 2)
    cpu.do("IRET", 4)
    cpu.do("INT", 0x80)
    assert (cpu.taken(), cpu.read(cpu[RSP], "II")) == (GP, (0, 0x102))


def test_nmi_blocks_until_iret(cpu: Cpu) -> None:
    """A second NMI waits for the handler's IRET."""
    cpu.long()
    cpu.call("inject_nmi")
    assert (cpu.call("check_events"), cpu.taken()) == (L.H_REDIRECT, 2)
    cpu.call("inject_nmi")
    cpu.call("check_events")
    assert cpu.get32("LAPIC", L.LAPIC_NMI) == 1
    cpu.do("IRET", 8)
    assert (cpu.rip, cpu.get32("POLL")) == (0x7000, 1)
    cpu.call("check_events")
    assert cpu.taken() == 2


def test_wrmsr_moves_the_segment_of_32_bit_code(cpu: Cpu) -> None:
    """FS_BASE and GS_BASE written in 32-bit code are the base that its FS and GS go by; TSC_ADJUST follows the TSC."""
    cpu.protected()
    for index, segment in ((0xC0000100, FS), (0xC0000101, GS)):
        cpu[RCX], cpu[RAX], cpu[RDX] = index, 0x123000, 0
        assert cpu.do("WRMSR") == L.H_CONTINUE
        assert (cpu.base(segment), cpu.get("SEGBASE", 8 * segment)) == (0x123000, 0x123000)
    before = cpu.get("TSC_OFFSET")
    cpu[RCX], cpu[RAX], cpu[RDX] = 0x10, 0, 1
    cpu.do("WRMSR")
    assert cpu.get("TSC_ADJUST") == cpu.get("TSC_OFFSET") - before & (1 << 64) - 1 != 0


def test_two_nmis_wait_where_none_is_handled(cpu: Cpu) -> None:
    """Two NMIs that come before the first is taken are two; of those that come during one, one is latched."""
    cpu.long()
    for _ in range(3):
        cpu.call("inject_nmi")
    assert (cpu.call("check_events"), cpu.taken(), cpu.get32("LAPIC", L.LAPIC_NMI)) == (L.H_REDIRECT, 2, 1)
    for _ in range(3):
        cpu.call("inject_nmi")
    assert cpu.get32("LAPIC", L.LAPIC_NMI) == 1
    cpu.do("IRET", 8)
    cpu.call("check_events")
    assert (cpu.taken(), cpu.get32("LAPIC", L.LAPIC_NMI)) == (2, 0)


def test_performance_counters_read_as_zero(cpu: Cpu) -> None:
    """RDPMC knows four counters, in ring 0 or with CR4.PCE."""
    for cpl, cr4, counter, fault in ((0, 0x20, 3, False), (0, 0x20, 4, True), (3, 0x20, 0, True), (3, 0x120, 0, False)):
        cpu.long(cpl)
        cpu.put("CR4", cr4)
        cpu[RAX] = cpu[RDX] = 5
        cpu[RCX] = counter
        done = cpu.do("RDPMC")
        assert (done, cpu[RAX], cpu[RDX]) == ((L.H_REDIRECT, 5, 5) if fault else (L.H_CONTINUE, 0, 0))


def test_only_code_breakpoints_need_steps(cpu: Cpu) -> None:
    """An enabled code breakpoint puts the processor into steps of one instruction; data and port breakpoints do not."""
    cpu.long()
    cpu.put("CR4", cpu.get("CR4") | 8)
    for dr7, steps in (
        (0x402, True),
        (0x10402, False),
        (0x20402, False),
        (0x30402, False),
        (0x400, False),
        (0x401, True),
    ):
        cpu[RAX] = dr7
        cpu.do("MOV_TO_DR", RAX | 7 << 4)
        assert bool(cpu.get32("MODE") & L.MODE_STEP) is steps, hex(dr7)


def test_a_set_interrupt_shadow_lasts_for_one_instruction(cpu: Cpu) -> None:
    """An interrupt shadow holds an NMI back until the next instruction has begun, and no longer."""
    cpu.long()
    cpu.flags = IF | 2
    cpu.put32("SHADOW", L.SHADOW_STI)
    cpu.call("update_mode")
    cpu.put32("LAPIC", 1, L.LAPIC_NMI)
    assert (cpu.call("check_events"), cpu.rip) == (L.H_REDIRECT, 0x7000)
    assert cpu.get32("MODE") & L.MODE_STEP
    cpu.do("BEGIN")
    assert (cpu.get32("SHADOW"), cpu.get32("POLL"), cpu.get32("MODE") & L.MODE_STEP) == (0, 1, 0)
    assert (cpu.call("check_events"), cpu.taken()) == (L.H_REDIRECT, 2)


def test_sysenter_in_long_mode(cpu: Cpu) -> None:
    """SYSENTER and SYSEXIT raise #UD in long mode, as on the AMD processor that CPUID names."""
    for instruction in ("SYSENTER", "SYSEXIT"):
        cpu.long(cpl=3)
        cpu.put("SYSENTER_CS", CODE0)
        cpu.flags = TF | 2
        cpu.do(instruction)
        assert cpu.taken() == UD


def test_syscall_and_sysret(cpu: Cpu) -> None:
    """SYSCALL saves RIP and RFLAGS, masks flags and loads flat segments; SYSRET goes back to user mode."""
    cpu.long(cpl=3)
    cpu.put("STAR", CODE0 << 32 | (DATA0 | 3) << 48)
    cpu.put("LSTAR", 0xFFFF_8000_0000_1000)
    cpu.put("SFMASK", IF | 0x40)
    cpu.flags = 0x246
    assert cpu.do("SYSCALL") == L.H_REDIRECT
    assert (cpu.rip, cpu[RCX], cpu[11], cpu.flags, cpu.sel(CS), cpu.sel(SS)) == (
        0xFFFF_8000_0000_1000,
        0x7002,
        0x246,
        6,
        CODE0,
        DATA0,
    )
    assert cpu.get32("MODE") & (L.MODE_64 | L.MODE_CPL3) == L.MODE_64
    cpu.do("SYSRET", 1)
    assert (cpu.rip, cpu.flags, cpu.get32("CPL"), cpu.sel(CS), cpu.sel(SS)) == (
        0x7002,
        0x246,
        3,
        DATA0 + 16 | 3,
        DATA0 + 8 | 3,
    )
    cpu.put("EFER", 0x500)
    cpu.do("SYSCALL")
    assert cpu.taken() == UD


@pytest.mark.parametrize(
    ("cpl", "iopl", "value", "expected"),
    [(0, 0, 0x3_7FD7, 0x7FD7), (3, 0, 0x3202, 0x2), (3, 3, 0x202, 0x3202), (3, 3, 0, 0x3002)],
)
def test_popf(cpu: Cpu, cpl: int, iopl: int, value: int, expected: int) -> None:
    """POPF changes IOPL only in ring 0 and IF only at or inside IOPL; it never sets VM or RF."""
    cpu.long(cpl)
    cpu.flags = iopl << 12 | 2
    cpu.write(0x40000, "Q", value)
    cpu.do("POPF", 8)
    assert (cpu.flags, cpu[RSP]) == (expected, 0x40008)
    cpu.flags = expected & ~TF
    cpu.do("PUSHF", 8)
    assert cpu.read(0x40000, "Q") == (expected & ~TF,)


def test_user_mode_is_refused(cpu: Cpu) -> None:
    """Privileged instructions raise #GP(0) in ring 3."""
    for helper, imm in (
        ("CLI", 0), ("STI", 0), ("HLT", 0), ("CLTS", 0), ("RDMSR", 0), ("WRMSR", 0), ("LGDT", 8), ("INVLPG", 0),
        ("SWAPGS", 0),
        ("MOV_TO_CR", 3 << 4), ("MOV_FROM_DR", 7 << 4), ("PRIVILEGED_NOP", 0), ("SYSRET", 1), ("LTR", 0), ("LMSW", 0),
    ):  # fmt: skip
        cpu.long(cpl=3)
        cpu.do(helper, imm)
        assert (helper, cpu.taken(), cpu.read(cpu[RSP], "QQ")) == (helper, GP, (0, 0x7000))


def test_control_register_checks(cpu: Cpu) -> None:
    """CR0, CR4 and EFER refuse what the manual refuses; entering long mode sets LMA."""
    cpu.protected()
    for n, value in ((0, 0x80000000), (0, 0x20000011), (4, 1 << 30), (0, 1 << 32)):
        assert cpu.call("set_cr", n, ctypes.c_uint64(value)) == L.H_REDIRECT
        assert cpu.taken() == GP
        cpu.protected()
    cpu.write(TABLES, "Q", TABLES + 0x1000 | 7)
    cpu.write(TABLES + 0x1000, "Q", 0x87)
    cpu.put("EFER", 0x100)
    for n, value in ((3, TABLES), (4, 0x20), (0, 0x80000011)):
        assert cpu.call("set_cr", n, ctypes.c_uint64(value)) == L.H_CONTINUE
    assert (cpu.get("EFER"), cpu.get32("MODE") & (L.MODE_LMA | L.MODE_64)) == (0x500, L.MODE_LMA)
    cpu[RCX], cpu[RAX], cpu[RDX] = 0xC0000080, 0x100, 0
    assert (cpu.do("WRMSR"), cpu.get("EFER")) == (L.H_REDIRECT, 0x500)


def test_msrs_that_are_native(cpu: Cpu) -> None:
    """FS base is read back and must be canonical; an unknown MSR goes to Python."""
    cpu.long()
    cpu[RCX], cpu[RAX], cpu[RDX] = 0xC0000100, 0x1234, 0xFFFF8000
    assert (cpu.do("WRMSR"), cpu.get("FSBASE"), cpu.base(FS)) == (L.H_CONTINUE, 0xFFFF800000001234, 0xFFFF800000001234)
    cpu[RAX] = cpu[RDX] = 0
    assert (cpu.do("RDMSR"), cpu[RAX], cpu[RDX]) == (L.H_CONTINUE, 0x1234, 0xFFFF8000)
    cpu[RCX] = 0x277
    assert (cpu.do("RDMSR"), cpu.get32("REASON"), cpu.rip) == (L.H_EXIT, L.R_MSR, 0x7000)
    cpu[RCX], cpu[RDX] = 0xC0000100, 0x8000_0000
    cpu.do("WRMSR")
    assert cpu.taken() == GP


def test_a_helper_that_never_repeats_its_accesses_ends(cpu: Cpu) -> None:
    """A helper whose stack another processor goes on moving, from one device address to another, is called again a
    bounded number of times."""
    cpu.long()
    calls = 0
    cpu[RSP] = 0x40000000
    cpu.put("CR0", cpu.get("CR0") & ~0x80000000)
    cpu.call("update_mode")
    action = cpu.do("PUSHF", 8)
    while action and cpu.get32("REASON") == L.R_DEVICE and calls < 1000:
        cpu.put32("DEVICE", cpu.get32("DEVICE", L.DEVICE_COUNT) + 1, L.DEVICE_COUNT)
        cpu[RSP] += 0x1000
        action = cpu.call("helper_again")
        calls += 1
    assert 0 < calls < 100


def test_pause_changes_nothing_but_its_count(cpu: Cpu) -> None:
    """PAUSE is counted, so that a processor that spins lets the host's other threads go on, and does nothing else."""
    cpu.real()
    cpu.flags = 0x8D7
    before = [cpu[register] for register in range(16)]
    assert [cpu.do("PAUSE", 0) for _ in range(100)] == [L.H_CONTINUE] * 100
    assert (cpu.get32("PAUSES"), cpu.flags, [cpu[register] for register in range(16)]) == (100, 0x8D7, before)
