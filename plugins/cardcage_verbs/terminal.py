"""The caller's terminal in a session: raw while it lasts, its size told, its keys sent; files and pipes work too."""

from __future__ import annotations

import os
import select
import signal
import struct
import sys
import termios
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from cardcage_fleet.session import Kind

if TYPE_CHECKING:
    from cardcage_fleet.session import Conversation, Frame

__all__ = ["Terminal", "is_terminal", "size"]

PIECE = 16384


def is_terminal() -> bool:
    """Standard input and standard output are terminals."""
    return os.isatty(0) and os.isatty(1)


def size() -> tuple[int, int]:
    """Rows and columns of the terminal, 24 and 80 for one that does not say."""
    for fd in (1, 0):
        with suppress(OSError):
            found = os.get_terminal_size(fd)
            if found.lines and found.columns:
                return found.lines, found.columns
    return 24, 80


class Terminal:
    """Carries one conversation.

    Args:
        read: standard input is sent. raw: its terminal gives keys one by one, unechoed, and follows its size.
        leave: the byte that leaves, empty for none; only where *raw*.
        window: bytes of input that may be on their way, None for as many as the socket takes.
        interrupt: Ctrl-C, where it is not a key, is sent as a signal, once.

    Attributes:
        left: its user left by the key.
    """

    def __init__(
        self,
        talk: Conversation,
        *,
        read: bool,
        raw: bool,
        leave: bytes = b"",
        window: int | None = None,
        interrupt: bool = False,
    ) -> None:
        self._talk, self._reads, self._raw, self._leave = talk, read, raw, leave if raw else b""
        self._window, self._interrupt = window, interrupt
        self.left = False
        self._saved: list[Any] | None = None
        self._told, self._tells = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def run(self) -> Frame | None:
        """Until the session's last frame, which is returned; None when the machine hung up or the user :attr:`left`."""
        before: Any = None
        if self._raw:
            self._saved = termios.tcgetattr(0)
            if threading.current_thread() is threading.main_thread():
                before = signal.signal(signal.SIGWINCH, lambda *_: os.write(self._tells, b"w"))
        try:
            if self._raw:
                self._set_raw()
                self._resize()
            return self._loop()
        finally:
            if before is not None:
                signal.signal(signal.SIGWINCH, before)
            if self._saved is not None:
                with suppress(termios.error):  # the terminal has gone
                    termios.tcsetattr(0, termios.TCSADRAIN, self._saved)
            os.close(self._told)
            os.close(self._tells)

    def _set_raw(self) -> None:
        assert self._saved is not None
        iflag, _, cflag, lflag, ispeed, ospeed, cc = self._saved
        iflag &= ~(termios.BRKINT | termios.ICRNL | termios.INPCK | termios.ISTRIP | termios.IXON | termios.INLCR)
        lflag &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN | termios.ISIG)
        cc = [*cc]
        cc[termios.VMIN], cc[termios.VTIME] = 1, 0
        termios.tcsetattr(
            0, termios.TCSADRAIN, [iflag, self._saved[1] & ~termios.OPOST, cflag, lflag, ispeed, ospeed, cc]
        )

    def _resize(self) -> None:
        self._talk.send(Kind.RESIZE, struct.pack("<HH", *size()))

    def _loop(self) -> Frame | None:
        poll = select.poll()
        poll.register(self._talk.fileno(), select.POLLIN)
        poll.register(self._told, select.POLLIN)
        watching = False
        while True:
            wants = self._reads and self._window != 0
            if wants != watching:
                watching = wants
                (poll.register(0, select.POLLIN) if wants else poll.unregister(0))
            try:
                ready = {fd for fd, _ in poll.poll()}
            except KeyboardInterrupt:
                if not self._interrupt:
                    raise
                self._interrupt = False  # the second one ends us
                self._talk.send(Kind.SIGNAL, bytes([signal.SIGINT]))
                continue
            if self._told in ready:
                os.read(self._told, 4096)
                self._resize()
            if self._talk.fileno() in ready:
                frame = self._talk.receive()
                if frame is None or frame.kind in (Kind.RESULT, Kind.ERROR):
                    return frame
                self._heard(frame)
            if 0 in ready:
                self._typed()
            if self.left:
                return None

    def _heard(self, frame: Frame) -> None:
        if frame.kind is Kind.DATA:
            stream = sys.stderr.buffer if frame.stream == 2 else sys.stdout.buffer
            stream.write(frame.data)
            stream.flush()
        elif frame.kind is Kind.CREDIT and self._window is not None:
            self._window += int.from_bytes(frame.data, "little")

    def _typed(self) -> None:
        """Send what was typed, up to the key that leaves."""
        try:
            data = os.read(0, PIECE if self._window is None else min(PIECE, self._window))
        except OSError:  # the terminal hung up
            data = b""
        self.left = bool(self._leave) and self._leave in data
        if self.left:
            data = data.partition(self._leave)[0]
        with suppress(OSError):  # the machine hung up: its last frame is what counts
            if data:
                self._talk.send(Kind.DATA, data)
                if self._window is not None:
                    self._window -= len(data)
            elif not self.left:
                self._reads = False
                self._talk.send(Kind.END)
