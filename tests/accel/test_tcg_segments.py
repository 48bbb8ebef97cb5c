"""Segment loads and far transfers of the translator's native half."""

from __future__ import annotations

import pytest
from cardcage_tcg import layout as L
from tcg_cpu import (
    ABSENT,
    CODE0,
    CODE3,
    CODE16,
    CODE64,
    CODE64U,
    CONFORM,
    CS,
    DATA0,
    DATA3,
    DATA16,
    DS,
    GATE,
    GDT,
    GP,
    NP,
    NT,
    RAX,
    RBX,
    READONLY,
    RSP,
    SF,
    SS,
    TR,
    TSS,
    TSS2SEL,
    TSSSEL,
    Cpu,
)


@pytest.mark.parametrize(
    ("cpl", "seg", "selector", "expected", "error"),
    [
        (0, DS, DATA0, None, 0), (0, DS, 0, None, 0), (0, DS, 3, None, 0), (0, DS, CODE0, None, 0),
        (0, DS, CONFORM | 3, None, 0),
        (3, DS, DATA0, GP, DATA0), (0, DS, DATA0 | 3, GP, DATA0), (0, DS, ABSENT, NP, ABSENT),
        (0, DS, TSSSEL, GP, TSSSEL),
        (0, DS, 0x1000, GP, 0x1000), (0, DS, DATA0 | 4, GP, DATA0 | 4), (0, SS, 0, GP, 0), (0, SS, DATA0, None, 0),
        (0, SS, DATA3, GP, DATA3), (0, SS, READONLY, GP, READONLY), (0, SS, ABSENT, SF, ABSENT),
        (0, SS, CODE0, GP, CODE0),
        (3, SS, DATA3 | 3, None, 0), (3, SS, DATA3, GP, DATA3),
    ],
)  # fmt: skip
def test_segment_loads(cpu: Cpu, cpl: int, seg: int, selector: int, expected: int | None, error: int) -> None:
    """MOV to a segment register checks type, privilege and presence, and sets the accessed bit."""
    cpu.protected(cpl)
    cpu[RAX] = selector
    action = cpu.do("MOV_SREG", seg | RAX << 4)
    if expected is None:
        assert (action in (L.H_CONTINUE, L.H_REDIRECT), cpu.sel(seg)) == (True, selector)
        if selector > 3:
            assert cpu.ram[GDT + (selector & ~7) + 5] & 1
        return
    assert (action, cpu.taken(), cpu.read(cpu[RSP], "II")) == (L.H_REDIRECT, expected, (error, 0x7000))


def test_null_stack_in_64_bit_mode(cpu: Cpu) -> None:
    """64-bit code may load SS with a null selector of its own privilege, unless that is 3."""
    cpu.long()
    cpu[RAX] = 0
    assert (cpu.do("MOV_SREG", SS), cpu.sel(SS), cpu.get32("CPL")) == (L.H_CONTINUE, 0, 0)
    cpu.long(cpl=3)
    cpu.do("MOV_SREG", SS)
    assert cpu.taken() == GP


def test_flat_mode_bit(cpu: Cpu) -> None:
    """A segment with a base takes MODE_FLAT away, and redirects because blocks depend on it."""
    cpu.protected()
    assert cpu.get32("MODE") & L.MODE_FLAT
    cpu[RAX] = DATA16
    assert (cpu.do("MOV_SREG", DS), cpu.get32("MODE") & L.MODE_FLAT, cpu.rip) == (L.H_REDIRECT, 0, 0x7002)


@pytest.mark.parametrize(
    ("cpl", "selector", "offset", "expected", "error"),
    [
        (0, CODE0, 0x1234, None, 0), (0, CONFORM, 0x1234, None, 0), (3, CONFORM, 0x1234, None, 0),
        (3, CODE0, 0, GP, CODE0),
        (0, CODE3, 0, GP, CODE3), (0, DATA0, 0, GP, DATA0), (0, 0, 0, GP, 0), (0, CODE16, 0x10000, GP, 0),
        (0, CODE0 | 3, 0, GP, CODE0),
    ],
)  # fmt: skip
def test_far_jumps(cpu: Cpu, cpl: int, selector: int, offset: int, expected: int | None, error: int) -> None:
    """A far JMP checks the code segment's privilege and limit; CS gets the current privilege as RPL."""
    cpu.protected(cpl)
    cpu.do("FAR_JMP", 4, info=(selector, offset))
    if expected is None:
        assert (cpu.rip, cpu.sel(CS), cpu.get32("CPL")) == (offset, selector | cpl, cpl)
    else:
        assert (cpu.taken(), cpu.read(cpu[RSP], "II")) == (expected, (error, 0x7000))


