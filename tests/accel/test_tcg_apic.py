"""The translator's local APIC."""

from __future__ import annotations

import ctypes
import struct
import threading

import pytest
from cardcage_tcg import layout as L
from tcg_cpu import GP, RAX, RBX, RCX, RDX, RSI, RSP, Cpu, load

TPR, EOI, LDR, DFR, SVR, ESR, ICR, ICR2, LVTT, TICR, TCCR, DCR = (
    0x80, 0xB0, 0xD0, 0xE0, 0xF0, 0x280, 0x300, 0x310, 0x320, 0x380, 0x390, 0x3E0,
)  # fmt: skip


def apic(cpu: Cpu, offset: int, value: int | None = None) -> int:
    """Read a register, or write it and return the action."""
    if value is not None:
        return cpu.call("apic_write", offset, ctypes.c_uint32(value))
    out = ctypes.c_uint32()
    cpu.call("apic_read", offset, ctypes.byref(out))
    return out.value


def msr(cpu: Cpu, index: int, value: int | None = None) -> int:
    """WRMSR (the action) or RDMSR (the value)."""
    cpu[RCX] = index
    if value is not None:
        cpu[RAX], cpu[RDX] = value & 0xFFFFFFFF, value >> 32
        return cpu.do("WRMSR")
    assert cpu.do("RDMSR") == L.H_CONTINUE
    return cpu[RAX] | cpu[RDX] << 32


def pair() -> tuple[Cpu, Cpu]:
    """Two processors of one VM in 64-bit mode, interrupts enabled, APICs on."""
    first = Cpu(load())
    second = Cpu(first.lib, first)
    for one in (first, second):
        one.long()
        one.flags = 0x202
        apic(one, SVR, 0x1FF)
    return first, second


def test_interrupt_priorities(cpu: Cpu) -> None:
    """The higher vector goes first, a lower class waits for EOI and TPR, and IF holds everything back."""
    cpu.long()
    apic(cpu, SVR, 0x1FF)
    for vector in (0x41, 0x52):
        cpu.call("apic_post", vector, 0)
    assert (cpu.call("check_events"), cpu.rip, cpu.get32("IRQ_PENDING")) == (L.H_REDIRECT, 0x7000, 1)
    cpu.do("STI", length=1)
    assert (cpu.get32("POLL"), cpu.rip) == (1, 0x7000)
    cpu.call("check_events")
    assert (cpu.taken(), apic(cpu, 0xA0)) == (0x52, 0x50)
    cpu.flags = 0x202
    cpu.call("check_events")
    assert cpu.taken() == 0x52
    assert apic(cpu, EOI, 0) == L.H_CONTINUE
    apic(cpu, TPR, 0x40)
    cpu.call("check_events")
    assert cpu.taken() == 0x52
    cpu.call("set_cr", 8, ctypes.c_uint64(3))
    cpu.call("check_events")
    assert (cpu.taken(), apic(cpu, TPR)) == (0x41, 0x30)


def test_level_interrupts_are_broadcast(cpu: Cpu) -> None:
    """EOI of a level-triggered vector leaves with R_EOI and its vector."""
    cpu.long()
    cpu.flags = 0x202
    apic(cpu, SVR, 0x1FF)
    cpu.call("apic_post", 0x61, 1)
    cpu.call("check_events")
    assert cpu.taken() == 0x61
    assert (apic(cpu, EOI, 0), cpu.get32("REASON"), cpu.get("INFO")) == (L.H_EXIT, L.R_EOI, 0x61)


def test_disabled_apic_accepts_nothing(cpu: Cpu) -> None:
    """A software-disabled APIC masks its LVT and ignores fixed interrupts."""
    cpu.call("apic_post", 0x41, 0)
    apic(cpu, LVTT, 0x41)
    assert (apic(cpu, 0x220), apic(cpu, LVTT)) == (0, 0x10041)


