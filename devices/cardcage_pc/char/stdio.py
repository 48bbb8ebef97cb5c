"""Character back end ``stdio``: the terminal that cardcage was started on, in raw mode, or plain pipes and files.

On a terminal every key goes to the guest but the escape key Ctrl-], which stops the machine. The terminal is put back
at close, and at the interpreter's exit when nobody closed. With no terminal, with stdin closed, ended, or a file,
it works as far as there is something to read; as a job in the background it leaves the terminal alone.
"""

from __future__ import annotations

import atexit
import os
import select
import stat
import termios
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from attrs import field
from cardcage.values import frozen

from cardcage_pc.char.fd import Sink

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.device import Slot

__all__ = ["Stdio", "StdioOptions", "open_stdio"]

PIECE = 4096
_readers: list[Stdio] = []
"""Those that read now: what one machine opens last has its input."""


def _one_character(instance: Any, attribute: Any, value: str) -> None:
    if value and (len(value) != 1 or ord(value) > 127):
        raise ValueError("expected one ASCII character, or nothing")


@frozen
class StdioOptions:
    """Options of ``char:stdio``.

    Attributes:
        escape: the key that leaves, Ctrl-] by default; empty for none.
    """

    escape: str = field(default="\x1d", validator=_one_character)


class Stdio:
    """Standard input and output as a character back end."""

    def __init__(self, slot: Slot, options: StdioOptions, *, stdin: int = 0, stdout: int = 1) -> None:
        self._slot, self._escape = slot, options.escape.encode()
        # Own descriptors, so that ours can be watched and closed whatever others do with 0 and 1.
        self._in, self._out = _duplicate(stdin), _duplicate(stdout)
        self._sink = None if self._out is None else Sink(self._out, slot.log)
        self._saved: list[Any] | None = None
        self._watched, self._reading = False, True
        if self._in is not None and _in_background(self._in):
            os.close(self._in)
            self._in = None
        if self._in is not None and os.isatty(self._in):
            self._saved = termios.tcgetattr(self._in)
            atexit.register(self._restore)
            self._raw()

    def _raw(self) -> None:
        """Keys one by one, unechoed, signals off; output processing stays on, for what cardcage itself prints."""
        if self._in is None or self._saved is None:
            return
        iflag, oflag, cflag, lflag, ispeed, ospeed, cc = self._saved
        iflag &= ~(termios.BRKINT | termios.ICRNL | termios.INPCK | termios.ISTRIP | termios.IXON | termios.INLCR)
        lflag &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN | termios.ISIG)
        cc = list(cc)
        cc[termios.VMIN], cc[termios.VTIME] = 1, 0
        termios.tcsetattr(self._in, termios.TCSADRAIN, [iflag, oflag, cflag, lflag, ispeed, ospeed, cc])

    def _restore(self) -> None:
        saved, self._saved = self._saved, None
        if saved is not None and self._in is not None:
            atexit.unregister(self._restore)
            with suppress(termios.error):  # when the terminal has gone, nothing is left to put back
                termios.tcsetattr(self._in, termios.TCSADRAIN, saved)

    def start(self, received: Callable[[bytes], None], /) -> None:
        """Begin to read; see CharBackend."""
        self._received = received
        if self._in is None:
            return
        mode = os.fstat(self._in).st_mode
        for one in list(_readers):  # a debug console that was plugged in before must not take the console's input
            if one._in is not None and one._slot.machine == self._slot.machine and _same(one._in, self._in):
                one._stop_reading()
        _readers.append(self)
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode) or not _pollable(self._in):
            self._slot.loop.call_soon(self._read_file)  # epoll does not take these: they are always ready
        else:
            self._slot.loop.add_reader(self._in, self._readable)
            self._watched = True

    def _read_file(self) -> None:
        if self._take():
            self._slot.loop.call_soon(self._read_file)

    def _readable(self) -> None:
        if self._in is None or not select.select([self._in], [], [], 0)[0]:
            return  # another reader of the same input was faster: to wait for more would hold the machine up
        if not self._take():
            self._stop_reading()

    def _stop_reading(self) -> None:
        if self._watched and self._in is not None:
            self._slot.loop.remove_reader(self._in)
        self._watched, self._reading = False, False
        if self in _readers:
            _readers.remove(self)

    def _take(self) -> bool:
        """Read once; False at the end."""
        if self._in is None or not self._reading:
            return False
        try:
            data = os.read(self._in, PIECE)
        except (BlockingIOError, InterruptedError):
            return True
        except OSError:  # the terminal hung up, or a background process may not read
            return False
        if self._saved is not None and self._escape and self._escape in data:
            data = data.partition(self._escape)[0]
            self._restore()
            self._slot.power.stop("the escape key")
        if data:
            self._received(data)
        return bool(data) or self._saved is not None

    def write(self, data: bytes, /) -> None:
        if self._sink is not None:
            self._sink.write(data)

    def may_fork(self) -> str:
        return ""

    def forked(self) -> None:
        """The terminal is the parent's: a copy has none."""
        if self._saved is not None:
            atexit.unregister(self._restore)
            self._saved = None
        self.close()

    def close(self) -> None:
        """Put the terminal back."""
        self._restore()
        self._stop_reading()
        for fd in (self._in, self._out):
            if fd is not None:
                os.close(fd)
        self._in = self._out = self._sink = None


def _same(fd: int, other: int) -> bool:
    """True when both are of one file."""
    try:
        return os.path.samestat(os.fstat(fd), os.fstat(other))
    except OSError:  # one was closed under its reader
        return False


def _duplicate(fd: int) -> int | None:
    try:
        return os.dup(fd)
    except OSError:  # closed by who started us
        return None


def _in_background(fd: int) -> bool:
    """True if *fd* is our terminal but another job has it: touching it would stop us (SIGTTOU, SIGTTIN)."""
    try:
        return os.tcgetpgrp(fd) != os.getpgrp()
    except OSError:  # no terminal, or not the one that controls us
        return False


def _pollable(fd: int) -> bool:
    with select.epoll() as poll:
        try:
            poll.register(fd, select.EPOLLIN)
        except PermissionError:
            return False
    return True


def open_stdio(slot: Slot, options: StdioOptions) -> Stdio:
    """Back end ``char:stdio``."""
    return Stdio(slot, options)
