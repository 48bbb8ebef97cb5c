"""MC146818 clock and CMOS against Motorola's data sheet and what firmware reads."""

from __future__ import annotations

import datetime
from types import SimpleNamespace
from typing import Any

import pytest
from cardcage.errors import ConfigError
from cardcage_pc.chips.rtc import Rtc, RtcOptions
from hypothesis import given, settings
from hypothesis import strategies as st
from pc_kit import SECOND, Kit

START = "2024-02-28T23:59:58"


@pytest.fixture
def kit() -> Kit:
    return Kit()


@pytest.fixture
def rtc(kit: Kit) -> Rtc:
    return kit.plugged(Rtc(RtcOptions(base=START)))


def get(rtc: Rtc, index: int) -> int:
    rtc.write(0, 1, index)
    return rtc.read(1, 1)


def put(rtc: Rtc, index: int, value: int) -> None:
    rtc.write(0, 1, index)
    rtc.write(1, 1, value)


def when(rtc: Rtc) -> tuple[int, ...]:
    """Century, year, month, day, hour, minute, second, weekday as the registers have them."""
    return tuple(get(rtc, at) for at in (0x32, 9, 8, 7, 4, 2, 0, 6))


def test_time_runs_with_the_machine_s_clock_in_bcd(kit: Kit, rtc: Rtc) -> None:
    """The registers are the start plus guest time, in BCD, with leap days and weekdays right."""
    assert when(rtc) == (0x20, 0x24, 0x02, 0x28, 0x23, 0x59, 0x58, 4)
    kit.clock.advance(2 * SECOND)
    assert when(rtc) == (0x20, 0x24, 0x02, 0x29, 0x00, 0x00, 0x00, 5)


def test_binary_and_twelve_hour_modes(kit: Kit, rtc: Rtc) -> None:
    """Register B's DM and 24/12 bits change the format; 11 PM has bit 7 set."""
    put(rtc, 0x0B, 0x04)
    assert (get(rtc, 0), get(rtc, 4)) == (58, 0x80 | 11)
    kit.clock.advance(2 * SECOND)
    assert get(rtc, 4) == 12, "midnight is 12 AM"
    put(rtc, 0x0B, 0x02)
    assert get(rtc, 4) == 0


def test_setting_the_time_as_a_guest_does(kit: Kit, rtc: Rtc) -> None:
    """With SET the registers are memory; clearing it starts the clock from them."""
    put(rtc, 0x0B, 0x82)
    for at, value in ((0x32, 0x19), (9, 0x99), (8, 0x12), (7, 0x31), (4, 0x23), (2, 0x59), (0, 0x59)):
        put(rtc, at, value)
    kit.clock.advance(10 * SECOND)
    assert get(rtc, 0) == 0x59
    put(rtc, 0x0B, 0x02)
    kit.clock.advance(SECOND)
    assert when(rtc) == (0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00, 7)


@pytest.mark.parametrize(
    "date",
    ["1970-01-01", "1999-12-31", "2000-02-29", "2024-02-29", "2024-03-01", "2100-02-28", "2100-03-01", "2399-06-30"],
)
def test_dates_that_are_set_read_back(kit: Kit, rtc: Rtc, date: str) -> None:
    """Setting the registers to a date and back gives that date, leap years and centuries included."""
    century, year, month, day = (int(part, 16) for part in (date[:2], date[2:4], date[5:7], date[8:]))
    put(rtc, 0x0B, 0x82)
    for at, value in ((0x32, century), (9, year), (8, month), (7, day)):
        put(rtc, at, value)
    put(rtc, 0x0B, 0x02)
    assert when(rtc)[:4] == (century, year, month, day)
    assert when(rtc)[7] == datetime.date.fromisoformat(date).isoweekday() % 7 + 1


def test_update_in_progress_precedes_the_second(kit: Kit, rtc: Rtc) -> None:
    """UIP is high for the last 244 us before each update only."""
    kit.clock.advance(SECOND - 244_142)
    assert not get(rtc, 0x0A) & 0x80
    kit.clock.advance(2)
    assert get(rtc, 0x0A) & 0x80
    kit.clock.advance(244_140)
    assert not get(rtc, 0x0A) & 0x80


