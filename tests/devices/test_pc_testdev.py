"""The device that suites of test kernels drive: register, interrupt switches, memory."""

from __future__ import annotations

import pytest
from cardcage_pc.chips.testdev import MEMORY, PcTestdev, PcTestdevState
from pc_kit import Kit


@pytest.fixture
def kit() -> Kit:
    return Kit()


def test_the_register_holds_what_is_written(kit: Kit) -> None:
    """Bytes, words and doublewords of the four-byte register are read back as they were written."""
    card = kit.plugged(PcTestdev())
    card.write(0, 4, 0x44332211)
    card.write(1, 1, 0xAA)
    card.write(2, 2, 0xCCBB)
    assert (card.read(0, 4), card.read(3, 1)) == (0xCCBBAA11, 0xCC)


def test_an_access_past_the_register_changes_nothing_else(kit: Kit) -> None:
    """What reaches over the register's end is cut off: it stays four bytes long."""
    card = kit.plugged(PcTestdev())
    card.write(3, 4, 0x44332211)
    assert (card.read(0, 4), card.read(3, 4), len(card.save().register)) == (0x11000000, 0x11, 4)


def test_each_port_is_the_level_of_a_line(kit: Kit) -> None:
    """Writing one raises the interrupt of that number and zero lowers it; the others stay."""
    card = kit.plugged(PcTestdev())
    card.write_line(4, 1, 1)
    card.write_line(23, 1, 0x80)
    assert [gsi for gsi in range(24) if kit.level(gsi)] == [4, 23]
    card.write_line(4, 1, 0)
    assert ([gsi for gsi in range(24) if kit.level(gsi)], card.read_line(23, 1)) == ([23], 1)


def test_memory_is_read_as_it_was_written(kit: Kit) -> None:
    """The 64 KiB behind the memory-mapped bus hold values of each size, at both ends."""
    card = kit.plugged(PcTestdev())
    for offset, size in ((0, 8), (9, 1), (MEMORY - 4, 4)):
        card.write_memory(offset, size, 0x0807060504030201 & (1 << 8 * size) - 1)
        assert card.read_memory(offset, size) == 0x0807060504030201 & (1 << 8 * size) - 1
    card.write_memory(MEMORY - 1, 4, 0x04030201)
    assert (card.read_memory(MEMORY - 1, 1), len(card.save().memory)) == (1, MEMORY)


def test_reset_and_state(kit: Kit) -> None:
    """State comes back with its lines driven; a reset lowers them and clears the rest."""
    card = kit.plugged(PcTestdev())
    card.write(0, 1, 7)
    card.write_line(5, 1, 1)
    kept = card.save()
    card.reset()
    assert (card.read(0, 1), kit.level(5), card.save()) == (0, False, PcTestdevState())
    card.load(kept)
    assert (card.read(0, 1), kit.level(5)) == (7, True)
