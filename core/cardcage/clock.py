"""Time for devices: a monotonic guest clock that stands still while the machine is paused, and timers on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Clock", "Timer"]


class Timer(Protocol):
    """A one-shot alarm; its callback runs on the machine's loop thread under the machine's lock."""

    def arm(self, when: int, /) -> None:
        """Fire once the clock reaches *when* (nanoseconds, absolute); replaces an earlier setting."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """Nanoseconds of guest time since the machine was built."""

    def now(self) -> int: ...

    def timer(self, callback: Callable[[], None], /) -> Timer: ...
