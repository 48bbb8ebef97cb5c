"""How far a migration is."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from attrs import asdict, define

if TYPE_CHECKING:
    from cardcage.machine import Machine

__all__ = ["Progress", "current", "migrate_progress", "new_progress"]


@define
class Progress:
    """A migration, out of this process or into it.

    Attributes:
        status: ``setup``, ``active`` (RAM goes over while the guest runs), ``switching`` (it stands still here),
            ``given up`` (it is the destination's now, or stands still; ``migrate_recover``), ``waiting`` (the same at
            the destination), ``completed``, ``failed``, ``cancelled``. With post-copy ``postcopy-active`` (it runs at
            the destination, and memory follows), ``postcopy-paused`` (the connection broke: ``migrate_recover`` at the
            source makes it anew), ``postcopy-recover`` (it is about to).
        mode: ``precopy``, ``postcopy`` or ``hybrid``, as it was asked for.
        uri: where to, or from. passes: over RAM. sent: bytes. remaining: bytes of RAM that are known to be left.
        rate: bytes a second that went over, in the last pass. dirtied: bytes a second that the guest wrote meanwhile.
        asked: pages that the guest waited for at the destination.
        throttle: per cent of the time that vCPUs are held up. expected: seconds that it would stand still now.
        downtime: seconds that it stood still, as the source knows. total: seconds in all. error: why it failed.
    """

    status: str = "setup"
    mode: str = "precopy"
    uri: str = ""
    passes: int = 0
    sent: int = 0
    remaining: int = 0
    rate: float = 0.0
    dirtied: float = 0.0
    asked: int = 0
    throttle: int = 0
    expected: float = 0.0
    downtime: float = 0.0
    total: float = 0.0
    error: str = ""

    def table(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


_known: WeakKeyDictionary[Machine, Progress] = WeakKeyDictionary()
_lock = threading.Lock()


def new_progress(machine: Machine, uri: str) -> Progress:
    """Begin a migration of the machine's, in place of the last."""
    made = Progress(uri=uri)
    with _lock:
        _known[machine] = made
    return made


def current(machine: Machine) -> Progress | None:
    """The machine's migration, the last one if it is over; None if there was none."""
    with _lock:
        return _known.get(machine)


def migrate_progress(self: Machine) -> Progress | None:
    """How far the machine's migration is, the last one's end if it is over; None if there was none. Any thread."""
    return current(self)
