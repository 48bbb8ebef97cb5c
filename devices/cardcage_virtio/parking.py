"""Parts of devices for :class:`cardcage.accelerator.Parkable` and :class:`cardcage.device.Forkable`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cardcage.abilities import has
from cardcage.security import HasNeeds

if TYPE_CHECKING:
    from cardcage.device import Slot

    from cardcage_virtio.queue.workers import Workers
    from cardcage_virtio.virtio import Virtio

__all__ = ["AsksTheDevice", "AsksVirtio", "HasNoThread", "HoldsNothing", "ParksWorkers"]


class HasNoThread:
    """A device that has nothing to park, though it drains or pauses."""

    def may_park(self) -> str:
        return ""

    def park(self) -> None:
        """Nothing runs."""

    def unpark(self) -> None:
        """Nothing ended."""


class ParksWorkers:
    """A device whose threads are its workers."""

    _workers: Workers

    def may_park(self) -> str:
        """Requests that wait for the host are tried again by a thread."""
        return f"has {kept} requests that wait for the host" if (kept := self._workers.kept) else ""

    def park(self) -> None:
        self._workers.close()

    def unpark(self) -> None:
        self._workers.start()


class HoldsNothing:
    """A device that holds nothing of the host which two processes must not share; its back ends are asked, too."""

    def may_fork(self) -> str:
        return ""

    def forked(self) -> None:
        """There is nothing to make anew."""


class AsksTheDevice:
    """The answers of an author's device, and for one that has none."""

    device: Any
    slot: Slot
    _calls: dict[str, Any]

    def may_park(self) -> str:
        """Without an answer, a device that serves on other threads, or by itself, cannot be parked."""
        if "park" not in self._calls and {"drain", "pause"} & self._calls.keys():
            return f'virtio device "{self.slot.id}" works of its own accord, and cannot be parked'
        return self._named(self._calls.get("may_park"))

    def park(self) -> None:
        self._do("park")

    def unpark(self) -> None:
        self._do("unpark")

    def may_fork(self) -> str:
        """Without an answer, a device that has something to give back, or needs something, cannot be forked."""
        if "forked" not in self._calls and ("unplug" in self._calls or has(self.device, HasNeeds)):
            return f'virtio device "{self.slot.id}" holds something of the host, of which a copy cannot have its own'
        return self._named(self._calls.get("may_fork"))

    def forked(self) -> None:
        self._do("forked")

    def _named(self, ask: Any) -> str:
        why = ask() if ask is not None else ""
        return f'virtio device "{self.slot.id}" {why}' if why else ""

    def _do(self, name: str) -> None:
        if (found := self._calls.get(name)) is not None:
            found()


class AsksVirtio:
    """A transport: what is behind it answers."""

    virtio: Virtio

    def may_park(self) -> str:
        return self.virtio.may_park()

    def park(self) -> None:
        self.virtio.park()

    def unpark(self) -> None:
        self.virtio.unpark()

    def may_fork(self) -> str:
        return self.virtio.may_fork()

    def forked(self) -> None:
        self.virtio.forked()