@pytest.mark.parametrize(
    ("address", "reached"),
    [
        (0xFEE00000, (0,)), (0xFEE01000, (1,)), (0xFEEFF000, (0, 1)), (0xFEE02000, ()), (0xFEE03004, (0, 1)),
        (0xFEE02004, (1,)),
        (0xFEE0300C, (0,)),
    ],
)  # fmt: skip
def test_messages_reach_their_destination(address: int, reached: tuple[int, ...]) -> None:
    """MSIs go by physical ID, flat logical mask, broadcast, and to one processor with the redirection hint."""
    cpus = pair()
    for i, one in enumerate(cpus):
        apic(one, LDR, 1 << 24 + i)
    cpus[0].lib.tcg_apic_message(ctypes.c_void_p(cpus[0].vm_at), ctypes.c_uint64(address), ctypes.c_uint32(0x45))
    assert tuple(i for i, one in enumerate(cpus) if apic(one, 0x220)) == reached


def test_cluster_logical_destinations() -> None:
    """In the cluster model the upper half names the cluster, 15 all of them."""
    cpus = pair()
    for i, one in enumerate(cpus):
        apic(one, DFR, 0x0FFFFFFF)
        apic(one, LDR, (i << 4 | 1) << 24)
    for dest, vector in ((0x11, 0x40), (0xF1, 0x41), (0x01, 0x42)):
        cpus[0].lib.tcg_apic_message(
            ctypes.c_void_p(cpus[0].vm_at), ctypes.c_uint64(0xFEE00004 | dest << 12), ctypes.c_uint32(vector)
        )
    assert [apic(one, 0x220) for one in cpus] == [6, 3]


def test_start_up_sequence() -> None:
    """INIT, then SIPI by the ICR reach the other processor as R_INIT and R_SIPI exits."""
    first, second = pair()
    apic(first, ICR2, 1 << 24)
    apic(first, ICR, 0xC500)
    apic(first, ICR, 0x8500)
    assert (second.call("check_events"), second.get32("REASON")) == (L.H_EXIT, L.R_INIT)
    apic(first, ICR, 0x0609)
    assert (second.call("check_events"), second.get32("REASON")) == (L.H_REDIRECT, L.R_INIT)
    second.put32("STARTUP", 1)
    apic(first, ICR, 0x0609)
    assert (second.call("check_events"), second.get32("REASON"), second.get("INFO")) == (L.H_EXIT, L.R_SIPI, 9)


@pytest.mark.parametrize(("shorthand", "reached"), [(0x40000, (0,)), (0x80000, (0, 1)), (0xC0000, (1,))])
def test_shorthands(shorthand: int, reached: tuple[int, ...]) -> None:
    """Destination shorthands: self, all, all but self."""
    cpus = pair()
    apic(cpus[0], ICR, 0x55 | shorthand)
    assert tuple(i for i, one in enumerate(cpus) if apic(one, 0x220)) == reached


def test_x2apic() -> None:
    """x2APIC mode: the transitions of the base MSR, derived LDR, 64-bit ICR, self IPI, and #GP for what is reserved."""
    first, second = pair()
    msr(first, 0x1B, 0xFEE00400)
    assert first.taken() == GP
    first.long()
    msr(first, 0x830, 0)
    assert first.taken() == GP
    for one in (first, second):
        one.long()
        assert msr(one, 0x1B, 0xFEE00C00) == L.H_REDIRECT  # interrupts are looked at
        one.put32("POLL", 0)
    assert (msr(second, 0x802), msr(second, 0x80D), msr(second, 0x803)) == (1, 2, 0x50014)
    assert msr(first, 0x830, 1 << 32 | 0x61) == L.H_CONTINUE
    assert msr(second, 0x823) == 2
    assert (msr(second, 0x83F, 0x62), msr(second, 0x823)) == (L.H_REDIRECT, 6)
    for index, value in (
        (0x80B, 1), (0x80E, 0), (0x802, 0), (0x808, 0x100), (0x1B, 0xFEE00800), (0x83F, 0x100), (0x1B, 0xFEE00C01),
        (0x1B, 1 << 40 | 0xFEE00C00), (0x1B, 1 << 51 | 0xFEE00C00), (0x1B, 1 << 63 | 0xFEE00C00), (0x1B, 0xFEE00E00),
    ):  # fmt: skip
        first.long()
        msr(first, index, value)
        assert (index, first.taken()) == (index, GP)