def test_far_call_and_return_across_sizes(cpu: Cpu) -> None:
    """CALL FAR to a 16-bit segment and RETF with released bytes come back to the caller."""
    cpu.protected()
    cpu.do("FAR_CALL", 4, 7, info=(CODE16, 0x10))
    assert (cpu.rip, cpu.sel(CS), cpu.get32("MODE") & L.MODE_32, cpu[RSP]) == (0x10, CODE16, 0, 0x3FFF8)
    cpu.do("RETF", 4 | 12 << 4)
    assert (cpu.rip, cpu.sel(CS), cpu[RSP]) == (0x7007, CODE0, 0x4000C)


def test_call_gate_to_inner_privilege(cpu: Cpu) -> None:
    """A 32-bit call gate copies its parameters to the inner stack; RETF goes back out and releases them on both."""
    cpu.protected(cpl=3)
    cpu.write(GDT + GATE, "HHBBH", 0x5678, CODE0, 2, 0xEC, 0)
    cpu.write(0x40000, "II", 0xAAAA, 0xBBBB)
    cpu.do("FAR_CALL", 4, 7, info=(GATE | 3, 0))
    assert (cpu.rip, cpu.sel(CS), cpu.get32("CPL")) == (0x5678, CODE0, 0)
    assert cpu.read(cpu[RSP], "6I") == (0x7007, CODE3 | 3, 0xAAAA, 0xBBBB, 0x40000, DATA3 | 3)
    cpu.do("RETF", 4 | 8 << 4)
    assert (cpu.rip, cpu.sel(CS), cpu[RSP], cpu.get32("CPL")) == (0x7007, CODE3 | 3, 0x40008, 3)


def test_long_call_gate(cpu: Cpu) -> None:
    """A 64-bit call gate from user code switches to RSP0 with a null SS."""
    cpu.long(cpl=3)
    cpu.write(GDT + GATE, "HHBBHII", 0x5678, CODE64, 0, 0xEC, 0, 0, 0)
    cpu.do("FAR_CALL", 4, 7, info=(GATE | 3, 0))
    assert (cpu.rip, cpu.sel(SS), cpu.get32("CPL"), cpu[RSP]) == (0x5678, 0, 0, 0x50008 - 32)
    assert cpu.read(cpu[RSP], "4Q") == (0x7007, CODE64U | 3, 0x40000, DATA3 | 3)
    cpu.do("RETF", 8)
    assert (cpu.rip, cpu[RSP], cpu.get32("CPL"), cpu.sel(SS)) == (0x7007, 0x40000, 3, DATA3 | 3)


def test_compatibility_mode_round_trip(cpu: Cpu) -> None:
    """A far return from 64-bit code reaches 32-bit compatibility mode, and a far jump comes back."""
    cpu.long()
    cpu.write(0x40000, "QQ", 0x9000, CODE0)
    cpu.do("RETF", 8)
    assert cpu.get32("MODE") & (L.MODE_64 | L.MODE_32 | L.MODE_LMA) == L.MODE_32 | L.MODE_LMA
    cpu.do("FAR_JMP", 4, info=(CODE64, 0xA000))
    assert (cpu.get32("MODE") & L.MODE_64, cpu.rip) == (L.MODE_64, 0xA000)


def test_task_switch_and_back(cpu: Cpu) -> None:
    """CALL to a TSS saves the old task, marks the new one busy and nested; IRET with NT returns."""
    cpu.protected()
    cpu[RBX] = 0x77
    new = TSS + 0x1000
    cpu.write(new + 0x20, "II8I", 0x9999, 2, *range(1, 5), 0x60000, 6, 7, 8)
    cpu.write(new + 0x48, "6I", DATA0, CODE0, DATA0, DATA0, 0, 0)
    assert cpu.do("FAR_CALL", 4, 7, info=(TSS2SEL, 0)) == L.H_REDIRECT
    assert (cpu.rip, cpu[RBX], cpu[RSP], cpu.sel(TR), cpu.flags & NT, cpu.get("CR0") & 8) == (
        0x9999,
        4,
        0x60000,
        TSS2SEL,
        NT,
        8,
    )
    assert cpu.read(TSS + 0x20, "I") + cpu.read(new, "H") + (cpu.ram[GDT + TSS2SEL + 5],) == (0x7007, TSSSEL, 0x8B)
    cpu.ram[GDT + TSSSEL + 5] |= 2
    cpu.do("IRET", 4)
    assert (cpu.rip, cpu[RBX], cpu[RSP], cpu.sel(TR), cpu.ram[GDT + TSS2SEL + 5]) == (
        0x7007,
        0x77,
        0x40000,
        TSSSEL,
        0x89,
    )
