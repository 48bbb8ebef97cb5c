"""Frames over a stream, however it is cut, and however the guest pauses."""

from __future__ import annotations

import random
import select
import socket
import struct
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING
from unittest.mock import patch

import cardcage_net.framing as framing
from cardcage_net.framing import FrameStream
from hypothesis import given
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Callable


class Turns:
    """A loop of which each turn is a call."""

    def __init__(self) -> None:
        self.readers: dict[int, Callable[[], None]] = {}
        self.soon: deque[Callable[[], None]] = deque()

    def add_reader(self, fd: int, callback: Callable[[], None], /) -> None:
        self.readers[fd] = callback

    def remove_reader(self, fd: int, /) -> None:
        self.readers.pop(fd, None)

    def call_soon(self, callback: Callable[[], None], /) -> None:
        self.soon.append(callback)

    def turn(self) -> None:
        for fd in select.select(list(self.readers), [], [], 0)[0]:
            if fd in self.readers:
                self.readers[fd]()
        if self.soon:
            self.soon.popleft()()


@given(
    sizes=st.lists(st.sampled_from([14, 15, 60, 1514, 9000, 40000, 65550]), max_size=60),
    cuts=st.integers(0, 1 << 32),
    pauses=st.integers(1, 9),
)
@patch.object(framing, "ROOM", 1 << 18)
@patch.object(framing, "AT_ONCE", 1 << 14)
def test_what_is_sent_arrives(sizes: list[int], cuts: int, pauses: int) -> None:
    """Frames come in order and whole while the buffer is moved, filled up, paused and gone on with; then the end."""
    choose, turns = random.Random(cuts), Turns()
    frames = [choose.randbytes(size) for size in sizes]
    left = b"".join(struct.pack(">I", len(frame)) + frame for frame in frames)
    got: list[bytes] = []
    ended: list[str] = []
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)

    def deliver(frame: memoryview) -> bool:
        got.append(bytes(frame))
        return choose.randrange(pauses) > 0

    stream = FrameStream(turns, ours, deliver, ended.append)
    stream.start()
    with theirs:
        while len(got) < len(frames):
            if left and choose.random() < 0.7:
                with suppress(BlockingIOError):
                    left = left[theirs.send(left[: choose.choice([1, 5, 1000, 100000])]) :]
            turns.turn()
            if choose.random() < 0.3:
                stream.go_on()
    while not ended:
        stream.go_on()
        turns.turn()
    assert got == frames
    assert ended == ["the peer closed the connection"]
    assert not turns.readers
