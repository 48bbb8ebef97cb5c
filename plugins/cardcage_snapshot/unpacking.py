"""The process that unpacks a compressed snapshot's RAM into a machine that runs already.

It is another one because who waits for a page may have the interpreter's lock. What a guest waits for comes first, the
rest in order and at a bounded rate, as unpacking takes a processor from the guest, until somebody waits for all of it;
zeros are nobody's work. It ends when the machine has all, or is gone.
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
from time import monotonic
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

__all__ = ["ALL", "DONE", "Unpacker", "begin"]

DONE, ALL = b"done", b"all"
"""Words on the link: it is all there; and, to the process, that somebody waits for that."""
RATE = 256 << 20
"""Bytes of RAM a second that come while nobody waits for them."""
SLACK = 0.1
"""Seconds that may be caught up with."""


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
    """Unpack in one more process: should either be killed, nobody may wait for ever, or see zeros in place of what was.
    Each does what has to be done once the other is gone, which the end of a pipe tells it."""
    watched, told_of = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()  # a signal to the other's group is not for it
    confine_program(Needs(), imports=False)  # what is unpacked is anybody's
    if pid == 0:
        os.close(watched[1])
        os.close(told_of[0])
        try:
            if not Unpacker(faults, chain, link, watched[0]).run():
                give_up(faults)
        finally:
            os._exit(0)
    os.close(watched[0])
    os.close(told_of[1])
    os.read(told_of[0], 1)
    give_up(faults)
    os.waitpid(pid, 0)


def give_up(faults: Faults) -> None:
    """Let nobody wait for what has not come: it never will, unless the machine has all, or is gone."""
    with suppress(OSError):
        while True:
            try:
                return faults.poison(0, faults.size)
            except BlockingIOError:
                list(faults.events())


class Unpacker:
    """Unpacks *chain* into the memory of *faults*, until the other end of *link* is closed."""

    def __init__(self, faults: Faults, chain: Chain, link: socket.socket, watcher: int) -> None:
        self._faults, self._chain, self._link, self._watcher = faults, chain, link, watcher
        self._piece = chain.levels[0].ram.chunk
        self._left = dict.fromkeys(chain.numbers())
        self._waiting: deque[int] = deque()
        self._gone = bytearray(-(-faults.size // PAGE))
        """Pages that were given back: they are zeros from then on."""

    def run(self) -> bool:
        """All of it; False where it cannot go on, since nobody watches it. Raises OSError when the machine is gone."""
        poll = select.poll()
        for one in (self._faults.fd, self._link.fileno(), self._watcher):
            poll.register(one, select.POLLIN)
        told = hurried = False
        due = monotonic()
        while True:
            pause = None if not self._left else 0.0 if hurried else max(due - monotonic(), 0.0)
            found = {fd for fd, _ in poll.poll(0 if self._waiting else None if pause is None else pause * 1000)}
            if self._watcher in found:
                return False
            if self._link.fileno() in found:
                if self._link.recv(len(ALL)) != ALL:
                    return True
                hurried = True
            self._read()
            if self._waiting:
                self._answer(self._waiting.popleft())
            elif self._left and (hurried or monotonic() >= due):
                self._unpack(next(iter(self._left)))
                due = max(due, monotonic() - SLACK) + self._piece / RATE
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
