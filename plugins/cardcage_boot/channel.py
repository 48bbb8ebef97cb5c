"""The console of ``cardcage boot``, with what belongs to a command.

Where a command's error output comes over the console, init (``init.sh``) frames it with marks that hold a token made
for this one boot: ``NUL cardcage-begin TOKEN LF`` and ``NUL cardcage-end TOKEN LF``.
"""

from __future__ import annotations

import os
import select
from typing import TYPE_CHECKING

from attrs import define, field, frozen
from attrs.validators import in_

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.backends import CharBackend
    from cardcage.device import Slot

__all__ = [
    "ConsoleOptions",
    "FdSink",
    "LinuxConsole",
    "Marked",
    "open_console",
]

BATCH = 4096


@frozen
class ConsoleOptions:
    """Options of the back end ``linux-console``.

    Attributes:
        char: where the console goes, when ``token`` is empty.
        token: only what lies between the marks with this token goes out, to the file descriptor ``fd``.
        fd: 1 or 2.
    """

    char: str | dict[str, object] = "stdio"
    token: str = ""
    fd: int = field(default=1, validator=in_((1, 2)))


class FdSink:
    """Writes to a file descriptor in batches, in order, losing nothing while somebody reads.

    A slow reader makes the guest wait; a reader that has gone ends the machine (``gone`` is then true).
    """

    def __init__(self, slot: Slot, fd: int) -> None:
        self._slot, self._fd = slot, fd
        self._kept = bytearray()
        self.gone = False

    def write(self, data: bytes) -> None:
        """Keep *data* and see that it is written soon."""
        if not self._kept:
            self._slot.loop.call_soon(self.flush)
        self._kept += data
        if len(self._kept) >= BATCH:
            self.flush()

    def flush(self) -> None:
        """Write what is kept. Gives up when the host has stopped the machine and nobody reads."""
        try:
            while self._kept and not self.gone:
                if select.select([], [self._fd], [], 0.1)[1]:
                    del self._kept[: os.write(self._fd, self._kept[: select.PIPE_BUF])]
                elif self._slot.loop.ending:
                    break
        except BlockingIOError:
            self._slot.loop.call_soon(self.flush)
            return
        except OSError:  # closed by its reader, or the disk is full: the guest cannot help it
            self.gone = True
        self._kept.clear()


@define
class Marked:
    """Splits a stream at a mark that may come in pieces; never holds back more than could begin the mark."""

    mark: bytes
    _kept: bytearray = field(factory=bytearray)
    after: bytearray | None = None
    """The text after the mark, ``None`` until it came."""

    def feed(self, data: bytes) -> bytes:
        """The next bytes; returns those that are surely before the mark."""
        if self.after is not None:
            self.after += data
            return b""
        self._kept += data
        at = self._kept.find(self.mark)
        if at >= 0:
            out, self.after = bytes(self._kept[:at]), self._kept[at + len(self.mark) :]
            self._kept = bytearray()
            return out
        longest = min(len(self.mark) - 1, len(self._kept))
        held = next((size for size in range(longest, 0, -1) if self._kept.endswith(self.mark[:size])), 0)
        out = bytes(self._kept[: len(self._kept) - held])
        del self._kept[: len(out)]
        return out


class LinuxConsole:
    """Back end ``linux-console``: passes the console on, all of it or what lies between the marks."""

    def __init__(self, slot: Slot, options: ConsoleOptions) -> None:
        self._marked = bool(options.token)
        self._begin = Marked(f"\0cardcage-begin {options.token}\n".encode())
        self._end = Marked(f"\0cardcage-end {options.token}\n".encode())
        self._sink = FdSink(slot, options.fd)
        self._inner: CharBackend | None = None if self._marked else slot.host.open("char", options.char)

    def start(self, received: Callable[[bytes], None], /) -> None:
        """Begin; see CharBackend."""
        if self._inner is not None:
            self._inner.start(received)

    def write(self, data: bytes, /) -> None:
        """Bytes from the guest."""
        if self._inner is not None:
            self._inner.write(data)
        else:
            self._begin.feed(data)
            if self._begin.after:
                out = self._end.feed(bytes(self._begin.after))
                self._begin.after.clear()
                if self._end.after:
                    self._end.after.clear()  # nobody wants what follows, and a guest may go on for ever
                if out:
                    self._sink.write(out)

    def close(self) -> None:
        """Write what is left. The inner back end is the slot's to close."""
        self._sink.flush()


def open_console(slot: Slot, options: ConsoleOptions) -> LinuxConsole:
    """Open the back end ``linux-console``."""
    return LinuxConsole(slot, options)