@pytest.mark.parametrize(("rate", "hertz"), [(6, 1024), (3, 8192), (15, 2), (1, 256), (2, 128)])
def test_periodic_interrupts(kit: Kit, rtc: Rtc, rate: int, hertz: int) -> None:
    """PIE gives one interrupt a period, as long as register C is read in between."""
    put(rtc, 0x0A, 0x20 | rate)
    put(rtc, 0x0B, 0x42)
    get(rtc, 0x0C)
    for _ in range(5):
        edges = kit.edges[8]
        kit.clock.advance(SECOND // hertz + 1)
        assert kit.edges[8] == edges + 1
        assert get(rtc, 0x0C) & 0xC0 == 0xC0
        assert not kit.level(8)


def test_update_ended_interrupt_comes_each_second(kit: Kit, rtc: Rtc) -> None:
    """UIE interrupts when the second changes; the line stays until register C is read."""
    put(rtc, 0x0B, 0x12)
    kit.clock.advance(SECOND)
    assert kit.level(8)
    assert get(rtc, 0x0C) & 0x90 == 0x90
    assert not kit.level(8)
    kit.clock.advance(SECOND)
    assert kit.level(8)


@pytest.mark.parametrize(
    ("alarm", "seconds"),
    [((0x00, 0x00, 0x05), 7), ((0xC0, 0x00, 0x30), 32), ((0xFF, 0xFF, 0xFF), 1), ((0x23, 0x59, 0x57), 86399)],
)
def test_alarm_at_its_time(kit: Kit, rtc: Rtc, alarm: tuple[int, int, int], seconds: int) -> None:
    """The alarm matches hour, minute and second, of which values from 0xC0 match any."""
    for at, value in zip((5, 3, 1), alarm, strict=True):
        put(rtc, at, value)
    put(rtc, 0x0B, 0x22)
    get(rtc, 0x0C)
    kit.clock.advance(seconds * SECOND - 1)
    assert not kit.level(8)
    kit.clock.advance(1)
    assert kit.level(8)
    assert get(rtc, 0x0C) & 0xA0 == 0xA0


def test_flags_are_set_without_their_interrupts(kit: Kit, rtc: Rtc) -> None:
    """A guest that polls register C sees update and periodic flags with no interrupt enabled."""
    get(rtc, 0x0C)
    kit.clock.advance(SECOND)
    assert get(rtc, 0x0C) == 0x50
    assert get(rtc, 0x0C) == 0
    assert kit.edges[8] == 0


def test_memory_sizes_for_firmware(rtc: Rtc) -> None:
    """CMOS tells conventional, extended, above-16-MiB and above-4-GiB memory, and the processors."""
    context: Any = SimpleNamespace(ram_below_4g=3 << 30, ram_above_4g=5 << 30, cpus=4)
    rtc.contribute(context)
    pair = [get(rtc, at) | get(rtc, at + 1) << 8 for at in (0x15, 0x17, 0x30, 0x34)]
    assert pair == [640, 0xFFFF, 0xFFFF, (3 << 14) - 256]
    assert get(rtc, 0x5B) | get(rtc, 0x5C) << 8 | get(rtc, 0x5D) << 16 == 5 << 14
    assert get(rtc, 0x5F) == 3


def test_boot_order(kit: Kit) -> None:
    """The option's letters stand in CMOS 0x3D and 0x38 as SeaBIOS reads them; others are refused."""
    rtc = kit.plugged(Rtc(RtcOptions(boot="ncd")))
    assert (get(rtc, 0x3D), get(rtc, 0x38)) == (0x24, 0x31)
    with pytest.raises(ConfigError, match="boot"):
        Rtc(RtcOptions(boot="x"))
    with pytest.raises(ConfigError, match="base"):
        kit.plugged(Rtc(RtcOptions(base="tomorrow")))


def test_reset_keeps_time_and_memory(kit: Kit, rtc: Rtc) -> None:
    """RESET clears enables and flags only."""
    put(rtc, 0x50, 0x5A)
    put(rtc, 0x0B, 0x72)
    kit.clock.advance(SECOND)
    rtc.reset()
    assert (get(rtc, 0x0B), get(rtc, 0x50), kit.level(8), get(rtc, 0)) == (2, 0x5A, False, 0x59)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 0xFF), st.integers(0, 0xFF), st.integers(0, 3 * 10**9)), max_size=60))
def test_no_sequence_of_accesses_breaks_it(steps: list[tuple[int, int, int]]) -> None:
    """Any writes and any time leave bytes that read as bytes, and the line high exactly when IRQF is set."""
    kit = Kit()
    rtc = kit.plugged(Rtc(RtcOptions(base="9998-12-31T23:59:59")))
    for index, value, wait in steps:
        put(rtc, index, value)
        assert 0 <= get(rtc, index) <= 0xFF
        kit.clock.advance(wait)
        assert kit.level(8) == bool(rtc.state.cmos[0x0C] & 0x80)
