"""No network: a card whose cable leads nowhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen
from cardcage.backends import NetFeatures
from cardcage.config import HostPath

from cardcage_net.pcap import dumped

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cardcage.backends import NetBackend
    from cardcage.device import Slot
    from typing_extensions import Buffer

__all__ = ["Null", "NullNet", "open_null"]


@frozen
class Null:
    """Options of ``net:null``. dump: pcap file of what the guest sends."""

    dump: HostPath | None = None


class NullNet:
    """Drops what it gets."""

    features = NetFeatures()

    def start(self, received: Callable[[int, bytes | memoryview], bool], /) -> None:
        """Nothing will come."""

    def send(self, queue: int, parts: Sequence[Buffer], /) -> None:
        """Drop."""

    def resume(self, queue: int, /) -> None:
        """Nothing waits."""

    def set_offloads(self, offloads: frozenset[str], vnet_header: int, /) -> None:
        """Nothing to agree on."""

    def may_fork(self) -> str:
        return ""

    def forked(self) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing to close."""


def open_null(slot: Slot, options: Null) -> NetBackend:
    """Back end ``net:null``."""
    return dumped(slot, options.dump, NullNet)
