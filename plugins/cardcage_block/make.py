"""Making images, and changing their size."""

from __future__ import annotations

import os
from array import array
from typing import TYPE_CHECKING

from cardcage.errors import ConfigError
from cardcage.values import frozen

from cardcage_block.header import COMPAT_LAZY, Header
from cardcage_block.hostfile import HostFile
from cardcage_block.layout import Tables
from cardcage_block.locks import lock_image
from cardcage_block.tables import read_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage_block.drive import Allow, Drive

__all__ = ["Qcow2Shape", "create_qcow2", "create_raw", "resize"]


@frozen
class Qcow2Shape:
    """How a new qcow2 image is laid out.

    Attributes:
        cluster_size: bytes, a power of two from 512 to 2 MiB.
        version: 2 or 3 (QEMU: ``compat=0.10`` and ``1.1``).
        refcount_bits: 1, 2, 4, 8, 16, 32 or 64; version 2 has 16.
        lazy_refcounts: counts are written at the close, and made anew after a crash; version 3.
        backing_file: name as it goes into the header. backing_format: ``raw`` or ``qcow2``.
    """

    cluster_size: int = 65536
    version: int = 3
    refcount_bits: int = 16
    lazy_refcounts: bool = False
    backing_file: str | None = None
    backing_format: str | None = None


def _new_file(path: str, *, force: bool) -> HostFile:
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (0 if force else os.O_EXCL)
        os.close(os.open(path, flags, 0o644))
    except FileExistsError as error:
        raise ConfigError("already exists: use --force to overwrite it", file=path) from error
    except OSError as error:
        raise ConfigError(f"cannot be created: {error.strerror}", file=path) from error
    file = HostFile(path, writable=True)
    try:
        lock_image(file.fd, path, write=True, required=False)
        file.truncate(0)
    except BaseException:
        file.close()
        raise
    return file


def create_raw(path: str, size: int, *, force: bool = False) -> None:
    """Make a raw image of *size* bytes that are a hole. Raises ConfigError or HostError."""
    file = _new_file(path, force=force)
    try:
        file.truncate(size)
    except OSError as error:
        os.unlink(path)  # what was there before is lost already, and an image of another size misleads
        raise ConfigError(f"cannot be resized to {size} bytes: {error.strerror}", file=path) from error
    finally:
        file.close()


