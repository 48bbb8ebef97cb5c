"""The seam of virtio devices. An author writes any object with a number, queues, and what it does with requests.

It has :class:`VirtioDevice`, and :class:`Serves` or :class:`Notified`; the other protocols are opt-in. Each is looked
for once, by name and signature (:mod:`cardcage.abilities`), when the device is put behind a transport. So are
``plug(slot)``, ``unplug()``, ``pause()`` and ``resume()`` (rings are left alone without these two as well), ``save()``
and ``load(state)`` of :mod:`cardcage.device`, ``needs()`` of :class:`cardcage.security.HasNeeds`, and ``may_park()``,
``park()`` and ``unpark()`` of :class:`cardcage.accelerator.Parkable`, without which a device that drains or pauses
cannot be parked; and ``may_fork()`` and ``forked()`` of :class:`cardcage.device.Forkable`, without which one that has
``unplug`` or ``needs`` cannot be forked.

Attributes that it may have:

- ``features``: bits it offers; those of the ring and VERSION_1 are added, unless it says itself which
  (``ring_features``);
- ``class_code``: for PCI;
- ``segments = True``: requests of many parts may have them as :class:`~cardcage.segments.Segments`, not lists.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from cardcage.accelerator import Parkable
from cardcage.device import Forkable, HasState, Pausable, Pluggable, Unpluggable
from cardcage.security import HasNeeds

if TYPE_CHECKING:
    from cardcage_virtio.virtio import Virtio

__all__ = [
    "OPTIONAL",
    "Accepts",
    "ConfigWritten",
    "Drains",
    "HasConfig",
    "Notified",
    "Serves",
    "Starts",
    "Stops",
    "Unchanged",
    "VirtioDevice",
    "VirtioPluggable",
]


class VirtioDevice(Protocol):
    """The least a virtio device is, beside :class:`Serves` or :class:`Notified`."""

    device_id: int
    """Its number (virtio 1.2, chapter 5)."""
    queue_sizes: tuple[int, ...]
    """The largest size of each queue, a power of two from 1 to 32768."""


class Serves(Protocol):
    """Gets requests one by one."""

    def handle(self, request: Any, /) -> None:
        """Serve one :class:`~cardcage_virtio.queue.request.Request` and call ``request.done(written)``, now or later,
        on any thread. :class:`~cardcage_virtio.queue.request.RingError` puts the device in NEEDS_RESET."""


class Notified(Protocol):
    """Takes requests from ``io.rings[index]`` itself; then ``handle`` is not called."""

    def notified(self, index: int, /) -> None: ...


class VirtioPluggable(Protocol):
    """Wants the :class:`~cardcage_virtio.virtio.Virtio` in front of it."""

    def plug_virtio(self, io: Virtio, /) -> None:
        """Called after ``plug``."""


class HasConfig(Protocol):
    """Has a configuration space."""

    def config(self) -> bytes:
        """As it is now."""


class ConfigWritten(Protocol):
    """Has a configuration space that the driver can write."""

    def config_written(self, offset: int, data: bytes, /) -> None: ...


class Accepts(Protocol):
    """Does not take each choice of the features it offers."""

    def accept(self, features: int, /) -> bool:
        """True when the device works with exactly these."""


class Starts(Protocol):
    """Does something of its own accord while the driver is ready."""

    def start(self) -> None:
        """DRIVER_OK: ``io.features`` is what was agreed, ``io.rings`` are the queues."""


class Drains(Protocol):
    """Serves requests on other threads."""

    def drain(self) -> None:
        """Return when no request is in flight, and take no more before the next ``start`` or notification."""


class Stops(Protocol):
    """Has something to put back at reset."""

    def stop(self) -> None:
        """Reset, whether or not ``start`` came before."""


class Unchanged(Protocol):
    """Has a state, and can tell that it is still the same: a revert (cardcage_fork) loads only what changed."""

    def unchanged(self, state: Any, /) -> bool:
        """True where ``load`` would change nothing. Its rings are where they were, with nothing in flight."""


OPTIONAL: tuple[Any, ...] = (
    Serves,
    Notified,
    VirtioPluggable,
    HasConfig,
    ConfigWritten,
    Accepts,
    Starts,
    Drains,
    Stops,
    Pluggable,
    Unpluggable,
    Pausable,
    Parkable,
    Forkable,
    HasState,
    Unchanged,
    HasNeeds,
)
"""Protocols that are looked for in a virtio device."""
