"""The 16550A UART against the PC16550D data sheet."""

from __future__ import annotations

import pytest
from cardcage_pc.chips.serial import Serial, SerialOptions
from hypothesis import given, settings
from hypothesis import strategies as st
from pc_kit import SECOND, Kit

DATA, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(8)
FOUR_CHARACTERS = 40 * SECOND // 9600
"""Each of start, eight data and stop bits, at the divisor after reset."""


@pytest.fixture
def kit() -> Kit:
    return Kit(0x3F8)


@pytest.fixture
def uart(kit: Kit) -> Serial:
    return kit.plugged(Serial(SerialOptions()))


def get(uart: Serial, offset: int) -> int:
    return uart.read(offset, 1)


def put(uart: Serial, *writes: tuple[int, int]) -> None:
    for offset, value in writes:
        uart.write(offset, 1, value)


@pytest.mark.parametrize(("base", "irq"), [(0x3F8, 4), (0x2F8, 3), (0x3E8, 4), (0x2E8, 3)])
def test_standard_ports_have_their_interrupts(base: int, irq: int) -> None:
    """Without a configured interrupt, each standard port uses the PC's."""
    kit = Kit(base)
    uart = kit.plugged(Serial(SerialOptions()))
    put(uart, (IER, 2))
    assert [gsi for gsi in range(24) if kit.level(gsi)] == [irq]


def test_bytes_leave_at_once_and_the_transmitter_is_empty(kit: Kit, uart: Serial) -> None:
    """A byte written to THR reaches the back end, and LSR says THRE and TEMT."""
    put(uart, *((DATA, byte) for byte in b"hello"))
    assert kit.wire.output == b"hello"
    assert get(uart, LSR) == 0x60


def test_enabling_the_transmit_interrupt_raises_it_until_iir_is_read(kit: Kit, uart: Serial) -> None:
    """THRE interrupts when enabled with an empty transmitter; reading IIR as its source ends it."""
    put(uart, (IER, 2))
    assert kit.level(4)
    assert get(uart, IIR) == 2
    assert not kit.level(4)
    assert get(uart, IIR) == 1


def test_each_transmitted_byte_gives_one_edge(kit: Kit, uart: Serial) -> None:
    """Writing THR lowers the THRE interrupt and raises it again, so an edge-triggered controller sees each."""
    put(uart, (IER, 2))
    edges = kit.edges[4]
    put(uart, (DATA, 65), (DATA, 66))
    assert kit.edges[4] == edges + 2


def test_without_fifo_a_received_byte_interrupts_and_the_next_waits(kit: Kit, uart: Serial) -> None:
    """RBR holds one byte; what came after it is delivered when it has been read."""
    put(uart, (IER, 1))
    uart.received(b"ab")
    assert (get(uart, IIR), kit.level(4)) == (4, True)
    assert (get(uart, LSR) & 1, get(uart, DATA), get(uart, DATA)) == (1, 97, 98)
    assert (get(uart, LSR) & 1, kit.level(4)) == (0, False)


@pytest.mark.parametrize(("trigger", "level"), [(0, 1), (0x40, 4), (0x80, 8), (0xC0, 14)])
def test_the_fifo_interrupts_at_its_trigger_level(kit: Kit, uart: Serial, trigger: int, level: int) -> None:
    """With FIFOs on, received data interrupts when the trigger level is reached."""
    put(uart, (2, 1 | trigger), (IER, 1))
    uart.received(bytes(level - 1))
    assert not kit.level(4)
    uart.received(b"x")
    assert get(uart, IIR) == 0xC4