def create_qcow2(path: str, size: int, shape: Qcow2Shape | None = None, *, force: bool = False) -> None:
    """Make an empty qcow2 image for a disk of *size* bytes, a multiple of 512. Raises ConfigError or HostError."""
    header = _lay_out(path, size, shape or Qcow2Shape())
    packed = header.pack_all()
    bits, table_clusters = header.cluster_bits, header.reftable_clusters
    per_block = 1 << (bits + 3 - header.refcount_order)
    l1_clusters = -(-header.l1_size * 8 >> bits)
    blocks = 1
    while blocks * per_block < 1 + table_clusters + blocks + l1_clusters:
        blocks += 1
    header.l1_offset = 1 + table_clusters + blocks << bits
    used = 1 + table_clusters + blocks + l1_clusters
    packed = header.pack() + packed[len(header.pack()) :]
    reftable = array("Q", [1 + table_clusters + at << bits for at in range(blocks)])
    reftable.byteswap()
    if header.refcount_order < 3:
        width, each = 1 << header.refcount_order, 8 >> header.refcount_order
        counts = bytearray(-(-used // each))
        for at in range(used):
            counts[at // each] |= 1 << at % each * width
    else:
        counts = bytearray((1).to_bytes(1 << header.refcount_order - 3, "big") * used)
    file = _new_file(path, force=force)
    try:
        file.truncate(used << bits)
        # The header comes last: until then the file is no image.
        for offset, data in ((1 << bits, reftable.tobytes()), (1 + table_clusters << bits, bytes(counts)), (0, packed)):
            file.write(offset, [memoryview(data)], len(data))
            file.sync()
    except OSError as error:
        os.unlink(path)
        raise ConfigError(f"cannot be written: {error.strerror}", file=path) from error
    finally:
        file.close()


def _lay_out(path: str, size: int, shape: Qcow2Shape) -> Header:
    cluster, order = shape.cluster_size, shape.refcount_bits.bit_length() - 1
    if cluster & (cluster - 1) or not 512 <= cluster <= 2 << 20:
        raise ConfigError(f"cluster size {cluster}: expected a power of two from 512 to 2M", file=path)
    if shape.refcount_bits != 1 << order or order > 6 or (shape.version == 2 and order != 4):
        raise ConfigError(
            f"refcount_bits={shape.refcount_bits}: expected a power of two up to 64, 16 for version 2", file=path
        )
    if shape.version not in (2, 3) or (shape.version == 2 and shape.lazy_refcounts):
        raise ConfigError("expected version 2 or 3, and 3 for lazy refcounts", file=path)
    if size % 512:
        raise ConfigError(f"{size} bytes: expected a multiple of 512", file=path)
    bits = cluster.bit_length() - 1
    l1_size = max(-(-size // (cluster * cluster // 8)), 1)
    if l1_size * 8 > 32 << 20:
        raise ConfigError(f"{size} bytes are too much for clusters of {cluster}: use larger clusters", file=path)
    per_block = 1 << (bits + 3 - order)
    wanted = -(-(size * 9 // 8) // cluster // per_block) + 2
    table_clusters = min(max(-(-wanted * 8 >> bits), 1), max(8 << 20 >> bits, 1))
    return Header(
        shape.version,
        bits,
        size,
        l1_size,
        0,
        1 << bits,
        table_clusters,
        compatible=COMPAT_LAZY if shape.lazy_refcounts else 0,
        refcount_order=order,
        backing_file=shape.backing_file,
        backing_format=shape.backing_format,
    )


def resize(
    drive: Drive, size: int, *, shrink: bool = False, warn: Callable[[str], object], allow: Allow | None = None
) -> None:
    """Give an image that is not in use a new size in bytes; what is added reads as zeros.

    Args:
        shrink: allow a smaller size, which discards the end of the disk.
        warn, allow: as of :func:`~cardcage_block.drive.open_image`.

    Raises :exc:`~cardcage.errors.ConfigError` and :exc:`~cardcage.errors.HostError`, and OSError from the host.
    """
    from cardcage_block.drive import allow_all, open_image
    from cardcage_block.qcow2 import Qcow2Image

    allow = allow or allow_all
    size = int(size)
    if size % 512:
        raise ConfigError(f"{size} bytes: expected a multiple of 512", file=drive.file)
    image = open_image(drive, warn=warn, allow=allow)
    old = image.info.size
    try:
        if size < old and not shrink:
            raise ConfigError(
                f"{size} bytes are less than its current {old}: use --shrink to discard the end", file=drive.file
            )
        if isinstance(image, Qcow2Image) and image.tables.snapshots:
            raise ConfigError("has internal snapshots of the old size: it cannot be resized", file=drive.file)
        if size < old:
            image.discard(size, old - size)
    finally:
        image.close()
    file = HostFile(drive.file, writable=True)
    try:
        lock_image(file.fd, drive.file, write=True, required=False)
        if isinstance(image, Qcow2Image):
            _resize_qcow2(file, size)
        else:
            file.truncate(size)
        file.sync()
    finally:
        file.close()
    if size > old and isinstance(image, Qcow2Image):
        image = open_image(drive, warn=warn, allow=allow)
        try:  # the rest of the last cluster, and what a larger backing file would show
            image.write_zeroes(old, size - old, unmap=True)
            image.flush()
        finally:
            image.close()


def _resize_qcow2(file: HostFile, size: int) -> None:
    header = Header.parse(lambda at, length: read_bytes(file, at, length), file.path)

    def corrupt(problem: str) -> OSError:
        return OSError(problem)

    tables, bits = Tables(file, header, corrupt), header.cluster_bits
    entries = max(-(-size // (header.cluster_size * header.cluster_size // 8)), 1)
    header.size = size
    if entries <= header.l1_size:
        tables.write_header()
        return
    if entries * 8 > 32 << 20:
        raise ConfigError(f"{size} bytes are too much for clusters of {header.cluster_size}", file=file.path)
    refcounts, clusters = tables.refcounts, -(-entries * 8 >> bits)
    first = refcounts.reserve(clusters)
    blocks, table, moved = refcounts.begin()
    l1 = tables.l1[:]
    l1.byteswap()
    data = l1.tobytes().ljust(clusters << bits, b"\0")
    for writes in ([*blocks, (first << bits, data)], table):
        for offset, piece in writes:
            file.write(offset, [memoryview(piece)], len(piece))
        file.sync()
    old = range(header.l1_offset >> bits, (header.l1_offset >> bits) + -(-header.l1_size * 8 >> bits))
    header.l1_offset, header.l1_size = first << bits, entries
    if moved:
        header.reftable_offset, header.reftable_clusters = refcounts.table_offset, len(refcounts.table) * 8 >> bits
    tables.write_header()
    file.sync()
    for cluster in (*old, *refcounts.take_outgrown()):
        refcounts.drop(cluster)
    for offset, piece in refcounts.cache.begin():
        file.write(offset, [memoryview(piece)], len(piece))
