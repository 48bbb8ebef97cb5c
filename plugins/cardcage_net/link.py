"""A guest's queue joined to a stream that may come and go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage_net.framing import FrameStream
from cardcage_net.inbox import Inbox

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from typing_extensions import Buffer

    from cardcage_net.framing import Events

__all__ = ["Link"]


class Link:
    """The common part of back ends over a stream. Used under the machine's lock.

    Args:
        events: who watches descriptors.
        lost: called with the reason when the peer went away; the link is then without a stream.
    """

    def __init__(self, events: Events, lost: Callable[[str], None]) -> None:
        self._events, self._lost = events, lost
        self._inbox = Inbox(0, self._pause, self._go_on)
        self._stream: FrameStream | None = None
        self._started = False

    @property
    def up(self) -> bool:
        """True if there is a stream."""
        return self._stream is not None

    def attach(self, connection: socket.socket) -> None:
        """Use *connection* from now on, and own it."""
        self._stream = FrameStream(self._events, connection, self._inbox.put, self._gone)
        if self._started and not self._inbox.full:
            self._stream.start()

    def _gone(self, reason: str) -> None:
        self._stream = None
        self._lost(reason)

    def _pause(self) -> None:
        if self._stream is not None:
            self._stream.pause()

    def _go_on(self) -> None:
        if self._stream is not None:
            self._stream.go_on()

    def start(self, received: Callable[[int, bytes | memoryview], bool]) -> None:
        """Begin to give frames to the guest."""
        self._inbox.received, self._started = received, True
        if self._stream is not None:
            self._stream.start()

    def send(self, parts: Sequence[Buffer]) -> None:
        """Send one frame; it is dropped while there is no stream."""
        if self._stream is not None:
            self._stream.send(parts)

    def resume(self) -> None:
        """The guest has given buffers."""
        self._inbox.resume()

    def close(self) -> None:
        """Idempotent; *lost* is not called."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
