"""Small protocols between devices and what stands behind them, so that no shelf has to import another.

A device names a back end by a *spec*: a string (``"stdio"``, a shorthand) or a table (``{type = "file", path = ...}``);
:meth:`cardcage.device.Slot.open` turns it into an object of one of these protocols.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from attrs import field

from cardcage.values import frozen

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Buffer

__all__ = ["BlockBackend", "BlockInfo", "CharBackend", "NetBackend", "NetFeatures", "TryReads", "TryWrites"]


def _at_least(least: int) -> Callable[[Any, Any, Any], None]:
    def check(instance: Any, attribute: Any, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            what = f"{type(instance).__name__}.{attribute.name}"
            raise ValueError(f"{what}: expected a whole number from {least}, got {value!r}")

    return check


class CharBackend(Protocol):
    """A byte stream: terminal, pty, socket, file (QEMU: chardev)."""

    def start(self, received: Callable[[bytes], None], /) -> None:
        """Begin; *received* is called on the loop thread, under the machine's lock, with bytes for the guest."""

    def write(self, data: bytes, /) -> None:
        """Bytes from the guest. Never blocks for long; what a dead peer cannot take is dropped."""

    def close(self) -> None: ...


@frozen
class BlockInfo:
    """Geometry of a block back end: all in bytes."""

    size: int = field(validator=_at_least(0))
    block_size: int = 512
    readonly: bool = False
    discard: bool = False
    write_zeroes: bool = False


class BlockBackend(Protocol):
    """A disk. Called from the device's worker threads: must be thread-safe. Errors are :exc:`OSError`.

    Offsets and lengths are multiples of 512 and inside ``info.size``; the caller checks them.
    """

    @property
    def info(self) -> BlockInfo: ...

    def readv(self, offset: int, buffers: Sequence[memoryview], /) -> None:
        """Fill the writable *buffers* one after another."""

    def writev(self, offset: int, buffers: Sequence[memoryview], /) -> None: ...

    def flush(self) -> None:
        """Return once all earlier completed writes are on stable storage."""

    def discard(self, offset: int, length: int, /) -> None: ...

    def write_zeroes(self, offset: int, length: int, /, *, unmap: bool) -> None: ...

    def close(self) -> None: ...


class TryReads(Protocol):
    """A block back end that can tell whether a read takes waiting. Called on a vCPU's thread."""

    def try_readv(self, offset: int, buffers: Sequence[memoryview], /) -> bool:
        """Fill the buffers if that takes no waiting (the host's page cache has the bytes), else return False; what they
        hold then does not matter."""


class TryWrites(Protocol):
    """A block back end that can tell whether a write takes waiting. Called on a vCPU's thread."""

    def try_writev(self, offset: int, buffers: Sequence[memoryview], /) -> bool:
        """Write the buffers if that takes no waiting, else return False; what the disk holds there then does not
        matter, for the same is written again."""


@frozen
class NetFeatures:
    """Abilities of a network back end.

    Attributes:
        vnet_header: size in bytes of the virtio-net header that goes before each frame, 0 for none.
        queues: number of queue pairs.
        offloads: names out of ``csum tso4 tso6 ufo ecn`` the back end accepts.
    """

    vnet_header: int = field(default=0, validator=_at_least(0))
    queues: int = field(default=1, validator=_at_least(1))
    offloads: frozenset[str] = frozenset()


class NetBackend(Protocol):
    """Ethernet frames (QEMU: netdev)."""

    @property
    def features(self) -> NetFeatures: ...

    def start(self, received: Callable[[int, bytes | memoryview], bool], /) -> None:
        """Begin; ``received(queue, frame)`` returns False when the guest has no buffer: the back end then waits
        for :meth:`resume`. The bytes of *frame* need not stay once it has returned."""

    def send(self, queue: int, parts: Sequence[Buffer], /) -> None:
        """One frame (vnet header first where agreed) as consecutive *parts*."""

    def resume(self, queue: int, /) -> None:
        """The guest has given receive buffers again."""

    def set_offloads(self, offloads: frozenset[str], vnet_header: int, /) -> None:
        """The guest's driver accepted these offloads towards the guest."""

    def close(self) -> None: ...