def test_timer_deadline(cpu: Cpu) -> None:
    """A TSC deadline in the past fires at once and disarms; without deadline mode the MSR is inert."""
    cpu.long()
    apic(cpu, SVR, 0x1FF)
    msr(cpu, 0x6E0, 1)
    assert (msr(cpu, 0x6E0), apic(cpu, 0x270)) == (0, 0)
    apic(cpu, LVTT, 0x400EC)
    msr(cpu, 0x6E0, 1)
    assert (apic(cpu, 0x270) >> (0xEC & 31) & 1, msr(cpu, 0x6E0)) == (1, 0)
    msr(cpu, 0x6E0, (1 << 63) - 1)
    assert cpu.get("LAPIC", L.LAPIC_TIMER_NEXT) > 1 << 50


def test_timer_counts(cpu: Cpu) -> None:
    """The counting timer divides, expires once or periodically, and only when its time has come."""
    cpu.long()
    apic(cpu, SVR, 0x1FF)
    apic(cpu, LVTT, 0x200EC)
    apic(cpu, DCR, 0b1011)
    apic(cpu, TICR, 0xFFFFFFFF)
    assert 0xF0000000 < apic(cpu, TCCR) <= 0xFFFFFFFF
    due = cpu.get("LAPIC", L.LAPIC_TIMER_NEXT)
    assert due == cpu.get("LAPIC", L.LAPIC_TIMER_START) + 0xFFFFFFFF
    apic(cpu, DCR, 0b1010)
    assert 0x70000000 * 256 < cpu.get("LAPIC", L.LAPIC_TIMER_PERIOD) == 0xFFFFFFFF * 128
    apic(cpu, TICR, 0)
    assert (apic(cpu, TCCR), cpu.get("LAPIC", L.LAPIC_TIMER_NEXT)) == (0, (1 << 64) - 1)


def test_what_cpuid_hides_of_the_apic(cpu: Cpu) -> None:
    """Without the x2APIC its mode is refused; without TSC deadlines so is their MSR, and the LVT has no such mode."""
    struct.pack_into("<I", cpu._vm, L.VM_HAS_LAPIC, 1)
    for index, value in ((0x1B, 0xFEE00C00), (0x6E0, 1)):
        cpu.long()
        msr(cpu, index, value)
        assert cpu.taken() == GP
    cpu.long()
    cpu[RCX] = 0x6E0
    cpu.do("RDMSR")
    assert cpu.taken() == GP
    apic(cpu, SVR, 0x1FF)
    apic(cpu, LVTT, 0x600EC)
    assert apic(cpu, LVTT) == 0x200EC


@pytest.mark.parametrize(("first", "then"), [(0x000EC, 0x200EC), (0x200EC, 0x000EC)])
def test_a_new_mode_leaves_the_count(cpu: Cpu, first: int, then: int) -> None:
    """Between one-shot and periodic the timer counts on from where it is."""
    cpu.long()
    apic(cpu, SVR, 0x1FF)
    apic(cpu, DCR, 0b1011)
    apic(cpu, LVTT, first)
    apic(cpu, TICR, 0xFFFFFFFF)
    start, due = cpu.get("LAPIC", L.LAPIC_TIMER_START), cpu.get("LAPIC", L.LAPIC_TIMER_NEXT)
    cpu.put("LAPIC", start - 0xF0000000, L.LAPIC_TIMER_START)
    cpu.put("LAPIC", due - 0xF0000000, L.LAPIC_TIMER_NEXT)
    apic(cpu, LVTT, then)
    assert (0 < apic(cpu, TCCR) <= 0x0FFFFFFF, apic(cpu, TICR)) == (True, 0xFFFFFFFF)
    assert cpu.get("LAPIC", L.LAPIC_TIMER_NEXT) == due - 0xF0000000


