"""Many parts of RAM at once: what a list of views says, and what the kernel is given."""

from __future__ import annotations

import ctypes

from cardcage.segments import Areas, Segments
from hypothesis import given
from hypothesis import strategies as st

PART = st.tuples(st.integers(0, 4000), st.integers(0, 96))


@given(st.lists(PART, max_size=40), st.integers(0, 40), st.integers(0, 40))
def test_segments_are_the_views_that_they_stand_for(parts: list[tuple[int, int]], first: int, last: int) -> None:
    """Items, slices, lengths, the total and struct iovec say the same as a list of views."""
    ram = memoryview(bytearray(range(256)) * 16)
    views = [ram[start : start + length] for start, length in parts]
    segments = Segments(ram, [start for start, _ in parts], [length for _, length in parts])
    assert len(segments) == len(views)
    assert list(segments) == views
    assert [segments[at] for at in range(-len(views), len(views))] == views * 2
    cut, expected = segments[first:last], views[first:last]
    assert list(cut) == expected
    assert (segments.size, cut.size) == (sum(map(len, views)), sum(map(len, expected)))
    words = segments.iovec().tolist()
    assert [ctypes.string_at(base, length) for base, length in zip(words[::2], words[1::2], strict=True)] == [
        bytes(view) for view in views
    ]
    for view in segments:
        view[:] = b"w" * len(view)
    assert all(bytes(view) == b"w" * len(view) for view in views)


def test_memory_stays_while_segments_stand_for_it() -> None:
    """The stretch that segments lie in cannot be released under them."""
    memory = bytearray(4096)
    segments = Segments(memoryview(memory), [16], [16])
    try:
        memory.clear()
    except BufferError:
        pass
    else:
        raise AssertionError("the memory went away")
    del segments
    memory.clear()


@given(st.lists(st.tuples(st.integers(0, 1 << 52), st.integers(0, 1 << 31)), max_size=40))
def test_areas_are_pairs(pairs: list[tuple[int, int]]) -> None:
    """Ranges iterate, index and cut as pairs, and give their words to native code."""
    areas = Areas([address for address, _ in pairs], [length for _, length in pairs])
    assert list(areas) == pairs
    assert [areas[at] for at in range(len(areas))] == pairs
    assert list(areas[1:3]) == pairs[1:3]
    assert areas.size == sum(length for _, length in pairs)
    assert areas.words().tolist() == [word for pair in pairs for word in pair]
