"""RAM on its way: what was ever touched, and then what was written meanwhile, by the accelerator's dirty log."""

from __future__ import annotations

import gc
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cardcage.abilities import has
from cardcage.accelerator import DirtyLog
from cardcage.ram import PAGE
from cardcage_snapshot.pages import file_runs, runs_of

from cardcage_migrate.wire import PIECE, RUN, RUNS, runs_in

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from cardcage.machine import Machine
    from cardcage.ram import RamBlock
    from cardcage_snapshot.pages import Run

    from cardcage_migrate.wire import Frame

__all__ = ["Written", "bodies", "joined", "put", "runs_of_bitmap", "uncollected", "why_not"]

BITS = [bytes(byte >> bit & 1 for bit in range(8)) for byte in range(256)]
ZEROS = bytes(PAGE)


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage is collected while a guest stands still: to look at all objects takes longer than all else."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def why_not(machine: Machine) -> str:
    """In one line why what the machine writes cannot be told; empty when it can."""
    if "dirty-log" not in machine.vm.capabilities or not has(machine.vm, DirtyLog):
        return f'the accelerator "{machine.accelerator.name}" has no dirty log'
    return ""


class Written:
    """The pages of *block* that are written from now on, by vCPUs, devices and other processes, until it is closed.

    Raises StateError where somebody else has the machine's dirty log.
    """

    def __init__(self, machine: Machine, block: RamBlock) -> None:
        self._machine, self._block = machine, block
        log: Any = machine.vm
        self._log = log
        log.start_dirty_log()

    def touched(self) -> list[Run]:
        """Where RAM may hold anything but zeros."""
        runs, below = runs_of(self._block)
        return joined([*runs, *(file_runs(below, self._block.size) if below >= 0 else ())])

    def fetch(self) -> list[Run]:
        """The pages that were written since the last call: sorted runs of whole pages."""
        found: list[Run] = []
        for slot in self._machine.memory.slots:
            base = slot.host_address - self._block.host_address
            if 0 <= base < self._block.size:
                found += ((base + offset, size) for offset, size in runs_of_bitmap(self._log.fetch_dirty_log(slot)))
        return joined(found)

    def close(self) -> None:
        """Watch no longer."""
        self._log.stop_dirty_log()


def runs_of_bitmap(bitmap: bytes) -> Iterator[Run]:
    """Offset and size, in bytes, of the runs of pages whose bits are set, in little-endian order."""
    for some in re.finditer(rb"[^\0]+", bitmap):
        pages, first = b"".join(map(BITS.__getitem__, some[0])), some.start() * 8
        for run in re.finditer(b"\1+", pages):
            yield (first + run.start()) * PAGE, len(run[0]) * PAGE


def joined(runs: Iterable[Run]) -> list[Run]:
    """Runs in order, none overlapping or touching another."""
    found: list[Run] = []
    for offset, size in sorted(runs):
        if found and offset <= sum(found[-1]):
            found[-1] = found[-1][0], max(sum(found[-1]), offset + size) - found[-1][0]
        else:
            found.append((offset, size))
    return found


def bodies(
    block: RamBlock, runs: Iterable[Run], *, piece: int = PIECE, zeros: bool = True
) -> Iterator[tuple[int, bytes]]:
    """Number of runs and body of the frames that carry *runs*, each copied at one moment.

    Args:
        piece: bytes of RAM in a frame, at most: whole pages, up to :data:`~cardcage_migrate.wire.PIECE`.
        zeros: pages of zeros too; without them where the other side has never had any others.
    """
    table, size = bytearray(), 0
    data: list[memoryview] = []
    for offset, length in _pieces(block, runs, piece, zeros):
        if size + length > piece or len(table) == RUNS * RUN.size:
            yield len(table) // RUN.size, b"".join([table, *data])
            table, data, size = bytearray(), [], 0
        table += RUN.pack(offset, length)
        data.append(block.view[offset : offset + length])
        size += length
    if size:
        yield len(table) // RUN.size, b"".join([table, *data])


def _pieces(block: RamBlock, runs: Iterable[Run], piece: int, zeros: bool) -> Iterator[Run]:
    for offset, length in runs:
        for at in range(offset, offset + length, piece):
            size = min(piece, offset + length - at)
            if zeros:
                yield at, size
            else:
                yield from _filled(bytes(block.view[at : at + size]), at)


def _filled(data: bytes, base: int) -> Iterator[Run]:
    """The pages of *data* that are not all zeros."""
    start = -1
    for at in range(0, len(data), PAGE):
        if data.startswith(ZEROS, at):
            if start >= 0:
                yield base + start, at - start
            start = -1
        elif start < 0:
            start = at
    if start >= 0:
        yield base + start, len(data) - start


def put(block: RamBlock, frame: Frame) -> None:
    """Write a frame's runs into RAM. Raises BrokenStream; then nothing of it is written."""
    runs = runs_in(frame, block.size)
    at = len(runs) * RUN.size
    for offset, length in runs:
        block.view[offset : offset + length] = frame.body[at : at + length]
        at += length
