"""Frames on their way to the guest, which may have no buffer for them just now."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["FRAME_MAX", "FRAME_MIN", "Inbox"]

FRAME_MIN, FRAME_MAX = 14, 65550
"""Bytes of an Ethernet frame: its header, and with the largest IP packet (QEMU's own limit is a little above)."""


class Inbox:
    """One queue towards the guest. Used under the machine's lock.

    Args:
        queue: its number.
        pause: stop the source, because the guest has no buffer.
        go_on: let the source go on.
    """

    def __init__(self, queue: int, pause: Callable[[], None], go_on: Callable[[], None]) -> None:
        self._queue, self._pause, self._go_on = queue, pause, go_on
        self._waiting: deque[bytes] = deque()
        self.received: Callable[[int, bytes | memoryview], bool] | None = None

    @property
    def full(self) -> bool:
        """True if the guest has to give buffers first."""
        return bool(self._waiting)

    def put(self, frame: bytes | memoryview) -> bool:
        """Give *frame* to the guest, or keep it until there is a buffer and answer False: the source is then paused."""
        if self.received is None:
            return True
        if not self._waiting and self.received(self._queue, frame):
            return True
        if not self._waiting:
            self._pause()
        self._waiting.append(bytes(frame))
        return False

    def resume(self) -> None:
        """The guest has given buffers."""
        if not self._waiting or self.received is None:
            return
        while self._waiting:
            if not self.received(self._queue, self._waiting[0]):
                return
            self._waiting.popleft()
        self._go_on()
