"""The source's end of post-copy: the pages that the destination waits for first, and then the others."""

from __future__ import annotations

import os
import select
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from cardcage.ram import PAGE

from cardcage_migrate.missing import Missing
from cardcage_migrate.pages import ZEROS
from cardcage_migrate.wire import RUN, RUNS, BrokenStream, Channel, Kind, LinkLost, bare_runs, pages_asked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from cardcage.ram import RamBlock

    from cardcage_migrate.wire import Frame, Peer

__all__ = ["Serving"]

IN_ONE = 128 << 10
"""Bytes that are sent without a look at what is asked for."""
AROUND = 16 << 10
"""Bytes that are sent of the place that is asked for, where all of them are missing there: what lies behind is often
wanted next."""
UNANSWERED = 4096
"""Pages that are asked for, beyond which nothing more is heard before they are answered."""
TELL = 0.1
"""Seconds between two words about how far it is."""
ROOM = 256 << 10
"""Bytes that are not sent yet in the socket's buffer, so that a page that is waited for is not behind many others."""
TCP_NOTSENT_LOWAT = 25
EARLY, BURST, PAUSE, LITTLE = 0.3, 0.005, 0.0005, 16 << 10
"""At first the guest waits for one page after another: in the first seconds, and for some after each that was asked
for, others are sent in small pieces, each after a pause in which nothing is asked for."""


