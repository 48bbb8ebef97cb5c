"""The 8259A pair against Intel's data sheet."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from cardcage_pc.chips.pic import Pic, PicOptions
from hypothesis import given, settings
from hypothesis import strategies as st
from pc_kit import Kit

if TYPE_CHECKING:
    from cardcage.interrupts import IrqSource


class Pc(Kit):
    """A PIC as the BIOS sets it up, with a source on each line."""

    def __init__(self, icw4: int = 1, level: tuple[int, ...] = (9, 10, 11)) -> None:
        super().__init__()
        self.pic: Pic = self.plugged(Pic(PicOptions(level)))
        self.sources: list[IrqSource] = [line.source() for line in self.lines]
        for write, base, cascade in ((self.pic.write_master, 0x08, 4), (self.pic.write_slave, 0x70, 2)):
            write(0, 1, 0x11)
            for value in (base, cascade, icw4, 0):
                write(1, 1, value)

    def inta(self) -> int | None:
        return self.pic.acknowledge()

    def eoi(self, slave: bool = False) -> None:
        if slave:
            self.pic.write_slave(0, 1, 0x20)
        self.pic.write_master(0, 1, 0x20)


@pytest.fixture
def pc() -> Pc:
    return Pc()


def test_an_edge_is_latched_and_served_once(pc: Pc) -> None:
    """A pulse raises INTR, INTA gives its vector and the request is gone."""
    pc.sources[4].pulse()
    assert pc.extint
    assert pc.inta() == 0x0C
    assert not pc.extint
    pc.eoi()
    assert (pc.extint, pc.inta()) == (False, None)


def test_lower_priority_waits_for_eoi_and_higher_interrupts(pc: Pc) -> None:
    """In fully nested mode a line in service blocks itself and what is below, not what is above."""
    pc.sources[3].pulse()
    assert pc.inta() == 0x0B
    pc.sources[4].pulse()
    assert not pc.extint
    pc.sources[1].pulse()
    assert pc.inta() == 0x09
    pc.eoi()
    assert not pc.extint
    pc.eoi()
    assert pc.inta() == 0x0C


def test_the_slave_comes_through_line_two(pc: Pc) -> None:
    """A slave's line gives the slave's vector, and puts both chips into service."""
    pc.sources[12].pulse()
    assert pc.inta() == 0x74
    pc.pic.write_master(0, 1, 0x0B)
    pc.pic.write_slave(0, 1, 0x0B)
    assert (pc.pic.read_master(0, 1), pc.pic.read_slave(0, 1)) == (0x04, 0x10)
    pc.sources[8].pulse()
    assert not pc.extint, "the master has the cascade line in service"
    pc.eoi(slave=True)
    assert pc.inta() == 0x70


def test_special_fully_nested_mode_lets_the_slave_interrupt_itself() -> None:
    """With SFNM a higher line of the slave interrupts a lower one's service."""
    pc = Pc(icw4=0x11)
    pc.sources[12].pulse()
    assert pc.inta() == 0x74
    pc.sources[8].pulse()
    assert pc.inta() == 0x70


def test_masks_hold_requests_back(pc: Pc) -> None:
    """A masked line keeps its request, and gives it when unmasked."""
    pc.pic.write_master(1, 1, 0x10)
    pc.sources[4].pulse()
    assert (pc.extint, pc.pic.read_master(0, 1), pc.pic.read_master(1, 1)) == (False, 0x10, 0x10)
    pc.pic.write_master(1, 1, 0)
    assert pc.inta() == 0x0C


def test_a_level_triggered_line_repeats_until_it_falls(pc: Pc) -> None:
    """ELCR makes a line's request follow its level."""
    pc.sources[10].set(True)
    assert pc.inta() == 0x72
    pc.eoi(slave=True)
    assert pc.inta() == 0x72
    pc.sources[10].set(False)
    pc.eoi(slave=True)
    assert not pc.extint


def test_eoi_of_a_level_line_resamples_it(pc: Pc) -> None:
    """The sources of a level-triggered line hear of its EOI."""
    heard: list[int] = []
    pc.lines[11].resamplers.append(lambda: heard.append(11))
    pc.sources[11].set(True)
    pc.inta()
    pc.eoi(slave=True)
    assert heard == [11]


