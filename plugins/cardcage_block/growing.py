"""A qcow2 image that is in use becomes larger."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from attrs import evolve

if TYPE_CHECKING:
    from cardcage_block.qcow2 import Qcow2Image

__all__ = ["grow_qcow2"]

L1_MAX = 32 << 20
"""Bytes of an L1 table, as QEMU has it."""


def grow_qcow2(image: Qcow2Image, size: int) -> None:
    """Make the disk *size* bytes long, more than now; what is added reads as zeros.

    Raises OSError; the disk is as before then. The order: what is dirty is committed, a larger L1 table is written and
    counted, the header names it. A crash leaves the old size, or the new one with zeros or what a larger backing file
    shows.
    """
    header, old = image._header, image.info.size
    if image.tables.snapshots:
        raise OSError(errno.ENOTSUP, "the image has internal snapshots of the old size")
    entries = max(-(-size // (header.cluster_size * header.cluster_size // 8)), 1)
    if entries * 8 > L1_MAX:
        raise OSError(errno.EFBIG, f"{size} bytes are too much for clusters of {header.cluster_size}")
    with image._committing:
        with image._alloc:
            image._prepare()
        image._commit()
        with image._alloc:
            before = header.size
            header.size = size
            try:
                if entries > header.l1_size:
                    _widen(image, entries)
                else:
                    image.tables.write_header()
            except OSError:
                header.size = before
                raise
            image._health.sync()
    below = image._backing.info.size if image._backing is not None else 0
    end = min(max(-(-old // header.cluster_size) * header.cluster_size, below), size)
    if end > old:
        image.write_zeroes(old, end - old, unmap=True)
        image.flush()
    image.info = evolve(image.info, size=size)


def _widen(image: Qcow2Image, entries: int) -> None:
    """Give the image an L1 table of *entries*, and have the header name it."""
    tables, header, bits = image.tables, image._header, image._bits
    refcounts, clusters = tables.refcounts, -(-entries * 8 >> bits)
    first = refcounts.reserve(clusters)
    place = header.l1_offset, header.l1_size, header.reftable_offset, header.reftable_clusters
    try:
        blocks, counts, moved = ([], [], False) if image._lazy else refcounts.begin()
        table = tables.l1[:]
        table.byteswap()
        image._write_all([*blocks, (first << bits, table.tobytes().ljust(clusters << bits, b"\0"))])
        if counts:
            image._write_all(counts)
        header.l1_offset, header.l1_size = first << bits, entries
        if moved:
            header.reftable_offset = refcounts.table_offset
            header.reftable_clusters = len(refcounts.table) * 8 >> bits
        tables.write_header()
    except OSError:
        header.l1_offset, header.l1_size, header.reftable_offset, header.reftable_clusters = place
        refcounts.undo()
        for cluster in range(first, first + clusters):
            refcounts.drop(cluster)
        raise
    refcounts.done()
    old = range(place[0] >> bits, (place[0] >> bits) + -(-place[1] * 8 >> bits))
    image._limbo.given_up += [*old, *(refcounts.take_outgrown() if moved else ())]
    tables.l1.extend([0] * (entries - len(tables.l1)))
    tables.end = max(tables.end, first + clusters << bits)
    tables.metadata.update(range(first, first + clusters))
