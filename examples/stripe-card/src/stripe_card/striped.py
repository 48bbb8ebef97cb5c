"""A disk whose stripes lie in turn in several files of one size, as RAID 0 has them."""

from __future__ import annotations

import fcntl
import os
import stat
from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs.validators import min_len
from cardcage.backends import BlockInfo
from cardcage.config import HostPath
from cardcage.errors import ConfigError, HostError
from cardcage.units import Size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cardcage.device import Slot

__all__ = ["Striped", "StripedOptions", "open_striped", "parse_striped"]


def _is_power(of: object, attribute: object, value: int) -> None:
    if value < 4096 or value & (value - 1):
        raise ValueError(f"{value}: expected a power of two from 4K")


@frozen
class StripedOptions:
    """Options of ``striped``.

    Attributes:
        files: two or more, of one size.
        stripe: bytes of a stripe, a power of two from 4K.
    """

    files: list[HostPath] = field(validator=min_len(2))
    stripe: Size = field(default=Size(65536), validator=_is_power)


def parse_striped(text: str) -> dict[str, object]:
    """Shorthand: ``striped:a.raw,b.raw``."""
    return {"files": text.split(",")}


class Striped:
    """The back end. Satisfies :class:`cardcage.backends.BlockBackend` and :class:`cardcage_migrate.Movable`.

    Raises ConfigError for files that do not fit, HostError for one that another process has.
    """

    def __init__(self, options: StripedOptions) -> None:
        self._stripe, self._paths = int(options.stripe), [str(one) for one in options.files]
        self._fds: list[int] = []
        try:
            for path in self._paths:
                self._fds.append(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK))
                if not stat.S_ISREG(os.fstat(self._fds[-1]).st_mode):
                    raise ConfigError("expected a regular file", file=path)
            sizes = {os.fstat(fd).st_size for fd in self._fds}
            if len(sizes) > 1 or not (size := sizes.pop()) or size % self._stripe:
                raise ConfigError(f"files of different sizes, or not of whole stripes: {', '.join(self._paths)}")
            self.info = BlockInfo(size * len(self._fds), 512, False, False, True)
            self.take_back()
        except BaseException as error:
            self.close()
            if isinstance(error, OSError) and not isinstance(error, HostError):
                raise ConfigError(f"cannot be opened: {error.strerror}", file=error.filename) from error
            raise

    def _parts(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Descriptor, offset in its file and length of each part of a range."""
        while length:
            stripe, within = divmod(offset, self._stripe)
            row, column = divmod(stripe, len(self._fds))
            size = min(length, self._stripe - within)
            yield self._fds[column], row * self._stripe + within, size
            offset, length = offset + size, length - size

    def readv(self, offset: int, buffers: Sequence[memoryview], /) -> None:
        for buffer in buffers:
            at = 0
            for fd, place, size in self._parts(offset, len(buffer)):
                if os.preadv(fd, [buffer[at : at + size]], place) != size:
                    raise OSError(5, "the file became shorter")
                at += size
            offset += len(buffer)

    def writev(self, offset: int, buffers: Sequence[memoryview], /) -> None:
        for buffer in buffers:
            at = 0
            for fd, place, size in self._parts(offset, len(buffer)):
                while size:
                    done = os.pwrite(fd, buffer[at : at + size], place)
                    at, place, size = at + done, place + done, size - done
            offset += len(buffer)

    def flush(self) -> None:
        for fd in self._fds:
            os.fdatasync(fd)

    def discard(self, offset: int, length: int, /) -> None:
        """Nothing is given back: ``info.discard`` says so."""

    def write_zeroes(self, offset: int, length: int, /, *, unmap: bool) -> None:
        for at in range(offset, offset + length, 1 << 20):
            self.writev(at, [memoryview(bytes(min(1 << 20, offset + length - at)))])

    def close(self) -> None:
        """The locks go with the descriptors. Idempotent."""
        while self._fds:
            os.close(self._fds.pop())

    # cardcage_migrate.Movable

    def may_move(self) -> str:
        return ""

    def let_go(self) -> None:
        """All that was written is stable; then the other side may lock the files."""
        self.flush()
        for fd in self._fds:
            fcntl.flock(fd, fcntl.LOCK_UN)

    def take_back(self) -> None:
        """Lock all files. Raises HostError where another process has one, and lets go of the others then."""
        for at, fd in enumerate(self._fds):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                for other in self._fds[:at]:
                    fcntl.flock(other, fcntl.LOCK_UN)
                raise HostError(f"{self._paths[at]}: another process has it") from error


def open_striped(slot: Slot, options: StripedOptions) -> Striped:
    """Back end ``block:striped``."""
    for path in options.files:
        slot.host.ask("image", str(path), ("open", "read", "write"), readonly=False)
    return Striped(options)
