"""RAM on its way into a file and out of it.

What was ever touched is copied while the guest runs; what it wrote meanwhile is copied once it stands still. Afterwards
pages that are zero become holes, pieces get their sums, and the file is compressed if that is wanted.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from cardcage.errors import ConfigError, MissingExtra
from cardcage.ram import PAGE, Anonymous

from cardcage_snapshot.backing import SnapshotRam
from cardcage_snapshot.hostcalls import copy_range, punch, write_whole
from cardcage_snapshot.manifest import Ram, chunk_size
from cardcage_snapshot.pages import file_runs, held, runs_of
from cardcage_snapshot.watching import WriteWatch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from cardcage.ram import RamBlock

    from cardcage_snapshot.chain import Changes
    from cardcage_snapshot.pages import Run
    from cardcage_snapshot.places import Folder, Publication

__all__ = ["Copy", "compressor", "damaged", "digest", "finish", "piece"]

ZEROS = bytes(PAGE)
LEVEL = 3
PASSES, LITTLE = 5, 1 << 20
"""Passes over what was written meanwhile, at most; bytes that are left for the stop."""


def compressor() -> Any:
    """The module zstandard. Raises MissingExtra."""
    try:
        import zstandard
    except ImportError as error:
        raise MissingExtra("a snapshot that is compressed: needs: pip install 'cardcage[zstd]'") from error
    return zstandard


def digest(data: bytes | memoryview) -> str:
    """The sum of a piece: blake2b, 16 bytes in hexadecimal."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


