"""Cost of one virtio request in pure Python: driver kit, no guest.

    python benchmarks/virtio.py [--seconds 1]

The device's share is timed: buffers are made available beforehand and collected afterwards, outside the clock. ``blk``
reads or writes 4 KiB of memory, or of a file in the page cache, whose rows have no goal: the kernel's share is in them.
Its figure runs from the notification until the last request of a batch is back, worker threads included. ``net`` sends
and receives frames of 1514 bytes without a back end.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from contextlib import suppress
from functools import partial
from itertools import product
from queue import Empty, SimpleQueue
from statistics import median
from typing import TYPE_CHECKING, Any

from cardcage.backends import BlockInfo, NetFeatures
from cardcage_virtio.devices.blk import Blk, BlkOptions
from cardcage_virtio.devices.net import Net, NetOptions
from cardcage_virtio.testing import Bench

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SIZE = 64 << 20


class Bytes:
    """The shortest block back end: bytes in this process, few enough to stay in the processor's cache."""

    def __init__(self) -> None:
        self.data, self.info = memoryview(bytearray(1 << 20)), BlockInfo(1 << 20)

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        for buffer in buffers:
            end = offset + len(buffer)
            buffer[:] = self.data[offset:end]
            offset = end

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        for buffer in buffers:
            end = offset + len(buffer)
            self.data[offset:end] = buffer
            offset = end

    def try_readv(self, offset: int, buffers: Sequence[memoryview]) -> bool:
        self.readv(offset, buffers)
        return True

    def try_writev(self, offset: int, buffers: Sequence[memoryview]) -> bool:
        self.writev(offset, buffers)
        return True

    def flush(self) -> None: ...

    def discard(self, offset: int, length: int) -> None: ...

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None: ...

    def close(self) -> None: ...


class File(Bytes):
    """A file in the page cache, by preadv and pwritev."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as this object
        self.file.write(os.urandom(1 << 20) * (SIZE >> 20))
        self.file.flush()
        self.fd, self.info = self.file.fileno(), BlockInfo(SIZE)

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        os.preadv(self.fd, buffers, offset)

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        os.pwritev(self.fd, buffers, offset)

    def close(self) -> None:
        self.file.close()


class Nothing:
    """A network back end that takes frames and forgets them."""

    features = NetFeatures(vnet_header=12)

    def start(self, received: Callable[[int, bytes], bool]) -> None:
        self.received = received

    def send(self, queue: int, parts: Any) -> None: ...

    def resume(self, queue: int) -> None: ...

    def set_offloads(self, offloads: frozenset[str], vnet_header: int) -> None: ...

    def close(self) -> None: ...


def blk(seconds: float, depth: int, write: bool, disk: type[Bytes], **form: Any) -> tuple[float, float, int]:
    """Microseconds for each request by the wall (median) and of processor time (mean), and how many were done."""
    form["event_index"] = False  # so that each batch that completes wakes the waiting thread
    back_end = disk()
    bench = Bench(Blk(BlkOptions(drive="x", threads=2)), backends={"block": back_end}, **form)
    driver, clock, count, spent, cpu = bench.driver(), time.perf_counter, 0, 0.0, 0.0
    batches: list[float] = []
    told: SimpleQueue[int] = SimpleQueue()  # it costs less than the threading module's own
    bench.virtio.transport.queue_interrupt = told.put  # type: ignore[method-assign]  # it only ends a request
    bench.start()
    driver, packed = bench.driver(), form.get("packed", False)
    slots = (2 if write else 3) + write if packed and not form.get("indirect") else 1
    ring: Any = bench.virtio.rings[0]
    place, target = 2 if packed else 1, 0
    data = [bytes(4096)] if write else []
    while spent < seconds:
        for at in range(depth):
            sector = (count + at) * 7919 % (back_end.info.size >> 12) * 8
            header = (write.to_bytes(8, "little")) + sector.to_bytes(8, "little")
            driver.add([header, *data], [1] if write else [4096, 1])
        target = (target + depth * slots) % (ring.size if packed else 1 << 16)
        start, busy = clock(), time.process_time()
        bench.kick()
        while ring.save()[place] != target:
            with suppress(Empty):
                told.get(timeout=1)  # blocked, as a vCPU is in guest code: it does not hold the interpreter's lock
        batches.append(clock() - start)
        spent, cpu = spent + batches[-1], cpu + time.process_time() - busy
        driver.collect()
        count += depth
    bench.close()
    return median(batches) / depth * 1e6, cpu / count * 1e6, count


def net(seconds: float, receive: bool, depth: int = 64, **form: Any) -> tuple[float, float, int]:
    """Microseconds for each frame by the wall (median) and of processor time (mean), and how many were moved."""
    wire = Nothing()
    bench = Bench(Net(NetOptions(net="x")), backends={"net": wire}, **form)
    clock, count, spent, cpu, frame = time.perf_counter, 0, 0.0, 0.0, bytes(12 + 1514)
    batches: list[float] = []
    driver = bench.driver(0 if receive else 1)
    while spent < seconds:
        for _ in range(depth):
            driver.add([] if receive else [bytes(12), bytes(1514)], [2048] if receive else [])
        start, busy = clock(), time.process_time()
        if receive:
            for _ in range(depth):
                wire.received(0, frame)
        else:
            bench.kick(1)
            bench.slot.loop.poll()
        batches.append(clock() - start)
        spent, cpu = spent + batches[-1], cpu + time.process_time() - busy
        driver.collect()
        count += depth
    bench.close()
    return median(batches) / depth * 1e6, cpu / count * 1e6, count


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each row")
    seconds = parser.parse_args().seconds
    rows: list[tuple[str, Callable[[], tuple[float, float, int]], float]] = []
    for packed in (False, True):
        for indirect in (False, True):
            form: dict[str, Any] = {"packed": packed, "indirect": indirect}
            name = f"{'packed' if packed else 'split'}{' indirect' * indirect}"
            for depth, write in product((1, 32), (False, True)):
                what = f"blk 4K {'write' if write else 'read'} depth {depth}, {name}"
                rows.append((what, partial(blk, seconds, depth, write, Bytes, **form), 15))
                if form == {"packed": False, "indirect": True}:  # as Linux makes them
                    rows.append(("  of a file", partial(blk, seconds, depth, write, File, **form), 0))
            for receive in (False, True):
                what = f"net {'receive' if receive else 'send'}, {name}"
                rows.append((what, partial(net, seconds, receive, **form), 10))
    print(f"{'':48} {'wall us':>9} {'cpu us':>9} {'goal':>6} {'count':>9}")
    for what, run, goal in rows:
        wall, cpu, count = run()
        print(f"{what:48} {wall:9.2f} {cpu:9.2f} {goal or '':>6} {count:9}")
    for size, memory in ((16, 64 << 20), (1024, 64 << 20), (256, 1 << 30)):
        wall, cpu, count = net(seconds, False, depth=8, size=size, memory=memory)
        print(f"{f'net send, ring of {size}, {memory >> 20} MiB':48} {wall:9.2f} {cpu:9.2f} {10:6} {count:9}")


if __name__ == "__main__":
    main()
