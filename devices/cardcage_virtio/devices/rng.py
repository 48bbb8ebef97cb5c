"""Entropy device (virtio 1.2, section 5.4): the host's random numbers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from attrs import field
from attrs.validators import ge
from cardcage.values import frozen

if TYPE_CHECKING:
    from cardcage_virtio.queue.request import Request

__all__ = ["Rng", "RngOptions"]


@frozen
class RngOptions:
    """Options of ``virtio-rng``.

    Attributes:
        max_bytes: most bytes given for one request.
    """

    max_bytes: int = field(default=65536, validator=ge(1))


class Rng:
    """Fills each buffer from ``getrandom(2)``."""

    device_id = 4
    queue_sizes = (256,)

    def __init__(self, options: RngOptions | None = None) -> None:
        self._most = (options or RngOptions()).max_bytes

    def handle(self, request: Request) -> None:
        data = os.urandom(min(request.writable_size, self._most))
        request.done(request.write(data))
