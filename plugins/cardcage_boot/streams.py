"""The streams of a command that init runs: output and errors out of the guest, standard input into it, the status.

Each is a char back end, of a named port of a virtio console or of the second serial port. init (``init.sh``) frames
what is for us with marks, ``NUL cardcage-WORD TOKEN [SPACE TEXT] LF``, whose token is made for this one boot:

- ``end`` after the last byte of a stream, on that of the output with the command's status;
- ``fail`` in place of the command, with the reason why it was not run;
- ``more`` asks for a piece of standard input: its length in decimal, LF, and so many bytes; length 0 is the end. A
  guest is sent no more than it asked for, and nothing is read here before;
- ``again`` asks for the answer to ``end`` and ``fail`` once more, in case it was lost: ``LF cardcage-ok TOKEN LF``.
"""

from __future__ import annotations

import os
import re
import select
from typing import TYPE_CHECKING

from attrs import define, field, frozen
from attrs.validators import ge, in_, le

from cardcage_boot.channel import FdSink

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.device import Slot

__all__ = [
    "ExecOptions",
    "ExecStream",
    "Framed",
    "Mark",
    "StandardInput",
    "in_background",
    "open_stream",
    "port_options",
]

BROKEN_PIPE = 141
"""The status a shell reports for a program that SIGPIPE ended."""
LEAD = b"\0cardcage-"
MARK_MAX = 1024
"""Bytes of the longest mark; what begins like one and goes on is output."""
PIECE_PORT = 960 << 10
"""A port keeps more than this for a guest that does not read; and the guest starts a program for each piece."""


@frozen
class ExecOptions:
    """Options of the back end ``exec-stream``.

    Attributes:
        token: what marks hold.
        status: number of an open file descriptor, to which ``status N`` or ``fail TEXT`` is written, once.
        output: file descriptor that the stream goes to: 1, 2, or 0 for none.
        piece: bytes of standard input sent at once: by default what a serial console's buffer takes.
    """

    token: str
    status: int
    output: int = field(default=1, validator=in_((0, 1, 2)))
    piece: int = field(default=2048, validator=[ge(1), le(PIECE_PORT)])


def port_options(token: str, status: int) -> list[dict[str, object]]:
    """The ports of a ``virtio-console``, by the names that init looks for."""
    common = {"type": "exec-stream", "token": token, "status": status, "piece": PIECE_PORT}
    names = {"cardcage.out": 1, "cardcage.err": 2, "cardcage.in": 0}
    return [{"name": name, "char": {**common, "output": output}} for name, output in names.items()]


@frozen
class Mark:
    """A mark in a stream.

    Attributes:
        word: what it is about.
        text: what follows the token, empty for nothing.
    """

    word: str
    text: str


@define
class Framed:
    """Splits a stream into output and marks, however it is cut; holds back at most what could begin a mark."""

    token: str
    _kept: bytes = b""

    def feed(self, data: bytes) -> list[bytes | Mark]:
        """The next bytes; returns what is surely output, and marks, in their order."""
        if not self._kept and 0 not in data:
            return [data]
        data = self._kept + data
        pattern = re.compile(rb"\0cardcage-(\w+) " + re.escape(self.token.encode()) + rb"(?: ([^\n]*))?\n")
        found: list[bytes | Mark] = []
        begin = look = 0
        while (at := data.find(LEAD, look)) >= 0:
            end = data.find(b"\n", at, at + MARK_MAX)
            if end < 0 and len(data) - at < MARK_MAX:
                break  # the rest of it may come
            mark = pattern.fullmatch(data, at, end + 1)
            look = at + 1
            if mark is not None:
                found += [data[begin:at], Mark(mark[1].decode(), (mark[2] or b"").decode("utf-8", "replace"))]
                begin = look = end + 1
        if at < 0:
            tail = data.rfind(b"\0", max(begin, len(data) - len(LEAD) + 1))
            at = tail if tail >= 0 and LEAD.startswith(data[tail:]) else len(data)
        self._kept = data[at:]
        return [one for one in (*found, data[begin:at]) if one]