def test_data_below_the_trigger_level_times_out_after_four_characters(kit: Kit, uart: Serial) -> None:
    """Four character times without traffic raise the timeout interrupt; reading the FIFO clears it."""
    put(uart, (2, 0xC1), (LCR, 3), (IER, 1))
    uart.received(b"abc")
    kit.clock.advance(FOUR_CHARACTERS - SECOND // 9600)
    assert get(uart, IIR) == 0xC1
    kit.clock.advance(SECOND // 9600 + 1)
    assert (get(uart, IIR), kit.level(4)) == (0xCC, True)
    assert get(uart, DATA) == 97
    assert (get(uart, IIR), kit.level(4)) == (0xC1, False)
    kit.clock.advance(FOUR_CHARACTERS)
    assert get(uart, IIR) == 0xCC


def test_nothing_is_lost_that_the_fifo_cannot_hold(uart: Serial) -> None:
    """A thousand bytes that come at once are all read, in order."""
    put(uart, (2, 1))
    data = bytes(at & 0xFF for at in range(1000))
    uart.received(data)
    assert bytes(get(uart, DATA) for _ in data) == data
    assert get(uart, LSR) == 0x60


def test_a_guest_that_never_reads_costs_at_most_a_megabyte(kit: Kit, uart: Serial) -> None:
    """Input past 1 MiB is dropped, and logged."""
    for _ in range(3):
        uart.received(bytes(1 << 19))
    assert len(uart.waiting) <= 1 << 20
    assert [one[0] for one in kit.log.entries] == ["warning"]


def test_linux_finds_a_16550a(uart: Serial) -> None:
    """The probes of Linux's 8250 driver see IER's four bits, working loopback, a scratch register and FIFOs."""
    put(uart, (IER, 0xFF))
    assert get(uart, IER) == 0x0F
    put(uart, (IER, 0), (MCR, 0x1A))
    assert get(uart, MSR) & 0xF0 == 0x90
    put(uart, (MCR, 0), (SCR, 0xA5), (2, 0x21))
    assert (get(uart, SCR), get(uart, IIR)) == (0xA5, 0xC1)


def test_loopback_turns_data_and_modem_lines_round(kit: Kit, uart: Serial) -> None:
    """In loopback THR feeds the receiver, the outputs feed MSR with deltas, and the cable is silent."""
    put(uart, (2, 1), (MCR, 0x10), (DATA, 0x55))
    uart.received(b"outside")
    assert (bytes(kit.wire.output), get(uart, DATA)) == (b"", 0x55)
    get(uart, MSR)
    put(uart, (IER, 8), (MCR, 0x14))
    assert (get(uart, MSR), kit.level(4)) == (0x40, False)
    put(uart, (MCR, 0x10))
    assert get(uart, IIR) == 0xC0
    assert get(uart, MSR) == 0x04
    put(uart, (MCR, 0))
    assert bytes(get(uart, DATA) for _ in range(7)) == b"outside"


def test_overrun_in_loopback_is_the_line_status_interrupt(uart: Serial) -> None:
    """The seventeenth byte in a full FIFO sets OE, which has the highest priority and is cleared by reading LSR."""
    put(uart, (2, 1), (MCR, 0x10), (IER, 7), *((DATA, at) for at in range(17)))
    assert get(uart, IIR) == 0xC6
    assert get(uart, LSR) & 2
    assert get(uart, IIR) == 0xC4


def test_divisor_latch_hides_data_and_ier(kit: Kit, uart: Serial) -> None:
    """With DLAB set, offsets 0 and 1 are the divisor and nothing is sent."""
    put(uart, (LCR, 0x83), (0, 1), (1, 2))
    assert (get(uart, 0), get(uart, 1)) == (1, 2)
    put(uart, (LCR, 3))
    assert (bytes(kit.wire.output), get(uart, IER)) == (b"", 0)


def test_state_survives_save_and_load(kit: Kit, uart: Serial) -> None:
    """A loaded copy answers as the saved one did."""
    put(uart, (2, 0xC1), (IER, 3), (SCR, 9))
    uart.received(b"xyz")
    other = Kit(0x3F8).plugged(Serial(SerialOptions()))
    other.load(uart.save())
    assert [get(other, at) for at in (SCR, IER, DATA, LSR)] == [get(uart, at) for at in (SCR, IER, DATA, LSR)]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.integers(0, 7), st.sampled_from([1, 2, 4]), st.integers(0, 0xFFFFFFFF)),
            st.binary(max_size=40),
            st.integers(0, 10**8),
        ),
        max_size=60,
    )
)
def test_no_sequence_of_accesses_breaks_it(steps: list[tuple[int, int, int] | bytes | int]) -> None:
    """Any accesses, input and time leave a FIFO within its size, and IIR has a cause exactly when the line is high."""
    kit = Kit(0x3F8)
    uart = kit.plugged(Serial(SerialOptions()))
    for step in steps:
        if isinstance(step, bytes):
            uart.received(step)
        elif isinstance(step, int):
            kit.clock.advance(step)
        else:
            uart.write(min(step[0], 8 - step[1]), step[1], step[2])
            uart.read(min(step[0], 8 - step[1]), step[1])
        assert len(uart.state.fifo) <= 16
        assert kit.level(4) == (uart._cause() != 1)
