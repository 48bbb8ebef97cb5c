"""8254, HPET, ACPI PM timer: counters that follow the machine's clock exactly, and their interrupts."""

from __future__ import annotations

import pytest
from cardcage_pc.acpi.pm import AcpiPm
from cardcage_pc.chips.hpet import Hpet
from cardcage_pc.chips.pit import FREQUENCY, Pit
from cardcage_pc.chips.rtc import Rtc, RtcOptions
from hypothesis import given, settings
from hypothesis import strategies as st
from pc_kit import SECOND, Kit


@pytest.fixture
def kit() -> Kit:
    return Kit()


@pytest.fixture
def pit(kit: Kit) -> Pit:
    return kit.plugged(Pit())


def program(pit: Pit, channel: int, mode: int, count: int, *, bcd: bool = False) -> None:
    pit.write(3, 1, channel << 6 | 0x30 | mode << 1 | bcd)
    pit.write(channel, 1, count & 0xFF)
    pit.write(channel, 1, count >> 8)


def latched(pit: Pit, channel: int) -> int:
    pit.write(3, 1, channel << 6)
    return pit.read(channel, 1) | pit.read(channel, 1) << 8


def ticks(count: int) -> int:
    """Nanoseconds by which *count* ticks have passed."""
    return -(-count * SECOND // FREQUENCY)


# 8254


@pytest.mark.parametrize("mode", [2, 3])
def test_periodic_modes_interrupt_once_a_period(kit: Kit, pit: Pit, mode: int) -> None:
    """Modes 2 and 3 give one edge at the end of each period, none when they are programmed."""
    program(pit, 0, mode, 11932)
    assert kit.edges[0] == 0
    for period in range(1, 11):
        kit.clock.advance(ticks(11932 * period) - kit.clock.now() - 1)
        assert kit.edges[0] == period - 1
        kit.clock.advance(1)
        assert kit.edges[0] == period


def test_mode_0_interrupts_once_at_terminal_count(kit: Kit, pit: Pit) -> None:
    """Mode 0 raises OUT when the count has run out, and leaves it high until the next."""
    program(pit, 0, 0, 1000)
    kit.clock.advance(ticks(1000) - 1)
    assert not kit.level(0)
    kit.clock.advance(SECOND)
    assert (kit.level(0), kit.edges[0]) == (True, 1)
    program(pit, 0, 0, 1000)
    assert not kit.level(0)


def test_the_count_follows_the_clock(kit: Kit, pit: Pit) -> None:
    """A latched count is the reload value less the ticks that have passed, and wraps in mode 2."""
    program(pit, 0, 2, 0)
    kit.clock.advance(ticks(1000))
    assert latched(pit, 0) == 0x10000 - 1000
    kit.clock.advance(ticks(0x10000 + 1000) - kit.clock.now())
    assert latched(pit, 0) == 0x10000 - 1000


def test_mode_3_counts_by_two(kit: Kit, pit: Pit) -> None:
    """The square wave's counter falls by two a tick, its output is high for the first half."""
    program(pit, 2, 3, 1000)
    pit.write_speaker(0, 1, 1)
    kit.clock.advance(ticks(100))
    assert latched(pit, 2) == 800
    assert pit.read_speaker(0, 1) & 0x20
    kit.clock.advance(ticks(500))
    assert (latched(pit, 2), pit.read_speaker(0, 1) & 0x20) == (800, 0)


def test_a_latched_count_stays_until_it_is_read(kit: Kit, pit: Pit) -> None:
    """The first latch wins until both its bytes were read."""
    program(pit, 0, 2, 50000)
    pit.write(3, 1, 0)
    kit.clock.advance(ticks(300))
    pit.write(3, 1, 0)
    assert pit.read(0, 1) | pit.read(0, 1) << 8 == 50000
    assert latched(pit, 0) == 49700


def test_read_back_gives_status_then_count(pit: Pit) -> None:
    """The read-back command latches status and count of the chosen channels; status is read first."""
    pit.write(3, 1, 0x34)
    pit.write(3, 1, 0xC2)
    assert pit.read(0, 1) == 0x80 | 0x40 | 0x34, "OUT high, null count, both bytes, mode 2"
    program(pit, 0, 2, 1234)
    pit.write(3, 1, 0xC2)
    assert pit.read(0, 1) == 0xB4
    assert pit.read(0, 1) | pit.read(0, 1) << 8 == 1234


def test_bcd_counts_in_decimal(kit: Kit, pit: Pit) -> None:
    """In BCD mode the count is four decimal digits, 0 standing for 10000."""
    program(pit, 0, 2, 0x1000, bcd=True)
    kit.clock.advance(ticks(1))
    assert latched(pit, 0) == 0x0999
    program(pit, 0, 0, 0, bcd=True)
    kit.clock.advance(ticks(1))
    assert latched(pit, 0) == 0x9999


def test_port_61_calibration_as_linux_does_it(kit: Kit, pit: Pit) -> None:
    """Channel 2 in mode 0 with the gate opened: OUT2 rises after exactly the count, which calibrates the TSC."""
    pit.write_speaker(0, 1, 0x01)
    program(pit, 2, 0, 59659)
    kit.clock.advance(ticks(59659) - 1)
    assert not pit.read_speaker(0, 1) & 0x20
    kit.clock.advance(1)
    assert pit.read_speaker(0, 1) & 0x20


def test_a_low_gate_holds_mode_0_and_restarts_mode_1(kit: Kit, pit: Pit) -> None:
    """GATE low stops the count in mode 0; its rising edge triggers mode 1."""
    pit.write_speaker(0, 1, 1)
    program(pit, 2, 0, 1000)
    kit.clock.advance(ticks(400))
    pit.write_speaker(0, 1, 0)
    kit.clock.advance(SECOND)
    assert latched(pit, 2) == 600
    program(pit, 2, 1, 1000)
    assert pit.read_speaker(0, 1) & 0x20
    pit.write_speaker(0, 1, 1)
    assert not pit.read_speaker(0, 1) & 0x20
    kit.clock.advance(ticks(1000))
    assert pit.read_speaker(0, 1) & 0x20


def test_too_fast_a_rate_is_held_to_what_the_host_can_bear(kit: Kit, pit: Pit) -> None:
    """A period of two ticks gives at most 20,000 interrupts a second."""
    program(pit, 0, 2, 2)
    kit.clock.advance(SECOND // 100)
    assert 0 < kit.edges[0] <= 200


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.sampled_from([1, 2]), st.integers(0, 0xFFFF), st.integers(0, 10**7)),
        max_size=60,
    )
)
def test_no_sequence_of_accesses_breaks_the_pit(steps: list[tuple[int, int, int, int]]) -> None:
    """Any accesses at any time read back as bytes, and no interrupt comes without a loaded channel 0."""
    kit = Kit()
    pit = kit.plugged(Pit())
    for offset, size, value, wait in steps:
        if offset == 4:
            pit.write_speaker(0, 1, value & 0xFF)
            assert 0 <= pit.read_speaker(0, 1) <= 0xFF
        else:
            size = min(size, 4 - offset)
            pit.write(offset, size, value)
            assert 0 <= pit.read(offset, size) < 1 << 8 * size
        kit.clock.advance(wait)


