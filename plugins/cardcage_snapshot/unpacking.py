"""The process that unpacks a compressed snapshot's RAM into a machine that runs already.

It is another one because who waits for a page may have the interpreter's lock. What a guest waits for comes first, the
rest in order; zeros are nobody's work. It ends when the machine has all, or is gone.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import select
import signal
import socket
import warnings
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING

from cardcage.errors import ConfigError
from cardcage.ram import PAGE
from cardcage.security import Needs
from cardcage_jail import confine_program

from cardcage_snapshot.ram import ZEROS

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage_snapshot.chain import Chain
    from cardcage_snapshot.faults import Faults

__all__ = ["DONE", "Unpacker", "begin"]

DONE = b"done"


def begin(faults: Faults, chain: Chain) -> tuple[int, socket.socket]:
    """Start it: the process, and the end of a link on which :data:`DONE` comes, or what went wrong, as JSON.

    Raises OSError.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with warnings.catch_warnings():
            # Python 3.12 and later warn of threads: the child imports nothing and takes no lock of theirs.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
    except BaseException:
        ours.close()
        theirs.close()
        raise
    if pid:
        theirs.close()
        return pid, ours
    status = 1
    try:
        _alone(faults.fd, theirs.fileno(), *(level.fd for level in chain.levels))
        _watched(faults, chain, theirs)
        status = 0
    finally:
        os._exit(status)  # nothing of the machine's is this process's to end


def _alone(*kept: int) -> None:
    """Close what is the machine's, leave its terminal, and heed none of its signals."""
    gc.freeze()
    gc.disable()
    os.setsid()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    last = -1
    for one in (*sorted(kept), 1 << 30):
        os.closerange(last + 1, one)
        last = one


def _watched(faults: Faults, chain: Chain, link: socket.socket) -> None:
    """Unpack in one more process: should it be killed, nobody may wait for ever, or see zeros in place of what was."""
    pid = os.fork()
    confine_program(Needs(), imports=False)  # what is unpacked is anybody's
    if pid == 0:
        try:
            Unpacker(faults, chain, link).run()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    with suppress(OSError):  # the machine has all, or is gone
        while True:
            try:
                return faults.poison(0, faults.size)
            except BlockingIOError:
                list(faults.events())


class Unpacker:
    """Unpacks *chain* into the memory of *faults*, until the other end of *link* is closed."""

    def __init__(self, faults: Faults, chain: Chain, link: socket.socket) -> None:
        self._faults, self._chain, self._link = faults, chain, link
        self._piece = chain.levels[0].ram.chunk
        self._left = dict.fromkeys(chain.numbers())
        self._waiting: deque[int] = deque()
        self._gone = bytearray(-(-faults.size // PAGE))
        """Pages that were given back: they are zeros from then on."""

    def run(self) -> None:
        """All of it. Raises OSError when the machine is gone."""
        poll = select.poll()
        poll.register(self._faults.fd, select.POLLIN)
        poll.register(self._link, select.POLLIN)
        told = False
        while all(fd != self._link.fileno() for fd, _ in poll.poll(0 if self._left or self._waiting else None)):
            self._read()
            if self._waiting:
                self._answer(self._waiting.popleft())
            elif self._left:
                self._unpack(next(iter(self._left)))
            if not self._left and not told:
                self._link.send(DONE)
                told = True

    def _read(self) -> None:
        for waits, (offset, size) in self._faults.events():
            if waits:
                self._waiting.append(offset)
            else:
                first, last = offset // PAGE, (offset + size) // PAGE
                self._gone[first:last] = b"\1" * (last - first)

    def _answer(self, offset: int) -> None:
        """Let who waits for a page go on."""
        if (number := offset // self._piece) in self._left:
            self._unpack(number)
        try:
            self._faults.zero(offset, PAGE)  # where nothing came
        except BlockingIOError:
            self._waiting.append(offset)

    def _unpack(self, number: int) -> None:
        start = number * self._piece
        try:
            data = self._chain.piece(number)
        except ConfigError as error:
            self._link.send(json.dumps(str(error)[:1000]).encode())
            size = min(self._piece, self._faults.size - start)
            self._insist(lambda: self._faults.poison(start, size))
        else:
            address = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0
            marks = [not data.startswith(ZEROS, at) for at in range(0, len(data), PAGE)]
            self._insist(lambda: self._put(start, address, marks))
        del self._left[number]

    def _put(self, start: int, address: int, marks: list[bool]) -> None:
        """Put a piece's pages there that are not zero, and were not given back."""
        gone = self._gone[start // PAGE : start // PAGE + len(marks)]
        wanted = bytes(mark and not one for mark, one in zip(marks, gone, strict=True))
        for run in re.finditer(rb"\x01+", wanted):
            at = run.start() * PAGE
            self._faults.put(start + at, address + at, run.end() * PAGE - at)

    def _insist(self, act: Callable[[], None]) -> None:
        """Do it, from the start again when memory is given back meanwhile."""
        while True:
            try:
                return act()
            except BlockingIOError:
                self._read()
