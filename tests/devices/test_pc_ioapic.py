"""The I/O APIC against the 82093AA data sheet, with messages in place of its serial bus."""

from __future__ import annotations

import pytest
from cardcage_pc.chips.ioapic import IoApic
from hypothesis import given, settings
from hypothesis import strategies as st
from pc_kit import Kit

LEVEL, MASKED, REMOTE_IRR = 1 << 15, 1 << 16, 1 << 14


@pytest.fixture
def kit() -> Kit:
    return Kit()


@pytest.fixture
def apic(kit: Kit) -> IoApic:
    return kit.plugged(IoApic())


def get(apic: IoApic, index: int) -> int:
    apic.write(0, 4, index)
    return apic.read(0x10, 4)


def put(apic: IoApic, index: int, value: int) -> None:
    apic.write(0, 4, index)
    apic.write(0x10, 4, value)


def route(apic: IoApic, pin: int, low: int, destination: int = 0) -> None:
    put(apic, 0x11 + 2 * pin, destination << 24)
    put(apic, 0x10 + 2 * pin, low)


def test_version_id_and_reset_state(apic: IoApic) -> None:
    """24 entries, version 0x20, each entry masked; the id has four bits."""
    assert get(apic, 1) == 0x00170020
    assert [get(apic, 0x10 + 2 * pin) for pin in range(24)] == [MASKED] * 24
    put(apic, 0, 0xFF000000)
    assert (get(apic, 0), get(apic, 2)) == (0x0F000000, 0x0F000000)


def test_an_edge_becomes_a_message(kit: Kit, apic: IoApic) -> None:
    """A rising edge sends vector, delivery mode, destination and destination mode as an MSI."""
    route(apic, 4, 0x31 | 1 << 8 | 1 << 11, destination=3)
    kit.lines[4].source().pulse()
    assert kit.messages == [(0xFEE03004, 0x131)]


def test_isa_interrupt_0_arrives_at_input_2(kit: Kit, apic: IoApic) -> None:
    """Line 0 is wired to input 2; line 2, the cascade, to none."""
    route(apic, 2, 0x30)
    route(apic, 0, 0x40)
    kit.lines[0].source().pulse()
    kit.lines[2].source().pulse()
    assert kit.messages == [(0xFEE00000, 0x30)]


def test_edges_at_a_masked_input_are_lost_levels_are_not(kit: Kit, apic: IoApic) -> None:
    """Unmasking sends a level that is high, but no edge that came before."""
    route(apic, 5, 0x35 | MASKED)
    route(apic, 11, 0x3B | MASKED | LEVEL)
    kit.lines[5].source().pulse()
    kit.lines[11].source().set(True)
    route(apic, 5, 0x35)
    assert kit.messages == []
    route(apic, 11, 0x3B | LEVEL)
    assert kit.messages == [(0xFEE00000, 0xC03B)]


def test_level_triggered_service(kit: Kit, apic: IoApic) -> None:
    """A level is sent once, remote IRR holds it until EOI, and a line still high is sent again after resampling."""
    heard: list[int] = []
    kit.lines[10].resamplers.append(lambda: heard.append(10))
    source = kit.lines[10].source()
    route(apic, 10, 0x3A | LEVEL)
    source.set(True)
    kit.lines[10].source().set(True)
    assert len(kit.messages) == 1
    assert get(apic, 0x10 + 20) & REMOTE_IRR
    kit.board.listeners[0](0x3B)
    assert len(kit.messages) == 1, "the EOI of another vector"
    kit.board.listeners[0](0x3A)
    assert (len(kit.messages), heard) == (2, [10])


def test_the_eoi_register_ends_a_service(kit: Kit, apic: IoApic) -> None:
    """Writing a vector to EOIR does what the broadcast does (directed EOI)."""
    source = kit.lines[9].source()
    route(apic, 9, 0x39 | LEVEL)
    source.set(True)
    source.set(False)
    apic.write(0x40, 4, 0x39)
    assert not get(apic, 0x10 + 18) & REMOTE_IRR
    assert len(kit.messages) == 1


def test_a_resampler_that_lowers_the_line_ends_it(kit: Kit, apic: IoApic) -> None:
    """A source that goes low when resampled is not sent again."""
    source = kit.lines[9].source()
    kit.lines[9].resamplers.append(lambda: source.set(False))
    route(apic, 9, 0x39 | LEVEL)
    source.set(True)
    kit.board.listeners[0](0x39)
    assert len(kit.messages) == 1


def test_remote_irr_is_read_only_and_cleared_by_edge_mode(kit: Kit, apic: IoApic) -> None:
    """Software cannot set remote IRR; switching the entry to edge mode forgets it."""
    put(apic, 0x10 + 18, 0x39 | LEVEL | REMOTE_IRR)
    assert not get(apic, 0x10 + 18) & REMOTE_IRR
    kit.lines[9].source().set(True)
    put(apic, 0x10 + 18, 0x39 | MASKED)
    assert not get(apic, 0x10 + 18) & REMOTE_IRR


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["line", "reg", "mmio", "eoi"]), st.integers(0, 0x80), st.integers(0, 0xFFFFFFFF)),
        max_size=80,
    )
)
def test_no_sequence_of_accesses_breaks_it(steps: list[tuple[str, int, int]]) -> None:
    """Any accesses leave entries whose remote IRR implies level mode, and messages to the local APICs only."""
    kit = Kit()
    apic = kit.plugged(IoApic())
    sources = [line.source() for line in kit.lines]
    for what, at, value in steps:
        match what:
            case "line":
                sources[at % 24].set(bool(value & 1))
            case "reg":
                put(apic, at, value)
                assert 0 <= get(apic, at) <= 0xFFFFFFFF
            case "mmio":
                apic.write(at, 1 << at % 4, value & (1 << (8 << at % 4)) - 1)
                assert apic.read(at, 1) >= 0
            case _:
                kit.board.listeners[0](value & 0xFF)
        assert all(entry & LEVEL for entry in apic.state.entries if entry & REMOTE_IRR)
    assert all(address >> 20 == 0xFEE for address, _ in kit.messages)
