"""``check_block_backend``: the contract of :class:`~cardcage.backends.BlockBackend`."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from attrs import evolve
from cardcage._machine.abilities import BACKENDS, check_backend
from cardcage.abilities import has, near_misses
from cardcage.backends import TryReads, TryWrites
from cardcage.segments import Segments

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cardcage.backends import BlockBackend

__all__ = ["check_block_backend"]

SECTOR = 512


def check_block_backend(make: Callable[[], BlockBackend], *, requests: int = 500, seed: int = 1) -> None:
    """Hold a back end to the contract; raises CardError or AssertionError with what it broke.

    Args:
        make: makes a back end, which is written to and closed. requests: number of random requests. seed: of them.

    The contract: methods have the agreed signatures; what is written is read again, by ``readv`` and, where it does
    not decline, ``try_readv``, into lists of buffers and :class:`~cardcage.segments.Segments` alike; zeroes written
    read as zeroes, and what is discarded leaves its neighbours alone; a read-only back end is only read. One that can
    ``grow`` does, keeps what it has, and shows zeroes behind it.
    """
    backend = make()
    try:
        who = type(backend).__name__
        check_backend("block", backend, who)
        misses = near_misses(backend, BACKENDS["block"])
        assert not misses, f"{who}: {'; '.join(misses)}"
        _compare(backend, random.Random(seed), requests)
        backend.flush()
        if callable(grow := getattr(backend, "grow", None)) and not backend.info.readonly:
            _grow(backend, grow)
    finally:
        backend.close()


def _compare(backend: BlockBackend, choice: random.Random, requests: int) -> None:
    info, who = backend.info, type(backend).__name__
    sectors = min(info.size // SECTOR, 2048)
    assert sectors, f"{who}: its size is {info.size} bytes, expected a sector of {SECTOR} at least"
    known = bytearray(sectors * SECTOR)
    backend.readv(0, [memoryview(known)])
    acts = ["read", *(() if info.readonly else ("write", "zero", "discard"))]
    for _ in range(requests):
        first = choice.randrange(sectors)
        offset, size = first * SECTOR, choice.randint(1, min(sectors - first, 64)) * SECTOR
        act = choice.choice(acts)
        where = f"{offset:#x}+{size:#x}"
        if act == "write":
            data = bytearray(choice.randbytes(size))
            buffers = _cut(data, choice)
            if not has(backend, TryWrites) or not backend.try_writev(offset, buffers):
                backend.writev(offset, buffers)
            known[offset : offset + size] = data
        elif act == "zero":
            backend.write_zeroes(offset, size, unmap=choice.random() < 0.5)
            known[offset : offset + size] = bytes(size)
        elif act == "discard":
            backend.discard(offset, size)
            backend.readv(offset, [memoryview(known)[offset : offset + size]])  # anything may be there now
        reads: list[Callable[[int, Sequence[memoryview]], object]] = [backend.readv]
        if has(backend, TryReads):
            reads.insert(0, backend.try_readv)
        for read in reads:
            found = bytearray(size)
            if read(offset, _cut(found, choice)) is not False:
                name = read.__name__
                assert found == known[offset : offset + size], f"{who}: {name} of {where} after {act}: other bytes"
    found = bytearray(len(known))
    backend.readv(0, [memoryview(found)])
    assert found == known, f"{who}: what was not written has changed"


def _grow(backend: BlockBackend, grow: Callable[[int], object]) -> None:
    before, who = backend.info, type(backend).__name__
    last, more = bytearray(SECTOR), bytearray(3 * SECTOR)
    backend.readv(before.size - SECTOR, [memoryview(last)])
    grow(before.size + len(more))
    assert backend.info == evolve(before, size=before.size + len(more)), f"{who}: grown, it says {backend.info}"
    found = bytearray(SECTOR + len(more))
    backend.readv(before.size - SECTOR, [memoryview(found)])
    assert found == last + more, f"{who}: other bytes at its old end, or no zeroes behind"
    backend.writev(before.size, [memoryview(last)])
    backend.flush()


def _cut(data: bytearray, choice: random.Random) -> Sequence[memoryview]:
    """*data* in pieces as a guest's drivers make them: a list, or Segments."""
    starts = [0, *sorted({SECTOR * choice.randrange(1, max(len(data) // SECTOR, 2)) for _ in range(3)})]
    starts = [at for at in starts if at < len(data)]
    lengths = [end - at for at, end in zip(starts, [*starts[1:], len(data)], strict=True)]
    segments = Segments(memoryview(data), starts, lengths)
    return segments if choice.random() < 0.5 else list(segments)