def test_a_new_mode_starts_no_count(cpu: Cpu) -> None:
    """A one-shot count that has come to zero stays there when the timer is made periodic."""
    cpu.long()
    apic(cpu, SVR, 0x1FF)
    apic(cpu, DCR, 0b1011)
    apic(cpu, LVTT, 0x000EC)
    apic(cpu, TICR, 0xFFFFFFFF)
    cpu.put("LAPIC", cpu.get("LAPIC", L.LAPIC_TIMER_START) - (5 << 32), L.LAPIC_TIMER_START)
    cpu.put("LAPIC", (1 << 64) - 1, L.LAPIC_TIMER_NEXT)
    assert apic(cpu, TCCR) == 0
    apic(cpu, LVTT, 0x200EC)
    assert (apic(cpu, TCCR), cpu.get("LAPIC", L.LAPIC_TIMER_NEXT)) == (0, (1 << 64) - 1)


def test_one_shot_ends_the_period_that_runs(cpu: Cpu) -> None:
    """A periodic timer in its sixth period, made one-shot, counts that period down and stops."""
    cpu.long()
    apic(cpu, SVR, 0x1FF)
    apic(cpu, DCR, 0b1011)
    apic(cpu, LVTT, 0x200EC)
    apic(cpu, TICR, 0xFFFFFFFF)
    start = cpu.get("LAPIC", L.LAPIC_TIMER_START) - 5 * 0xFFFFFFFF - 0xF0000000
    cpu.put("LAPIC", start, L.LAPIC_TIMER_START)
    apic(cpu, LVTT, 0x000EC)
    assert 0 < apic(cpu, TCCR) <= 0x0FFFFFFF
    assert cpu.get("LAPIC", L.LAPIC_TIMER_NEXT) == start + 6 * 0xFFFFFFFF


def test_halt_wakes_by_its_timer(cpu: Cpu) -> None:
    """HLT sleeps in native code until the timer's interrupt, which returns after the HLT."""
    cpu.long()
    cpu.flags = 0x202
    apic(cpu, SVR, 0x1FF)
    apic(cpu, LVTT, 0x30)
    apic(cpu, TICR, 100_000)
    assert (cpu.do("HLT", length=1), cpu.taken(), cpu.get32("HALTED")) == (L.H_REDIRECT, 0x30, 0)
    assert cpu.read(cpu[RSP], "Q") == (0x7001,)


def test_halt_without_apic(cpu: Cpu) -> None:
    """Without a local APIC HLT leaves with R_HALTED, and an ExtINT then ends it."""
    cpu.long()
    cpu.flags = 0x202
    struct.pack_into("<I", cpu._vm, L.VM_HAS_LAPIC, 0)
    assert (cpu.do("HLT", length=1), cpu.get32("REASON"), cpu.rip) == (L.H_EXIT, L.R_HALTED, 0x7001)
    cpu.put32("EXTINT", 1)
    assert (cpu.call("check_events"), cpu.get32("REASON")) == (L.H_EXIT, L.R_EXTINT)
    cpu.put32("EXTINT", 0)
    cpu.call("deliver_interrupt", 0x20)
    assert (cpu.taken(), cpu.get32("HALTED")) == (0x20, 0)


def test_kick_ends_a_halt(cpu: Cpu) -> None:
    """A kick comes back as R_POLL and the processor stays halted for the next entry."""
    cpu.long()
    cpu.call("kick")
    assert (cpu.do("HLT", length=1), cpu.get32("REASON"), cpu.get32("HALTED"), cpu.get32("POLL")) == (
        L.H_EXIT,
        L.R_POLL,
        1,
        1,
    )


def test_apic_page_round_trip(cpu: Cpu) -> None:
    """The register page is saved and restored, an interrupt in it is taken afterwards."""
    cpu.long()
    cpu.flags = 0x202
    apic(cpu, SVR, 0x1FF)
    apic(cpu, LDR, 0x01000000)
    cpu.call("apic_post", 0x77, 0)
    page = (ctypes.c_uint32 * 256)()
    cpu.call("apic_save", page)
    cpu.call("apic_reset")
    assert (cpu.call("check_events"), cpu.rip) == (L.H_REDIRECT, 0x7000)
    cpu.call("apic_load", page)
    cpu.call("check_events")
    assert (cpu.taken(), apic(cpu, LDR)) == (0x77, 0x01000000)