@pytest.mark.parametrize(("line", "vector", "master_isr"), [(5, 0x0F, 0), (10, 0x77, 4)])
def test_a_request_that_goes_away_is_spurious(pc: Pc, line: int, vector: int, master_isr: int) -> None:
    """When the request is gone at INTA, line 7 answers without service; a slave's leaves line 2 in service."""
    pc.pic.write_elcr(0, 1, 0x20)
    pc.sources[line].set(True)
    # the processor has seen INTR: the request goes away before its INTA
    (pc.pic.master if line < 8 else pc.pic.slave).lines = 0
    assert pc.inta() == vector
    assert (pc.pic.master.isr, pc.pic.slave.isr) == (master_isr, 0)


def test_automatic_eoi_leaves_nothing_in_service() -> None:
    """With AEOI the acknowledge ends the service; with rotation the line becomes the lowest."""
    pc = Pc(icw4=3)
    pc.sources[3].pulse()
    assert (pc.inta(), pc.pic.master.isr) == (0x0B, 0)
    pc.pic.write_master(0, 1, 0x80)
    pc.sources[3].pulse()
    pc.inta()
    assert pc.pic.master.lowest == 3


def test_rotation_and_set_priority_commands(pc: Pc) -> None:
    """Rotate on non-specific EOI, set priority, and rotate on specific EOI each move the lowest line."""
    pc.sources[4].pulse()
    pc.inta()
    pc.pic.write_master(0, 1, 0xA0)
    assert (pc.pic.master.isr, pc.pic.master.lowest) == (0, 4)
    pc.sources[4].pulse()
    pc.sources[5].pulse()
    assert pc.inta() == 0x0D
    pc.pic.write_master(0, 1, 0xE0 | 5)
    assert (pc.pic.master.isr, pc.pic.master.lowest) == (0, 5)
    pc.pic.write_master(0, 1, 0xC0 | 1)
    assert pc.pic.master.lowest == 1


def test_special_mask_mode_unblocks_lower_lines(pc: Pc) -> None:
    """In special mask mode a line in service that is masked blocks nobody."""
    pc.sources[3].pulse()
    pc.inta()
    pc.sources[6].pulse()
    pc.pic.write_master(1, 1, 0x08)
    assert not pc.extint
    pc.pic.write_master(0, 1, 0x68)
    assert pc.inta() == 0x0E


def test_poll_command_acknowledges(pc: Pc) -> None:
    """After OCW3 with P a read gives the highest request and puts it into service."""
    pc.sources[5].pulse()
    pc.pic.write_master(0, 1, 0x0C)
    assert pc.pic.read_master(0, 1) == 0x85
    assert (pc.extint, pc.pic.master.isr) == (False, 0x20)
    pc.pic.write_master(0, 1, 0x0C)
    assert pc.pic.read_master(0, 1) == 0


def test_icw1_forgets_edges_and_service(pc: Pc) -> None:
    """ICW1 clears mask, service and latched edges, but not the level of a level-triggered line."""
    pc.sources[3].pulse()
    pc.sources[10].set(True)
    for write in (pc.pic.write_master, pc.pic.write_slave):
        write(0, 1, 0x11)
    assert (pc.pic.master.irr, pc.pic.slave.irr) == (4, 4)


def test_elcr_keeps_the_fixed_lines_edge_triggered(pc: Pc) -> None:
    """Lines 0, 1, 2, 8 and 13 cannot be made level-triggered."""
    pc.pic.write_elcr(0, 2, 0xFFFF)
    assert pc.pic.read_elcr(0, 2) == 0xDEF8


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(["master", "slave", "elcr"]), st.integers(0, 1), st.integers(0, 255)),
            st.tuples(st.just("line"), st.integers(0, 23), st.booleans()),
            st.just(("inta", 0, 0)),
        ),
        max_size=80,
    )
)
def test_no_sequence_of_accesses_breaks_it(steps: list[tuple[str, int, int]]) -> None:
    """Whatever is written, INTR is high exactly when a line is pending, and a high INTR gives a vector."""
    pc = Pc()
    for what, at, value in steps:
        if what == "line":
            pc.sources[at].set(bool(value))
        elif what == "inta":
            high = pc.extint
            assert (pc.inta() is not None) == high
        else:
            getattr(pc.pic, f"write_{what}")(at, 1, value)
            assert 0 <= getattr(pc.pic, f"read_{what}")(at, 1) <= 0xFF
        assert pc.extint == (pc.pic.master.pending() is not None)
