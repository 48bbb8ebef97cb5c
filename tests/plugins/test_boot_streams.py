"""The streams of a command in the guest: framing, input as it is asked for, the status told once; without a guest."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
from cardcage_boot.streams import ExecOptions, ExecStream, Framed, Mark, StandardInput, open_stream
from cardcage_testing import TestSlot
from hypothesis import given
from hypothesis import strategies as st

TOKEN = "00112233"
PARTS = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"\0", b"\0cardcage-", f"\0cardcage-end {TOKEN}x\n".encode(), b"\0cardcage-end 1\n", b"\n"]),
    st.tuples(st.sampled_from(["end", "more", "fail"]), st.text("abc 12", max_size=9)),
)


def wire(part: bytes | tuple[str, str]) -> bytes:
    """*part* as init writes it: output as it is, a mark framed."""
    if isinstance(part, bytes):
        return part
    word, text = part
    return f"\0cardcage-{word} {TOKEN}{f' {text}' if text else ''}\n".encode()


@given(st.lists(PARTS, max_size=8), st.lists(st.integers(0, 300), max_size=8))
def test_marks_and_output_come_apart_however_the_stream_is_cut(parts: list[Any], cuts: list[int]) -> None:
    """Output comes out unchanged and marks in their places, for any cutting; a stranger's marks are output."""
    stream = b"".join(wire(part) for part in parts) + b"."
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    framed = Framed(TOKEN)
    found = [one for low, high in itertools.pairwise(edges) for one in framed.feed(stream[low:high])]
    again = [one if isinstance(one, bytes) else (one.word, one.text) for one in found]
    assert b"".join(wire(one) for one in again) + framed._kept == stream
    assert [one for one in again if not isinstance(one, bytes)] == [one for one in parts if not isinstance(one, bytes)]


def test_what_only_begins_like_a_mark_is_not_held_for_ever() -> None:
    """A guest that begins a mark and never ends it has a kilobyte held back, and no more."""
    framed = Framed(TOKEN)
    out = b"".join(
        one for _ in range(100) for one in framed.feed(b"\0cardcage-" + b"x" * 1000) if isinstance(one, bytes)
    )
    assert len(out) + len(framed._kept) == 101000
    assert len(framed._kept) < 2048


class Streams:
    """An ``exec-stream`` in a slot, and the pipes behind it."""

    def __init__(self, output: int) -> None:
        self.slot: Any = TestSlot()
        self.told, self.status = os.pipe()
        os.set_blocking(self.told, False)
        self.stream: ExecStream = open_stream(self.slot, ExecOptions(TOKEN, self.status, output))
        self.sent = bytearray()
        self.stream.start(self.sent.extend)

    def tell(self, word: str, text: str = "") -> None:
        """A mark of the guest's, and what the loop then does."""
        self.stream.write(wire((word, text)))
        self.slot.loop.run_soon()

    def report(self) -> bytes:
        """All that was said of the status."""
        try:
            return os.read(self.told, 100)
        except BlockingIOError:
            return b""


@pytest.fixture
def streams() -> Iterator[Streams]:
    """A stream without output, which leaves the test's own standard output alone."""
    made = Streams(0)
    yield made
    made.stream.close()
    os.close(made.told)
    os.close(made.status)


def test_the_status_is_told_once_and_answered_as_often_as_asked(streams: Streams) -> None:
    """The first ``end`` gives the status; every ``again`` after it is answered, none before."""
    streams.tell("again")
    assert (streams.report(), streams.sent) == (b"", b"")
    streams.tell("end", "42")
    streams.tell("end", "43")
    streams.tell("again")
    assert streams.report() == b"status 42\n"
    assert streams.sent == 3 * f"\ncardcage-ok {TOKEN}\n".encode()


@pytest.mark.parametrize("text", ["", "1000", "-1", "x", "\u0661"])
def test_an_end_without_a_status_tells_none(streams: Streams, text: str) -> None:
    """Errors end without a status, and what is no number from 0 to 999 is none."""
    streams.tell("end", text)
    assert streams.report() == b""