# ACPI PM timer


def test_the_pm_timer_runs_at_3579545_hz(kit: Kit) -> None:
    """The 24-bit counter is the clock in units of the PM timer, exactly."""
    pm = kit.plugged(AcpiPm())
    kit.clock.advance(2 * SECOND)
    assert pm.read(8, 4) == 2 * 3_579_545
    kit.clock.advance(8 * SECOND)
    assert pm.read(8, 4) == 35_795_450 & 0xFFFFFF


def test_the_pm_timer_interrupts_when_its_highest_bit_changes(kit: Kit) -> None:
    """TMR_STS is set at each change of bit 23, raises SCI when enabled, and is cleared by writing one."""
    pm = kit.plugged(AcpiPm())
    pm.write(2, 2, 1)
    kit.clock.advance((1 << 23) * SECOND // 3_579_545)
    assert not kit.level(9)
    kit.clock.advance(1)
    assert kit.level(9)
    assert pm.read(0, 2) == 1
    pm.write(0, 2, 1)
    assert not kit.level(9)
    kit.clock.advance(3 * SECOND)
    assert kit.level(9)


def test_the_power_button_raises_sci_and_s5_powers_off(kit: Kit) -> None:
    """Pressing the button sets PWRBTN_STS; SLP_EN with S5's type asks for power-off, another type does not."""
    pm = kit.plugged(AcpiPm())
    pm.power_button()
    assert (pm.read(0, 2), kit.level(9)) == (0x100, False)
    pm.write(2, 2, 0x100)
    assert kit.level(9)
    pm.write(4, 2, 0x2400)
    assert kit.requests == []
    pm.write(4, 2, 0x2000)
    assert (kit.requests, pm.read(4, 2)) == ([("off",)], 1)


# HPET


@pytest.fixture
def hpet(kit: Kit) -> Hpet:
    return kit.plugged(Hpet())


def test_hpet_capabilities_name_three_timers_and_the_period(hpet: Hpet) -> None:
    """The capability register says 10 ns, 64 bits, legacy routing and three comparators."""
    assert hpet.read(0, 8) == 0x00989680_8086A201
    assert hpet.read(4, 4) == 10_000_000


def test_the_main_counter_follows_the_clock_while_enabled(kit: Kit, hpet: Hpet) -> None:
    """The counter stands still until enabled, then counts tens of nanoseconds, and can be set while stopped."""
    kit.clock.advance(SECOND)
    assert hpet.read(0xF0, 8) == 0
    hpet.write(0x10, 4, 1)
    kit.clock.advance(1005)
    assert hpet.read(0xF0, 8) == 100
    hpet.write(0x10, 4, 0)
    hpet.write(0xF0, 8, 0xFFFFFFFF_00000000)
    kit.clock.advance(1000)
    assert (hpet.read(0xF0, 4), hpet.read(0xF4, 4)) == (0, 0xFFFFFFFF)


def test_a_one_shot_comparator_fires_at_its_value(kit: Kit, hpet: Hpet) -> None:
    """An enabled edge-triggered comparator gives one edge on its routed line when the counter matches."""
    hpet.write(0x100, 8, 1 << 2 | 20 << 9)
    hpet.write(0x108, 8, 5000)
    hpet.write(0x10, 4, 1)
    kit.clock.advance(49_999)
    assert kit.edges[20] == 0
    kit.clock.advance(1)
    assert kit.edges[20] == 1
    kit.clock.advance(SECOND)
    assert kit.edges[20] == 1


def test_periodic_as_linux_programs_it(kit: Kit, hpet: Hpet) -> None:
    """SETVAL, accumulator, period: an edge at the accumulator's value, then one each period."""
    hpet.write(0x10, 4, 1)
    hpet.write(0x100, 4, 1 << 2 | 1 << 3 | 1 << 6 | 1 << 8 | 21 << 9)
    hpet.write(0x108, 4, 300_000)
    hpet.write(0x108, 4, 100_000)
    kit.clock.advance(2_999_999)
    assert kit.edges[21] == 0
    kit.clock.advance(1)
    assert kit.edges[21] == 1
    kit.clock.advance(5 * 1_000_000)
    assert kit.edges[21] == 6


def test_what_interrupts_nobody_has_no_alarm(kit: Kit, hpet: Hpet) -> None:
    """A periodic comparator that was switched off, as Linux leaves one for good, sets no alarm; its value goes on, and
    it interrupts in its old phase once it is on again, also in a machine that was saved meanwhile."""
    hpet.write(0x10, 4, 1)
    on = 1 << 2 | 1 << 3 | 1 << 8 | 21 << 9
    hpet.write(0x100, 4, on | 1 << 6)
    hpet.write(0x108, 4, 300_000)
    hpet.write(0x108, 4, 100_000)
    kit.clock.advance(5_500_000)  # 550,000 ticks: it was due at 300,000, 400,000 and 500,000
    hpet.write(0x100, 4, on & ~(1 << 2))
    assert kit.clock.next is None
    kit.clock.advance(7_000_000)
    assert (kit.edges[21], hpet.read(0x108, 4)) == (3, 1_300_000)
    kit.clock.advance(2_000_000)
    hpet.load(hpet.save())
    assert kit.clock.next is None
    assert hpet.state.timers[0].value == 1_500_000
    kit.clock.advance(1_000_000)
    hpet.write(0x100, 4, on)
    kit.clock.advance(499_999)
    assert kit.edges[21] == 3
    kit.clock.advance(1)
    assert kit.edges[21] == 4


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0x10, 0xF0, 0x100, 0x108, 0x120, 0x128]),
            st.integers(0, 0x1FF),
            st.integers(1 << 12, (1 << 32) - 1),
            st.integers(0, 10**6),
        ),
        max_size=30,
    )
)
def test_comparators_count_alike_with_and_without_alarms(steps: list[tuple[int, int, int, int]]) -> None:
    """One that interrupts nobody has the value of one that interrupts whenever it is read, where alarms are on time."""
    kits = Kit(), Kit()
    loud, quiet = (kit.plugged(Hpet()) for kit in kits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cardcage_pc.chips.hpet.SHORTEST", 0)
        for offset, config, value, wait in steps:
            enabled = offset in (0x100, 0x120)
            for one, kit in zip((loud, quiet), kits, strict=True):
                configured = config & ~6 | 4 * (one is loud and enabled)
                one.write(offset, 8, configured if enabled or offset == 0x10 else value)
                kit.clock.advance(wait)
            for at in (0x108, 0x128, 0xF0):
                assert loud.read(at, 8) == quiet.read(at, 8)


def test_a_level_comparator_holds_its_line_until_the_status_is_cleared(kit: Kit, hpet: Hpet) -> None:
    """Level-triggered interrupts set their status bit and stay until it is written with one."""
    hpet.write(0x120, 8, 1 << 1 | 1 << 2 | 22 << 9)
    hpet.write(0x128, 8, 100)
    hpet.write(0x10, 4, 1)
    kit.clock.advance(1000)
    assert (kit.level(22), hpet.read(0x20, 4)) == (True, 2)
    hpet.write(0x20, 4, 2)
    assert not kit.level(22)


def test_legacy_replacement_takes_lines_0_and_8_over(kit: Kit, hpet: Hpet, pit: Pit) -> None:
    """In legacy mode the comparators drive lines 0 and 8, and the 8254 and the RTC no longer do."""
    rtc = kit.plugged(Rtc(RtcOptions(base="2024-01-01T00:00:00")))
    program(pit, 0, 2, 1000)
    rtc.write(0, 1, 0x0B)
    rtc.write(1, 1, 0x42)
    hpet.write(0x10, 4, 3)
    kit.clock.advance(SECOND // 100)
    assert (kit.edges[0], kit.edges[8]) == (0, 0)
    hpet.write(0x100, 8, 1 << 2)
    hpet.write(0x108, 8, hpet.read(0xF0, 8) + 100)
    kit.clock.advance(1000)
    assert kit.edges[0] == 1
    hpet.write(0x10, 4, 1)
    kit.clock.advance(SECOND // 100)
    assert kit.edges[0] > 5
    assert kit.edges[8] == 1


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0x10, 0x20, 0xF0, 0x100, 0x108, 0x120, 0x128, 0x140, 0x148, 0x160, 0x3F8]),
            st.sampled_from([1, 2, 4, 8]),
            st.one_of(st.integers(0, 0xFFFF), st.integers(0, (1 << 64) - 1)),
            st.integers(0, 10**6),
        ),
        max_size=50,
    )
)
def test_no_sequence_of_accesses_breaks_the_hpet(steps: list[tuple[int, int, int, int]]) -> None:
    """Any accesses at any time read back inside their size, and a stopped counter arms nothing."""
    kit = Kit()
    hpet = kit.plugged(Hpet())
    for offset, size, value, wait in steps:
        hpet.write(offset, size, value & (1 << 8 * size) - 1)
        assert 0 <= hpet.read(offset, size) < 1 << 8 * size
        kit.clock.advance(wait)
    hpet.write(0x10, 4, 0)
    assert all(timer.due is None for timer in hpet.state.timers)
