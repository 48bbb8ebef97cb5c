"""Answering requests with errors in a back end's place, while security bars it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage_virtio.queue.request import Request
    from cardcage_virtio.virtio import Virtio

__all__ = ["StandIn"]


class StandIn:
    """Serves the rings of one device.

    Args:
        refuse: answers a request with an error, ``None`` where that cannot be done for this kind of device.

    Attributes:
        active: whether the rings are served here.
    """

    def __init__(self, io: Virtio, refuse: Callable[[Request], None] | None) -> None:
        self._io, self._refuse, self.active = io, refuse, False

    def take_over(self, places: dict[int, tuple[int, int]]) -> None:
        """Serve rings from where the back end stopped: (next available, next used) of each."""
        self.active = True
        for index, (base, used) in places.items():
            ring = self._io.rings[index]
            if ring is not None:
                ring.load((base, used, 0, 0))
                self._io.kick(index)

    def answer(self, index: int) -> None:
        """Refuse what is in a ring."""
        ring = self._io.rings[index]
        if self._refuse is not None and ring is not None:
            while (request := ring.pop()) is not None or ring.rearm():
                if request is not None:
                    self._refuse(request)

    def places(self, started: list[int]) -> dict[int, int]:
        """How far each ring was answered."""
        return {index: ring.save()[0] for index in started if (ring := self._io.rings[index]) is not None}