def test_a_command_that_was_not_run_says_why(streams: Streams) -> None:
    """``fail`` is told in place of a status."""
    streams.tell("fail", "/mnt/share is not mounted")
    assert streams.report() == b"fail /mnt/share is not mounted\n"


def test_nobody_who_reads_the_output_ends_the_machine() -> None:
    """A closed standard output ends the machine, and the status is that of a broken pipe."""
    kept = os.dup(1)
    gone, closed = os.pipe()
    os.close(gone)
    streams = Streams(1)
    os.dup2(closed, 1)
    try:
        streams.stream.write(b"x" * 5000)
        streams.stream.write(b"x" * 5000)
    finally:
        os.dup2(kept, 1)
    assert streams.report() == b"status 141\n"
    assert len(streams.slot.power.requests) == 1
    for fd in (streams.told, streams.status, kept, closed):
        os.close(fd)


def pieces(source: int, piece: int = 4) -> tuple[StandardInput, TestSlot, list[bytes]]:
    """Standard input from *source*, its slot, and what it sends."""
    slot = TestSlot()
    sent: list[bytes] = []
    return StandardInput(slot, sent.append, piece, source), slot, sent  # type: ignore[arg-type]


def test_input_is_read_when_it_is_asked_for() -> None:
    """Nothing is read before the guest asks; asking twice gives one piece; the end is told each time."""
    read, write = os.pipe()
    os.write(write, b"abcdef")
    source, slot, sent = pieces(read)
    slot.loop.poll()
    assert sent == []
    source.ask()
    source.ask()
    slot.loop.poll()
    slot.loop.poll()
    assert sent == [b"4\nabcd"]
    os.close(write)
    for _ in range(3):
        source.ask()
        slot.loop.poll()
    assert sent[1:] == [b"2\nef", b"0\n", b"0\n"]
    source.close()
    os.close(read)
    slot.close()


def test_a_piece_is_as_much_as_there_is() -> None:
    """What came into a pipe in parts is sent in one piece, as far as that goes: the guest does much for each."""
    read, write = os.pipe2(os.O_DIRECT)  # each write is a packet: read(2) gives no more than one
    parts = [bytes([65 + at]) * 3000 for at in range(4)]
    for part in parts:
        os.write(write, part)
    source, slot, sent = pieces(read, 8192)
    for _ in range(2):
        source.ask()
        slot.loop.poll()
    assert sent == [b"6000\n" + parts[0] + parts[1], b"6000\n" + parts[2] + parts[3]]
    source.close()
    for fd in (read, write):
        os.close(fd)
    slot.close()


def test_input_from_a_file_and_from_nothing() -> None:
    """A regular file, which epoll does not take, is read to its end; a closed descriptor is at its end."""
    with tempfile.TemporaryFile() as file:
        file.write(b"abcde")
        file.seek(0)
        source, slot, sent = pieces(file.fileno())
        for _ in range(3):
            source.ask()
            slot.loop.run_soon()
    assert sent == [b"4\nabcd", b"1\ne", b"0\n"]
    slot.close()
    read, write = os.pipe()
    os.close(write)
    os.close(read)
    source, slot, sent = pieces(read)
    source.ask()
    slot.loop.run_soon()
    assert sent == [b"0\n"]
    slot.close()


def test_input_that_is_closed_sends_nothing_more() -> None:
    """Once the command has ended, a piece that was asked for is not read: it is for who comes after us."""
    read, write = os.pipe()
    source, slot, sent = pieces(read)
    source.ask()
    source.close()
    os.write(write, b"left")
    slot.loop.poll()
    assert sent == []
    assert os.read(read, 9) == b"left"
    os.close(read)
    os.close(write)
    slot.close()


def test_marks_are_values() -> None:
    """A mark's text may be anything but a line feed; undecodable bytes are replaced."""
    assert Framed(TOKEN).feed(b"\0cardcage-fail 00112233 a\xff\0b\n") == [Mark("fail", "a\ufffd\0b")]
