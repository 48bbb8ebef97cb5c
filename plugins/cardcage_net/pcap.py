"""Dumps of a network in a file that tshark and wireshark read (pcap with nanoseconds, Ethernet)."""

from __future__ import annotations

import os
import time
from struct import Struct
from typing import TYPE_CHECKING

from cardcage.abilities import has
from cardcage.errors import ConfigError
from cardcage.security import HasNeeds, Needs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cardcage.backends import NetBackend, NetFeatures
    from cardcage.device import Slot
    from typing_extensions import Buffer

__all__ = ["Dumped", "dumped"]

SNAP = 262144
_HEAD = Struct("<IHHiIII")
_RECORD = Struct("<IIII")


class Dumped:
    """A back end whose frames are written to a file as they pass. Satisfies :class:`~cardcage.backends.NetBackend`.

    Args:
        inner: the back end. path: the file, overwritten.

    Raises :exc:`~cardcage.errors.ConfigError` when the file cannot be made.
    """

    def __init__(self, inner: NetBackend, path: str) -> None:
        self._inner = inner
        self._header = inner.features.vnet_header
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"the dump cannot be written: {error.strerror}", file=path) from error
        os.write(self._fd, _HEAD.pack(0xA1B23C4D, 2, 4, 0, 0, SNAP, 1))

    @property
    def features(self) -> NetFeatures:
        return self._inner.features

    def start(self, received: Callable[[int, bytes | memoryview], bool], /) -> None:
        """Begin."""

        def seen(queue: int, frame: bytes | memoryview) -> bool:
            taken = received(queue, frame)
            if taken:
                self._write(memoryview(frame)[self._header :])
            return taken

        self._inner.start(seen)

    def send(self, queue: int, parts: Sequence[Buffer], /) -> None:
        """One frame from the guest."""
        self._write(memoryview(b"".join(parts))[self._header :])
        self._inner.send(queue, parts)

    def _write(self, frame: memoryview) -> None:
        seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
        kept = frame[:SNAP]
        # One system call a record, so that the file ends with a whole one whatever happens to us.
        if self._fd >= 0:
            os.writev(self._fd, [_RECORD.pack(seconds, nanoseconds, len(kept), len(frame)), kept])

    def resume(self, queue: int, /) -> None:
        self._inner.resume(queue)

    def set_offloads(self, offloads: frozenset[str], vnet_header: int, /) -> None:
        self._inner.set_offloads(offloads, vnet_header)

    def needs(self) -> Needs:
        """The back end's own."""
        return self._inner.needs() if has(self._inner, HasNeeds) else Needs()

    def close(self) -> None:
        """Idempotent."""
        self._inner.close()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def dumped(slot: Slot, path: str | None, make: Callable[[], NetBackend]) -> NetBackend:
    """Return the result of *make*, dumped to *path* unless that is None. Closes it when the file cannot be made."""
    if path is None:
        return make()
    slot.host.ask("image", path, ("create", "write"))
    backend = make()
    try:
        return Dumped(backend, path)
    except ConfigError:
        backend.close()
        raise
