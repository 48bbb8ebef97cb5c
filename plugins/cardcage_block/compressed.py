"""Compressed clusters of qcow2: where they are, and what is in them. Reading only; a write makes a plain cluster."""

from __future__ import annotations

import errno
import threading
import zlib
from typing import TYPE_CHECKING

from cardcage.errors import MissingExtra

from cardcage_block.tables import read_bytes

if TYPE_CHECKING:
    from types import ModuleType

    from cardcage_block.hostfile import File

__all__ = ["Inflater", "host_range"]

KEPT = 16


def host_range(entry: int, cluster_bits: int) -> tuple[int, int]:
    """Offset and length in the file of the compressed data that an L2 *entry* describes."""
    bits = 62 - (cluster_bits - 8)
    offset = entry & ((1 << bits) - 1)
    more = entry >> bits & ((1 << (62 - bits)) - 1)
    return offset, (more + 1) * 512 - (offset & 511)


class Inflater:
    """Reads compressed clusters and keeps the last few, because guests read a cluster in many small pieces.

    Args:
        file: the image. cluster_bits: log2 of its cluster size. method: 0 zlib (raw deflate), 1 zstd.
    """

    def __init__(self, file: File, cluster_bits: int, method: int) -> None:
        self._file, self._cluster_bits, self._method = file, cluster_bits, method
        self._lock = threading.Lock()
        self._kept: dict[int, bytes] = {}
        if method:
            _import_zstandard()

    def get(self, entry: int) -> bytes:
        """The cluster that *entry* describes. Raises OSError (EIO) when it is damaged."""
        with self._lock:
            found = self._kept.get(entry)
        if found is None:
            found = self._inflate(entry)
            with self._lock:
                if len(self._kept) >= KEPT:
                    del self._kept[next(iter(self._kept))]
                self._kept[entry] = found
        return found

    def _inflate(self, entry: int) -> bytes:
        size = 1 << self._cluster_bits
        offset, length = host_range(entry, self._cluster_bits)
        packed = read_bytes(self._file, offset, length)
        try:
            # Never more than a cluster comes out, whatever the data says.
            if self._method:
                zstandard = _import_zstandard()
                reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(packed)
                data = b""
                while len(data) < size and (piece := reader.read(size - len(data))):
                    data += piece
                failure = None
            else:
                data, failure = zlib.decompressobj(-15).decompress(packed, size), None
        except Exception as error:  # zlib.error or zstandard.ZstdError, which is not imported here by name
            data, failure = b"", error
        if len(data) != size:
            raise OSError(errno.EIO, f"{self._file.path}: damaged compressed cluster at {offset:#x}") from failure
        return data

    def forget(self) -> None:
        """Clusters were given back: what is kept may no longer be what the file holds."""
        with self._lock:
            self._kept.clear()


def _import_zstandard() -> ModuleType:
    try:
        import zstandard
    except ImportError as error:
        raise MissingExtra("qcow2 with zstd compression needs: pip install 'cardcage[zstd]'") from error
    return zstandard
