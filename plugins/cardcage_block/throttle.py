"""Block back end ``throttle``: another back end with limits on bytes and requests a second."""

from __future__ import annotations

import errno
import threading
import time
from typing import TYPE_CHECKING, Any

from attrs import field
from attrs.validators import ge
from cardcage.segments import total
from cardcage.units import Duration, Size
from cardcage.values import frozen

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cardcage.backends import BlockBackend, BlockInfo
    from cardcage.device import Slot

__all__ = ["Bucket", "Throttle", "ThrottleOptions", "open_throttle"]


@frozen
class ThrottleOptions:
    """Options of ``block:throttle``; a limit of 0 is none.

    Attributes:
        drive: the back end that is limited: a file name, or a table.
        bps, bps_read, bps_write: bytes a second, of all requests, of reads, of writes (zeroes and discards included).
        iops, iops_read, iops_write: requests a second.
        burst: seconds of quiet whose bytes and requests may be made up for at once.
    """

    drive: str | dict[str, Any]
    bps: Size = Size(0)
    bps_read: Size = Size(0)
    bps_write: Size = Size(0)
    iops: int = field(default=0, validator=ge(0))
    iops_read: int = field(default=0, validator=ge(0))
    iops_write: int = field(default=0, validator=ge(0))
    burst: Duration = field(default=Duration(1))


class Bucket:
    """A rate: who takes of it is told how long to wait. Thread-safe.

    Args:
        rate: units a second, more than 0. burst: seconds whose units may be taken at once.
    """

    def __init__(self, rate: float, burst: float) -> None:
        self._rate, self._burst, self._lock = rate, burst, threading.Lock()
        self._until = 0.0
        """When all that was taken is paid for."""

    def take(self, units: float, now: float) -> float:
        """Take *units* at *now* (seconds); return the seconds until they may be used."""
        with self._lock:
            begin = max(self._until, now - self._burst)
            self._until = begin + units / self._rate
            return max(begin - now, 0.0)


class Throttle:
    """Another back end, whose requests wait their turn. Satisfies :class:`cardcage.backends.BlockBackend`."""

    def __init__(self, below: BlockBackend, options: ThrottleOptions) -> None:
        self._below, self._over = below, threading.Event()
        both = ((options.bps, False), (options.iops, True))
        reads = ((options.bps_read, False), (options.iops_read, True))
        writes = ((options.bps_write, False), (options.iops_write, True))
        shared = [(Bucket(rate, options.burst), each) for rate, each in both if rate]
        self._read = [*shared, *((Bucket(rate, options.burst), each) for rate, each in reads if rate)]
        self._write = [*shared, *((Bucket(rate, options.burst), each) for rate, each in writes if rate)]

    def _wait(self, buckets: list[tuple[Bucket, bool]], size: int) -> None:
        now = time.monotonic()
        wait = max((one.take(1 if each else size, now) for one, each in buckets), default=0.0)
        if wait:
            self._over.wait(wait)

    @property
    def info(self) -> BlockInfo:
        """The other's."""
        return self._below.info

    def readv(self, offset: int, buffers: Sequence[memoryview], /) -> None:
        """Wait, and read."""
        self._wait(self._read, total(buffers))
        self._below.readv(offset, buffers)

    def writev(self, offset: int, buffers: Sequence[memoryview], /) -> None:
        """Wait, and write."""
        self._wait(self._write, total(buffers))
        self._below.writev(offset, buffers)

    def flush(self) -> None:
        """At once."""
        self._below.flush()

    def discard(self, offset: int, length: int, /) -> None:
        """Wait as for a write of one request, and discard."""
        self._wait(self._write, 0)
        self._below.discard(offset, length)

    def write_zeroes(self, offset: int, length: int, /, *, unmap: bool) -> None:
        """Wait as for a write of one request, or of its bytes where the other has to write them, and write zeroes."""
        self._wait(self._write, 0 if self._below.info.write_zeroes else length)
        self._below.write_zeroes(offset, length, unmap=unmap)

    def grow(self, size: int, /) -> None:
        """Have the other grow. Raises OSError."""
        if not callable(grow := getattr(self._below, "grow", None)):
            raise OSError(errno.ENOTSUP, "the drive has one size")
        grow(size)

    def close(self) -> None:
        """Nobody waits any longer; the other is closed by who opened it."""
        self._over.set()


def open_throttle(slot: Slot, options: ThrottleOptions) -> Throttle:
    """Back end ``block:throttle``. Raises what the other raises."""
    return Throttle(slot.host.open("block", options.drive), options)
