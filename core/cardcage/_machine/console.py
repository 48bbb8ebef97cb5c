"""The machine's console: the char back end that a serial port opens as ``console``, read and written by the host."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

from cardcage.errors import ConfigError, ConsoleTimeout, GuestError
from cardcage.waiting import Condition

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.backends import CharBackend

KEEP = 1 << 20


class Console:
    """Keeps the last MiB that the guest wrote, lets the host wait for text in it and type; a CharBackend, passes on."""

    def __init__(self, call_soon: Callable[[Callable[[], None]], None]) -> None:
        self.changed = Condition()
        self._kept = bytearray()
        self._start = 0  # bytes that were dropped from the front, so that positions stay valid
        self._read = 0
        self._received: Callable[[bytes], None] | None = None
        self._typed = bytearray()
        self._call_soon = call_soon
        self._ended: str | None = None
        self._last_words = ""
        self._owner: str | None = None
        self.forward: CharBackend | None = None

    # towards the device

    def claim(self, owner: str) -> Console:
        """Give the console to device *owner*. Raises ConfigError when another has it."""
        if self._owner is not None:
            raise ConfigError(f'{owner}: the console already belongs to device "{self._owner}"')
        self._owner = owner
        return self

    def connect(self, forward: CharBackend) -> None:
        """Pass output on to *forward*, and what comes from there to the guest."""
        self.forward = forward
        if self._received is not None:
            forward.start(self._received)

    @property
    def claimed(self) -> bool:
        """Whether a device has it."""
        return self._owner is not None

    def start(self, received: Callable[[bytes], None], /) -> None:
        """The device begins; what was typed before is delivered. See CharBackend."""
        self._received = received
        if self.forward is not None:
            self.forward.start(received)
        self._call_soon(self._deliver)

    def write(self, data: bytes, /) -> None:
        """Bytes from the guest."""
        if self.forward is not None:
            self.forward.write(data)
        with self.changed:
            self._kept += data
            drop = max(len(self._kept) - KEEP, 0)
            del self._kept[:drop]
            self._start += drop
            self.changed.notify_all()

    def close(self) -> None:
        """The device or the machine is done with it."""
        self._owner = self._received = None

    # towards the host

    @property
    def output(self) -> str:
        """What is kept of the guest's output, undecodable bytes replaced."""
        with self.changed:
            return self._kept.decode(errors="replace")

    def read(self, position: int, timeout: float | None = None) -> tuple[int, bytes]:
        """The position now, and what is kept behind *position* (0 is first), waited for up to *timeout* seconds."""
        with self.changed:
            self.changed.wait_for(lambda: self._ended or self._start + len(self._kept) > position, timeout)
            return self._start + len(self._kept), bytes(self._kept[max(position - self._start, 0) :])

    def send(self, text: str | bytes) -> None:
        """Type *text* (no newline is added). Before the guest's port is up it waits there."""
        with self.changed:
            self._typed += text.encode() if isinstance(text, str) else text
        self._call_soon(self._deliver)

    def _deliver(self) -> None:
        if self._received is None or not self._typed:
            return
        with self.changed:
            data, self._typed = bytes(self._typed), bytearray()
        self._received(data)

    def expect(self, what: str | re.Pattern[str], timeout: float | None = 30.0) -> str:
        """Wait until *what* (text, or a compiled pattern) comes after what an earlier ``expect`` matched.

        Args:
            timeout: seconds, or None for ever.

        Returns all text up to and with the match. Raises :exc:`ConsoleTimeout`, or GuestError when the machine ended
        without it; both with the last lines that came. Do not call it on the machine's own threads.
        """
        __tracebackhide__ = True  # pytest shows the caller's line, not this function
        wanted, flags = (what, 0) if isinstance(what, str) else (what.pattern, what.flags & ~re.UNICODE)
        pattern = re.compile(re.escape(wanted.encode()) if wanted is what else wanted.encode(), flags)
        overlap = len(wanted.encode()) - 1 if wanted is what else KEEP  # how far back a match may begin
        limit = None if timeout is None else time.monotonic() + timeout
        searched = 0
        with self.changed:
            while True:
                begin = max(self._read - self._start, 0)
                found = pattern.search(self._kept, max(begin, searched - self._start - overlap))
                if found is not None:
                    end = found.end()
                    del found  # it holds the buffer, which then could not grow
                    self._read = self._start + end
                    return self._kept[begin:end].decode(errors="replace")
                searched = self._start + len(self._kept)
                if self._ended is not None:
                    raise GuestError(f"the machine ended ({self._ended}) before {wanted!r} came{self._tail()}")
                left = None if limit is None else limit - time.monotonic()
                if left is not None and left <= 0:
                    raise ConsoleTimeout(f"{wanted!r} did not come within {timeout:g} s{self._tail()}")
                self.changed.wait(left)

    def _tail(self) -> str:
        lines, words = self._kept.decode(errors="replace").splitlines(), self._last_words
        at = next((at for at in range(len(lines), 0, -1) if words and lines[at - 1].endswith(words)), len(lines))
        lines = lines[max(at - 5, 0) : at]
        return "; the console's last lines:\n" + "\n".join(lines) if lines else "; the console stayed empty"

    def end(self, why: str, last_words: str = "") -> None:
        """The machine ended: nobody waits any longer. *last_words* end the line that says more than those after it."""
        with self.changed:
            self._ended, self._last_words = why, last_words
            self.changed.notify_all()