class Copy:
    """RAM on its way into file *fd*, which the caller closes.

    :meth:`prepare` is called while the guest runs, :meth:`take` while it stands still. Attribute ``copied``: bytes that
    were written while it stood still. Raises OSError.
    """

    def __init__(self, fd: int, block: RamBlock) -> None:
        self._fd, self._block = fd, block
        self.copied = 0
        self._watch: WriteWatch | None = None
        os.ftruncate(fd, block.size)

    def prepare(self) -> None:
        """Copy what can be copied while the guest runs: the file below a restored machine's RAM, which does not change,
        then what was touched, then what was written meanwhile, until that is little."""
        _, below = runs_of(self._block)
        if below >= 0:
            for offset, size in file_runs(below, self._block.size):
                copy_range(below, self._fd, offset, size)
        if self._block.fd >= 0 or not isinstance(self._block.backend, Anonymous | SnapshotRam):
            return  # other processes write it too, or the kernel does not tell
        try:
            self._watch = WriteWatch(self._block, own=below >= 0)
            for _ in range(PASSES):
                runs = self._watch.written()
                for run in runs:
                    self._write(run)
                if held(runs) <= LITTLE:
                    break
        except OSError:  # before Linux 6.7, or forbidden here: all of it is copied at the stop
            self.close()

    def take(self) -> None:
        """Copy what is left; holes stay holes."""
        runs = runs_of(self._block)[0] if self._watch is None else self._watch.written()
        for run in runs:
            self._write(run)
        self.copied = held(runs)

    def close(self) -> None:
        """Watch no longer. Idempotent."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def _write(self, run: Run) -> None:
        write_whole(self._fd, self._block.view[run[0] : run[0] + run[1]], run[0])


def finish(into: Publication, size: int, *, compress: bool, changes: Changes | None = None) -> Ram:
    """Make holes in file ``ram`` where it is zero, sums, and the compressed file; all is on stable storage then.

    With *changes* since a parent there are holes too where that has the same. Raises OSError, and ConfigError where the
    parent is damaged.
    """
    chunk = chunk_size(size)
    made = Ram("ram.zst" if compress else "ram", "zstd" if compress else "none", chunk)
    packed = compressor().ZstdCompressor(level=LEVEL) if compress else None
    fd, target, end = into.open("ram"), -1, 0
    try:
        target = into.create("ram.zst") if compress else -1
        numbers: Iterable[int] = _chunks(fd, size, chunk)
        if changes is not None:
            numbers = sorted({*numbers, *changes.numbers()})
        for number in numbers:
            data = os.pread(fd, min(chunk, size - number * chunk), number * chunk)
            if changes is not None:
                data = changes.left(fd, number, data)
            if not _shrink(fd, data, number * chunk):
                continue
            if packed is None:
                made.chunks.append((number, number * chunk, len(data), digest(data)))
                continue
            frame = packed.compress(data)
            write_whole(target, frame, end)
            made.chunks.append((number, end, len(frame), digest(frame)))
            end += len(frame)
        os.fsync(target if compress else fd)
    finally:
        os.close(fd)
        if target >= 0:
            os.close(target)
    if compress:
        os.unlink("ram", dir_fd=into.fd)
    if changes is not None:
        made.parent = changes.written(into)
    return made


def _shrink(fd: int, data: bytes, base: int) -> bool:
    """Give pages that are zero back to the file system; False when all are."""
    empty = [at for at in range(0, len(data), PAGE) if data.startswith(ZEROS, at)]
    start = last = -PAGE
    for at in [*empty, -1]:
        if at != last + PAGE:
            if start >= 0:
                with suppress(OSError):  # a file system without holes
                    punch(fd, base + start, last + PAGE - start)
            start = at
        last = at
    return len(empty) * PAGE < len(data)


def _chunks(fd: int, size: int, chunk: int) -> Iterator[int]:
    """Numbers of the pieces that have data."""
    following = 0
    for offset, length in file_runs(fd, size):
        first, last = max(offset // chunk, following), (offset + length - 1) // chunk
        yield from range(first, last + 1)
        following = max(last + 1, following)


def damaged(folder: Folder, ram: Ram, size: int) -> None:
    """Read all of a snapshot's RAM. Raises ConfigError that names the first damaged piece."""
    fd = folder.open(ram.file)
    try:
        for entry in ram.chunks:
            piece(fd, folder.where(ram.file), ram, size, entry, sums=True)
        if ram.compression == "none":
            known = {number for number, *_ in ram.chunks}
            if os.fstat(fd).st_size != size:
                raise ConfigError(f"has {os.fstat(fd).st_size} bytes: expected {size}", file=folder.where(ram.file))
            for number in _chunks(fd, size, ram.chunk):
                if number not in known and any(os.pread(fd, ram.chunk, number * ram.chunk)):
                    raise _damage(folder.where(ram.file), number, ram, "expected zeros")
    finally:
        os.close(fd)


def piece(fd: int, where: str, ram: Ram, size: int, entry: tuple[int, int, int, str], *, sums: bool) -> bytes:
    """The bytes of the piece that *entry* of ``ram.chunks`` describes; its sum is compared if it has to be, or *sums*.

    Raises ConfigError that names a damaged one.
    """
    number, offset, length, sum = entry
    unpack = compressor() if ram.compression == "zstd" else None
    whole = min(ram.chunk, size - number * ram.chunk)
    data = os.pread(fd, length, offset) if offset + length <= os.fstat(fd).st_size else b""
    if len(data) != length or ((sums or unpack) and digest(data) != sum):
        raise _damage(where, number, ram, "its sum is another" if len(data) == length else "the file ends before")
    if unpack is not None:
        try:
            if unpack.frame_content_size(data) != whole:
                raise _damage(where, number, ram, f"expected {whole} bytes in it")
            data = unpack.ZstdDecompressor().decompress(data, max_output_size=whole)
        except unpack.ZstdError as error:
            raise _damage(where, number, ram, str(error)) from error
    if len(data) != whole:
        raise _damage(where, number, ram, f"expected {whole} bytes in it")
    return data


def _damage(where: str, number: int, ram: Ram, why: str) -> ConfigError:
    start = number * ram.chunk
    return ConfigError(f"RAM at {start:#x}-{start + ram.chunk - 1:#x} is damaged: {why}", file=where)