class StandardInput:
    """Standard input for the guest, read when it is asked for. One that is closed, or a terminal's that another job
    has, is at its end.

    Args:
        send: takes each piece, framed, on the loop thread.
        piece: bytes of the longest.
        source: the descriptor; it stays the caller's.
    """

    def __init__(self, slot: Slot, send: Callable[[bytes], None], piece: int, source: int = 0) -> None:
        self._slot, self._send, self._piece, self._source = slot, send, piece, source
        self._fd: int | None = None
        self._asked = self._watched = self._ended = False

    def ask(self) -> None:
        """Send the next piece once there is one. Nothing while one is on its way."""
        if self._asked:
            return
        self._asked = True
        if self._fd is None and not self._ended:
            self._open()
        if self._fd is not None and _pollable(self._fd):
            self._watched = True
            self._slot.loop.add_reader(self._fd, self._read)
        else:
            self._slot.loop.call_soon(self._read)  # a file, which epoll does not take, or the end

    def _open(self) -> None:
        try:
            fd = os.dup(self._source)
        except OSError:  # closed by who started us
            self._ended = True
            return
        if in_background(fd):
            os.close(fd)
            self._ended = True
        else:
            self._fd = fd

    def _read(self) -> None:
        if not self._asked:
            return
        data = b""
        if self._fd is not None:
            try:
                data = os.read(self._fd, self._piece)
                # A pipe in packet mode (O_DIRECT) loses the rest of what does not fit: none is longer than PIPE_BUF.
                while data and len(data) <= self._piece - select.PIPE_BUF and _has_more(self._fd):
                    if not (more := os.read(self._fd, self._piece - len(data))):
                        break  # told again when it is asked for
                    data += more
            except (BlockingIOError, InterruptedError):
                if not data:
                    return
            except OSError:  # the terminal hung up: the same as its end
                pass
        self._asked = False
        self._unwatch()
        if not data:
            self.close()
        self._send(b"%d\n" % len(data) + data)

    def _unwatch(self) -> None:
        if self._watched and self._fd is not None:
            self._slot.loop.remove_reader(self._fd)
        self._watched = False

    def close(self) -> None:
        """Read no more: it is at its end. Idempotent."""
        self._unwatch()
        if self._fd is not None:
            os.close(self._fd)
        self._fd, self._ended = None, True


class ExecStream:
    """Back end ``exec-stream``: see the module."""

    def __init__(self, slot: Slot, options: ExecOptions) -> None:
        self._slot, self._options = slot, options
        self._framed = Framed(options.token)
        self._sink = FdSink(slot, options.output) if options.output else None
        self._input = StandardInput(slot, self._answer, options.piece)
        self._received: Callable[[bytes], None] | None = None
        self._ended = False

    def start(self, received: Callable[[bytes], None], /) -> None:
        """Begin; see CharBackend."""
        self._received = received

    def _answer(self, data: bytes) -> None:
        if self._received is not None:
            self._received(data)

    def write(self, data: bytes, /) -> None:
        """Bytes from the guest."""
        for part in self._framed.feed(data):
            if isinstance(part, Mark):
                self._act(part)
            elif self._sink is not None and not self._ended:
                self._sink.write(part)
        if self._options.output == 1 and self._sink is not None and self._sink.gone and not self._ended:
            self._ended = True
            self._report(f"status {BROKEN_PIPE}")
            self._slot.power.stop("nobody reads the command's output")

    def _act(self, mark: Mark) -> None:
        if mark.word == "more":
            self._input.ask()
        elif mark.word in ("end", "fail") and not self._ended:
            if self._sink is not None:
                self._sink.flush()
            self._ended = True
            self._input.close()
            if mark.word == "fail":
                self._report(f"fail {mark.text}")
            elif re.fullmatch(r"[0-9]{1,3}", mark.text):
                self._report(f"status {int(mark.text) & 0xFF}")
        if mark.word in ("end", "fail", "again") and self._ended:
            self._slot.loop.call_soon(lambda: self._answer(f"\ncardcage-ok {self._options.token}\n".encode()))

    def _report(self, text: str) -> None:
        os.write(self._options.status, text.encode() + b"\n")

    def close(self) -> None:
        """Write what is left."""
        if self._sink is not None:
            self._sink.flush()
        self._input.close()


def in_background(fd: int) -> bool:
    """True if *fd* is our terminal but another job has it: reading would stop us (SIGTTIN)."""
    try:
        return os.tcgetpgrp(fd) != os.getpgrp()
    except OSError:  # no terminal, or not the one that controls us
        return False


def _has_more(fd: int) -> bool:
    """True if reading *fd* now would not wait: a pipe gives a part of a piece at a time."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return any(events & select.POLLIN for _, events in poll.poll(0))


def _pollable(fd: int) -> bool:
    with select.epoll() as poll:
        try:
            poll.register(fd, select.EPOLLIN)
        except PermissionError:
            return False
    return True


def open_stream(slot: Slot, options: ExecOptions) -> ExecStream:
    """Open the back end ``exec-stream``."""
    return ExecStream(slot, options)