class Serving:
    """Pages of *block* for a destination that has a *secret*, over one connection after another.

    Args:
        bandwidth: bytes a second of those that nobody waits for. patience: seconds that it may be silent.

    Attributes:
        runs: the destination has said that the guest runs there. sent: bytes. asked: pages that it waited for.
    """

    def __init__(self, block: RamBlock, secret: bytes, bandwidth: int | None, patience: float) -> None:
        self._block, self._secret, self._bandwidth, self._patience = block, secret, bandwidth, patience
        self._missing = Missing(block.size)
        self._channel: Channel | None = None
        self._ended = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closing = threading.Lock()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._heard = threading.Event()
        self._begun = False
        self.runs, self.sent, self.asked = False, 0, 0

    @property
    def left(self) -> int:
        """Bytes that have not gone over."""
        return self._missing.count * PAGE

    def join(self, peer: Peer) -> None:
        """Have the destination at the other end of *peer*, in place of the connection that was before. Raises LinkLost,
        BrokenStream."""
        import socket

        if isinstance(peer, socket.socket):
            is_tcp = peer.family in (socket.AF_INET, socket.AF_INET6)
            level, option = (socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT) if is_tcp else (socket.SOL_SOCKET, socket.SO_SNDBUF)
            with suppress(OSError):
                peer.setsockopt(level, option, ROOM)
        channel = Channel(peer, patience=self._patience)
        self._heard.clear()
        try:
            channel.begin()
            channel.send(Kind.JOIN, self._secret)
            flags = channel.receive(Kind.JOINED).argument
            self._begun = bool(flags & 1)
            if self._begun:  # it says what is missing: what was sent last may have been lost
                told = Missing(self._block.size)
                while (frame := channel.receive(Kind.MISSING, Kind.END)).kind is Kind.MISSING:
                    told.add(bare_runs(frame, self._block.size))
                self._missing = told
            if flags & 2:
                self._now_it_runs()
        except BaseException:
            channel.close()
            raise
        if self._channel is not None:
            self._channel.close()
        self._channel = channel

    def mark(self, runs: Iterable[tuple[int, int]]) -> None:
        """These are to go over."""
        self._missing.add(runs)

    def begin(self) -> None:
        """Serve, on a thread of its own."""
        self._error = None
        self._thread = threading.Thread(target=self._run, name="migrate-pages")
        self._thread.start()

    def check(self) -> None:
        """Raise what the connection broke by, if it did."""
        if self._error is not None:
            raise self._error

    def await_runs(self, seconds: float) -> bool:
        """Wait until the destination has said on this connection that the guest runs; False when it did not."""
        self._heard.wait(seconds)
        return self.runs

    def wait(self, tell: Callable[[], object]) -> None:
        """Wait until all is there, or the machine has ended there; *tell* is called now and then. Raises LinkLost or
        BrokenStream where the connection broke before, Refused where the machine is lost."""
        assert self._thread is not None
        while self._thread.is_alive():
            self._thread.join(TELL)
            tell()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Serve no more. Idempotent; from any thread."""
        with self._closing:  # a migration that is over, and a machine that ends
            if self._ended < 0:
                return
            os.eventfd_write(self._ended, 1)
            if self._thread is not None:
                self._thread.join()
            if self._channel is not None:
                self._channel.close()
            os.close(self._ended)
            self._ended = -1

    def _now_it_runs(self) -> None:
        self.runs = True
        self._heard.set()

    def _run(self) -> None:
        assert self._channel is not None
        try:
            self._serve(self._channel)
        except BaseException as error:  # it is raised where it is waited for
            self._error = error
        finally:
            self._channel.close()
            self._heard.set()

    def _serve(self, channel: Channel) -> None:
        """Answer, and send what nobody asks for in between, until all is there."""
        peer: Any = channel.peer
        poll = select.poll()
        poll.register(peer.fileno(), select.POLLIN)
        poll.register(self._ended, select.POLLIN)
        asked: dict[int, None] = {}
        at, due, burst = 0, time.monotonic(), 0.0
        early = due + EARLY
        while True:
            now = time.monotonic()
            nothing = not self._begun or (not asked and not self._missing.count)
            pause = self._patience if nothing else 0.0 if asked else max(due - now, PAUSE if now < burst else 0.0)
            ready = poll.poll(pause * 1000)
            if any(fd == self._ended for fd, _ in ready):
                raise LinkLost("it was given up")
            if ready and len(asked) < UNANSWERED:
                frame = channel.receive(*((Kind.REQUEST, Kind.STARTED, Kind.DONE) if self._begun else (Kind.JOINED,)))
                if self._hear(frame, asked):
                    with suppress(LinkLost):  # it can end without
                        channel.send(Kind.DONE)
                    return
                if poll.poll(0):
                    continue  # there is more of it
            elif nothing:
                raise LinkLost(f"the other side said nothing for {self._patience:g} s")
            if not self._begun:
                continue
            if asked:
                at = self._answer(channel, asked)
                burst = min(time.monotonic() + BURST, early)
            elif self._missing.count and not ready and time.monotonic() >= due:
                run = self._missing.next_run(at, LITTLE if time.monotonic() < burst else self._piece())
                assert run is not None
                at = sum(run)
                size = self._send(channel, [run])
                if self._bandwidth is not None:
                    due = max(due, time.monotonic() - 1) + size / self._bandwidth

    def _piece(self) -> int:
        if self._bandwidth is None:
            return IN_ONE
        return min(IN_ONE, max(self._bandwidth // 20 // PAGE * PAGE, PAGE))

    def _hear(self, frame: Frame, asked: dict[int, None]) -> bool:
        """Take a word; True for the last one."""
        if frame.kind is Kind.REQUEST:
            offsets = pages_asked(frame, self._block.size)
            wanted = [one for one in offsets if self._missing.has_all(one, PAGE)]  # else it is on its way
            self.asked += len(wanted)
            asked.update(dict.fromkeys(wanted))
        elif frame.kind is Kind.JOINED:
            self._begun = True
        elif frame.kind is Kind.STARTED:
            self._now_it_runs()
        else:
            if self._missing.count and not frame.argument:
                raise BrokenStream("the destination has all pages, and some have not been sent")
            return True
        return False

    def _answer(self, channel: Channel, asked: dict[int, None]) -> int:
        """Send pages that are waited for, and a few behind each; returns where the last of them ends."""
        runs, size, end = [], 0, 0
        while asked and size < IN_ONE:
            offset = next(iter(asked))
            del asked[offset]
            if not self._missing.has_all(offset, PAGE):
                continue
            run = self._missing.next_run(offset, AROUND)
            assert run is not None
            runs.append(run)
            self._missing.remove(*run)
            size, end = size + run[1], sum(run)
        if runs:
            self._put(channel, runs)
        return end

    def _send(self, channel: Channel, runs: list[tuple[int, int]]) -> int:
        for run in runs:
            self._missing.remove(*run)
        return self._put(channel, runs)

    def _put(self, channel: Channel, runs: list[tuple[int, int]]) -> int:
        """Send these, of which pages of zeros are only named; returns bytes."""
        filled, zeros, before = [], [], channel.sent
        for offset, length in runs:
            data = bytes(self._block.view[offset : offset + length])
            start = 0
            for at in range(0, length, PAGE):
                if data.startswith(ZEROS, at):
                    if at > start:
                        filled.append((offset + start, data[start:at]))
                    zeros.append((offset + at, PAGE))
                    start = at + PAGE
            if length > start:
                filled.append((offset + start, data[start:]))
        for some in (zeros[at : at + RUNS] for at in range(0, len(zeros), RUNS)):
            body = b"".join(RUN.pack(*one) for one in sorted(some))
            channel.send(Kind.ZEROS, body, argument=len(some))
        if filled:
            table = b"".join(RUN.pack(offset, len(data)) for offset, data in filled)
            channel.send(Kind.PAGES, table, *(data for _, data in filled), argument=len(filled))
        self.sent += channel.sent - before
        return channel.sent - before