def test_a_deadline_is_not_there_after_another_state(cpu: Cpu) -> None:
    """A register page that is loaded has no deadline: that of before is not armed anew."""
    cpu.long()
    apic(cpu, SVR, 0x1FF)
    apic(cpu, LVTT, 0x400EC)
    page = (ctypes.c_uint32 * 256)()
    cpu.call("apic_save", page)
    msr(cpu, 0x6E0, (1 << 63) - 1)
    cpu.call("apic_load", page)
    assert (msr(cpu, 0x6E0), cpu.get("LAPIC", L.LAPIC_TIMER_NEXT)) == (0, (1 << 64) - 1)


def test_a_count_whose_time_has_come_is_saved(cpu: Cpu) -> None:
    """A one-shot count that is over, but whose interrupt was not requested yet, has something left in a saved page."""
    cpu.long()
    apic(cpu, SVR, 0x1FF)
    apic(cpu, LVTT, 0xEC)
    apic(cpu, TICR, 1)
    while apic(cpu, TCCR):
        pass
    page = (ctypes.c_uint32 * 256)()
    cpu.call("apic_save", page)
    assert (page[TCCR // 4], apic(cpu, 0x270)) == (1, 0)
    cpu.call("apic_load", page)
    cpu.flags = 0x202
    assert (cpu.do("HLT", length=1), cpu.taken()) == (L.H_REDIRECT, 0xEC)


def test_the_timer_thread_expires_in_one_step(cpu: Cpu) -> None:
    """The timer's thread takes no deadline back, and requests no interrupt, while another thread changes the timer."""
    cpu.long()
    apic(cpu, SVR, 0x1FF)
    apic(cpu, LVTT, 0x400EC)
    msr(cpu, 0x6E0, 1 << 62)
    cpu.put32("LAPIC", 1, L.LAPIC_TIMER_LOCK)
    cpu.put("LAPIC", 1, L.LAPIC_TIMER_NEXT)
    vm = ctypes.c_void_p(cpu.vm_at)
    thread = threading.Thread(target=cpu.lib.tcg_ticker, args=(vm,))
    thread.start()
    thread.join(0.2)  # long enough for one that does not wait
    cpu.put("LAPIC", (1 << 64) - 1, L.LAPIC_TIMER_NEXT)
    cpu.put("LAPIC", 1 << 61, L.LAPIC_TSC_DEADLINE)
    cpu.put32("LAPIC", 0, L.LAPIC_TIMER_LOCK)
    cpu.lib.tcg_close(vm)
    thread.join()
    assert (msr(cpu, 0x6E0), apic(cpu, 0x270)) == (1 << 61, 0)


@pytest.mark.parametrize(
    ("low", "high", "first", "icr", "answer", "reached"),
    [
        (3, 0, 0, 0x45, 2, (0, 1)), (2, 0, 0, 0x45, 1, (1,)), (1, 0, 1, 0x45, 1, (1,)), (0, 1, 0, 0x45, 0, ()),
        (3, 0, 0, 0x40045, -22, ()), (3, 0, 0, 0x845, -22, ()), (0xFFFFFFFF, 0, 0xFFFFFFFF, 0, 0, ()),
        (3, 0, 0, 5, 0, ()), (1 << 63, (1 << 64) - 1, 1 << 63, 0x45, 0, ()),
    ],
)  # fmt: skip
def test_interrupts_by_hypercall(
    low: int, high: int, first: int, icr: int, answer: int, reached: tuple[int, ...]
) -> None:
    """KVM_HC_SEND_IPI reaches the APIC IDs of its bitmap and counts them; shorthands and logical modes are refused."""
    cpus = pair()
    for register, value in ((RAX, 10), (RBX, low), (RCX, high), (RDX, first), (RSI, icr)):
        cpus[0][register] = value
    cpus[0].flags = 2
    assert cpus[0].do("HYPERCALL", length=3) == L.H_REDIRECT
    assert (cpus[0][RAX], cpus[0].rip) == (answer & 0xFFFFFFFFFFFFFFFF, 0x7003)
    assert tuple(i for i, one in enumerate(cpus) if apic(one, 0x220)) == reached
