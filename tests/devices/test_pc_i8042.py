"""The keyboard controller against the PS/2 technical reference and the probes of Linux and SeaBIOS."""

from __future__ import annotations

import pytest
from cardcage_pc.chips.i8042 import I8042
from hypothesis import given, settings
from hypothesis import strategies as st
from pc_kit import Kit


@pytest.fixture
def kit() -> Kit:
    return Kit()


@pytest.fixture
def ps2(kit: Kit) -> I8042:
    return kit.plugged(I8042())


def command(ps2: I8042, *values: int) -> None:
    """A command byte, then its arguments."""
    ps2.write_command(0, 1, values[0])
    for value in values[1:]:
        ps2.write_data(0, 1, value)


def drain(ps2: I8042) -> list[int]:
    """All bytes that wait."""
    found = []
    while ps2.read_status(0, 1) & 1:
        found.append(ps2.read_data(0, 1))
    return found


def keyboard(ps2: I8042, *values: int) -> list[int]:
    for value in values:
        ps2.write_data(0, 1, value)
    return drain(ps2)


def mouse(ps2: I8042, *values: int) -> list[int]:
    for value in values:
        command(ps2, 0xD4, value)
    return drain(ps2)


def test_self_tests(ps2: I8042) -> None:
    """Controller, keyboard and mouse interface tests answer as a good one's."""
    for value, answer in ((0xAA, 0x55), (0xAB, 0x00), (0xA9, 0x00)):
        command(ps2, value)
        assert drain(ps2) == [answer]


def test_mode_byte_is_read_and_written(ps2: I8042) -> None:
    """Commands 0x20 and 0x60."""
    command(ps2, 0x60, 0x47)
    command(ps2, 0x20)
    assert drain(ps2) == [0x47]


def test_keyboard_reset_and_identify(ps2: I8042) -> None:
    """Reset answers ACK and BAT, identify an MF2 keyboard's bytes (translated or not), unknown asks to resend."""
    assert keyboard(ps2, 0xFF) == [0xFA, 0xAA]
    assert keyboard(ps2, 0xF2) == [0xFA, 0xAB, 0x41]
    command(ps2, 0x60, 0x07)
    assert keyboard(ps2, 0xF2) == [0xFA, 0xAB, 0x83]
    assert keyboard(ps2, 0xEE) == [0xEE]
    assert keyboard(ps2, 0xED, 7) == [0xFA, 0xFA]
    assert keyboard(ps2, 0xF0, 0) == [0xFA, 0xFA, 2]
    assert keyboard(ps2, 0x11) == [0xFE]


def test_mouse_reset_identify_and_status(ps2: I8042) -> None:
    """A standard mouse: id 0, and settings that read back; its bytes are marked in the status."""
    command(ps2, 0xD4, 0xFF)
    assert ps2.read_status(0, 1) & 0x21 == 0x21
    assert drain(ps2) == [0xFA, 0xAA, 0x00]
    assert mouse(ps2, 0xF2) == [0xFA, 0x00]
    assert mouse(ps2, 0xE8, 3, 0xF3, 80, 0xF4, 0xE9) == [0xFA] * 6 + [0x20, 3, 80]


def test_linux_finds_the_aux_port(ps2: I8042) -> None:
    """Linux's AUX loopback (0xD3), and 0xA7/0xA8 that show in the mode byte."""
    command(ps2, 0xD3, 0x5A)
    assert ps2.read_status(0, 1) & 0x20
    assert drain(ps2) == [0x5A]
    for value, bit in ((0xA7, 0x20), (0xA8, 0)):
        command(ps2, value)
        command(ps2, 0x20)
        assert drain(ps2)[0] & 0x20 == bit


def test_interrupts_one_edge_a_byte(kit: Kit, ps2: I8042) -> None:
    """Each byte in the output buffer is one edge of interrupt 1 or 12, when the mode byte allows it."""
    command(ps2, 0x60, 0x03)
    assert keyboard(ps2, 0xF2) == [0xFA, 0xAB, 0x83]
    assert (kit.edges[1], kit.level(1)) == (3, False)
    mouse(ps2, 0xF2)
    assert kit.edges[12] == 2
    command(ps2, 0x60, 0x00)
    keyboard(ps2, 0xF2)
    assert kit.edges[1] == 3


def test_keys_come_only_while_scanning(ps2: I8042) -> None:
    """Key codes reach the guest after the keyboard was enabled, and wait while its port is off."""
    ps2.press(b"\x1e")
    assert drain(ps2) == []
    keyboard(ps2, 0xF4)
    command(ps2, 0xAD)
    ps2.press(b"\x1e\x9e")
    assert drain(ps2) == []
    command(ps2, 0xAE)
    assert drain(ps2) == [0x1E, 0x9E]


@pytest.mark.parametrize("value", [0xFE, 0xF0])
def test_pulsing_output_bit_0_resets(kit: Kit, ps2: I8042, value: int) -> None:
    """Commands 0xF0 to 0xFF with bit 0 clear pulse the reset line; 0xFF does not."""
    command(ps2, 0xFF)
    assert kit.requests == []
    command(ps2, value)
    assert [one[0] for one in kit.requests] == ["reset"]


def test_a20_and_fast_reset_at_port_92(kit: Kit, ps2: I8042) -> None:
    """A20 is one bit behind the output port, commands 0xDD and 0xDF and port 0x92; port 0x92 bit 0 resets."""
    command(ps2, 0xDD)
    assert ps2.read_fast(0, 1) == 0
    ps2.write_fast(0, 1, 2)
    command(ps2, 0xD0)
    assert drain(ps2)[0] & 3 == 3
    command(ps2, 0xD1, 0xDD)
    assert ps2.read_fast(0, 1) == 0
    ps2.write_fast(0, 1, 3)
    assert [one[0] for one in kit.requests] == ["reset"]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(["data", "command", "fast"]), st.integers(0, 0xFF)),
            st.tuples(st.just("read"), st.just(0)),
            st.binary(max_size=300),
        ),
        max_size=80,
    )
)
def test_no_sequence_of_accesses_breaks_it(steps: list[tuple[str, int] | bytes]) -> None:
    """Any commands leave bounded queues, and never both interrupts at once."""
    kit = Kit()
    ps2 = kit.plugged(I8042())
    for step in steps:
        if isinstance(step, bytes):
            ps2.press(step)
        elif step[0] == "read":
            assert 0 <= ps2.read_data(0, 1) <= 0xFF
            assert 0 <= ps2.read_status(0, 1) <= 0xFF
        else:
            getattr(ps2, f"write_{step[0]}")(0, 1, step[1])
        state = ps2.state
        assert max(len(state.keyboard.queue), len(state.mouse.queue), len(state.replies)) <= 260
        assert not (kit.level(1) and kit.level(12))
