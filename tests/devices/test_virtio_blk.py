"""The block device against a disk in memory."""

from __future__ import annotations

import struct
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from cardcage._host.log import Log, LogSink
from cardcage._machine.granted import BackendGate, MemoryGate
from cardcage.backends import BlockInfo
from cardcage.memory import GuestMemoryError
from cardcage_block.drive import Drive, open_image
from cardcage_virtio.devices.blk import Blk, BlkOptions
from cardcage_virtio.queue.request import Window
from cardcage_virtio.queue.workers import SLOW
from cardcage_virtio.testing import WRITE, Bench, ram
from hypothesis import given, settings
from hypothesis import strategies as st

MIB = 1 << 20


class MemoryDisk:
    """A block back end whose bytes the test sees."""

    def __init__(self, size: int = MIB, **info: Any) -> None:
        self.data, self.info, self.calls = bytearray(size), BlockInfo(size, **info), []
        self.fail: OSError | None = None

    def _note(self, *what: Any) -> None:
        self.calls.append(what)
        if self.fail is not None:
            raise self.fail

    def readv(self, offset: int, buffers: Any) -> None:
        self._note("readv", offset)
        for buffer in buffers:
            buffer[:] = self.data[offset : offset + len(buffer)]
            offset += len(buffer)

    def writev(self, offset: int, buffers: Any) -> None:
        self._note("writev", offset)
        for buffer in buffers:
            self.data[offset : offset + len(buffer)] = buffer
            offset += len(buffer)

    def flush(self) -> None:
        self._note("flush")

    def discard(self, offset: int, length: int) -> None:
        self._note("discard", offset, length)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self._note("zeroes", offset, length, unmap)
        self.data[offset : offset + length] = bytes(length)

    def close(self) -> None: ...


def make(disk: MemoryDisk | None = None, **more: Any) -> tuple[Bench, MemoryDisk]:
    disk = disk or MemoryDisk(discard=True, write_zeroes=True)
    form = {name: more.pop(name) for name in ("packed", "indirect", "event_index", "features") if name in more}
    return Bench(Blk(BlkOptions(drive="x", **more)), backends={"block": disk}, **form), disk


def head(kind: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


@pytest.fixture
def made() -> Any:
    bench, disk = make()
    yield bench, disk
    bench.close()


def test_what_was_written_is_read(made: Any) -> None:
    """Writes and reads of several parts land at their sectors."""
    bench, disk = made
    assert bench.call([head(1, 3), b"a" * 512, b"b" * 512], [1]) == b"\0"
    assert disk.data[3 * 512 : 5 * 512] == b"a" * 512 + b"b" * 512
    assert bench.call([head(0, 4)], [256, 256, 1]) == b"b" * 512 + b"\0"


def test_any_layout_is_accepted(made: Any) -> None:
    """Header, data and status may be cut anywhere (virtio 1.2, 2.7.4)."""
    bench, disk = made
    blob = head(1, 1) + b"x" * 512
    assert bench.call([blob[:5], blob[5:20], blob[20:]], [1]) == b"\0"
    assert disk.data[512:1024] == b"x" * 512
    assert bench.call([head(0, 1)[:8], head(0, 1)[8:]], [513]) == b"x" * 512 + b"\0"


def test_flush_discard_zeroes_and_serial() -> None:
    """The other commands reach the back end; the serial is padded to 20 bytes."""
    bench, disk = make(serial="disk-7")
    assert bench.call([head(4)], [1]) == b"\0"
    assert bench.call([head(11), struct.pack("<QII", 8, 16, 0)], [1]) == b"\0"
    assert bench.call([head(13), struct.pack("<QIIQII", 0, 1, 1, 9, 2, 0)], [1]) == b"\0"
    assert disk.calls == [
        ("flush",),
        ("discard", 4096, 8192),
        ("zeroes", 0, 512, True),
        ("zeroes", 4608, 1024, False),
    ]
    assert bench.call([head(8)], [20, 1]) == b"disk-7".ljust(20, b"\0") + b"\0"
    assert bench.call([head(99)], [1]) == b"\2"
    bench.close()


@pytest.mark.parametrize(
    ("request_", "sizes"),
    [
        ([head(0, 2048)], [512, 1]),
        ([head(0, 2047)], [1024, 1]),
        ([head(0, (1 << 64) - 1)], [512, 1]),
        ([head(0)], [100, 1]),
        ([head(1, 2048), b"x" * 512], [1]),
        ([head(1), b"x" * 100], [1]),
        ([head(11), b"short"], [1]),
        ([head(11), struct.pack("<QII", 2000, 100, 0)], [1]),
        ([head(13), struct.pack("<QII", 0, 0xFFFFFFFF, 0)], [1]),
        ([head(8)], [10, 1]),
    ],
)
def test_requests_outside_the_disk_fail(made: Any, request_: list[bytes], sizes: list[int]) -> None:
    """Bad sectors and lengths are answered with an I/O error and reach no back end."""
    bench, disk = made
    assert bench.call(request_, sizes)[-1] == 1
    assert disk.calls == []


def test_a_readonly_disk_is_not_written() -> None:
    """Read-only by option or back end: the feature is offered and writes fail."""
    bench, disk = make(readonly=True)
    assert bench.virtio.offered >> 5 & 1
    assert bench.call([head(1), b"x" * 512], [1]) == b"\1"
    assert bench.call([head(11), struct.pack("<QII", 0, 1, 0)], [1]) == b"\2"
    assert disk.calls == []
    bench.close()


def test_back_end_errors_become_io_errors(made: Any) -> None:
    """An OSError is logged and the guest sees an I/O error."""
    bench, disk = made
    disk.fail = OSError(5, "broken")
    assert bench.call([head(0)], [512, 1])[-1] == 1
    assert bench.slot.log.entries[0][1] == "block request failed"


def test_without_flush_writes_go_through() -> None:
    """A driver that did not take FLUSH gets each write made durable."""
    bench, disk = make(features=~(1 << 9) & (1 << 64) - 1)
    assert bench.call([head(1), b"x" * 512], [1]) == b"\0"
    assert [call[0] for call in disk.calls] == ["writev", "flush"]
    bench.close()


def test_configuration_space() -> None:
    """Capacity, block size, topology, queues and limits stand where the specification has them."""
    bench, _ = make(MemoryDisk(8 * MIB, discard=True, write_zeroes=True), queues=3, queue_size=128)
    config = bench.device.config()
    assert len(config) == 60
    assert struct.unpack_from("<Q4xI4xI", config) == (16384, 126, 512)
    assert config[24] == 3
    assert struct.unpack_from("<H", config, 34) == (3,)
    assert config[56] == 1
    bench.close()


@pytest.mark.parametrize("packed", [False, True])
def test_many_requests_on_many_queues(packed: bool) -> None:
    """Hundreds of requests over several queues and workers all come back right."""
    disk = MemoryDisk()
    disk.data[:] = b"".join(struct.pack("<Q", at) * 64 for at in range(2048))
    bench, _ = make(disk, queues=4, threads=4, packed=packed, indirect=True)
    for queue in range(4):
        tokens = {bench.driver(queue).add([head(0, queue * 100 + at)], [512, 1]): queue * 100 + at for at in range(100)}
        bench.kick(queue)
        found = bench.wait(queue, 100)
        assert {token: struct.unpack_from("<Q", data)[0] for token, data in found.items()} == tokens
    bench.close()


def test_reset_waits_for_requests_in_flight() -> None:
    """After a reset no worker touches the old buffers, and the device works again."""
    bench, _ = make(threads=4)
    for _ in range(20):
        for at in range(60):
            bench.driver().add([head(0, at)], [4096, 1])
        bench.kick()
        bench.start()
        assert bench.device._workers.active == 0
        assert bench.call([head(0)], [512, 1])[-1] == 0
    bench.close()


def test_queue_reset_leaves_other_queues_going() -> None:
    """Requests waiting in another queue are served although one queue is reset under way."""
    bench, _ = make(queues=2)
    for at in range(50):
        bench.driver(1).add([head(0, at)], [512, 1])
    bench.kick(1)
    bench.virtio.reset_queue(0)
    assert len(bench.wait(1, 50)) == 50
    bench.close()


def test_a_pause_holds_requests() -> None:
    """While the machine is paused nothing is taken from the rings; afterwards all is served."""
    bench, disk = make()
    bench.virtio.pause()
    for at in range(5):
        bench.driver().add([head(0, at)], [512, 1])
    bench.kick()
    assert bench.device._workers.active == 0
    bench.virtio.save()
    assert bench.driver().used() == []
    assert disk.calls == []
    bench.virtio.resume()
    assert len(bench.wait(0, 5)) == 5
    bench.close()


def test_a_read_at_hand_is_served_at_once() -> None:
    """A back end with try_readv serves the first read on the notifying thread; what would wait goes to a worker."""
    disk = MemoryDisk()
    ready = True

    def try_readv(offset: int, buffers: Any) -> bool:
        if ready:
            MemoryDisk.readv(disk, offset, buffers)
        return ready

    disk.try_readv = try_readv  # type: ignore[attr-defined]  # what a disk may have
    disk.data[512:1024] = b"n" * 512
    bench, _ = make(disk)
    bench.driver().add([head(0, 1)], [512, 1])
    bench.kick()
    assert [data for _, data in bench.driver().used()] == [b"n" * 512 + b"\0"]
    ready = False
    disk.calls.clear()
    for at in range(40):
        bench.driver().add([head(0, at)], [512, 1])
    bench.kick()
    assert len(bench.wait(0, 40)) == 40
    assert len(disk.calls) == 40
    assert bench.call([head(0, 1 << 40)], [512, 1])[-1] == 1
    bench.close()


def test_a_write_at_hand_is_served_at_once() -> None:
    """A back end with try_writev serves the first write on the notifying thread; what would wait goes to a worker."""
    disk = MemoryDisk()
    ready = True

    def try_writev(offset: int, buffers: Any) -> bool:
        if ready:
            MemoryDisk.writev(disk, offset, buffers)
        return ready

    disk.try_writev = try_writev  # type: ignore[attr-defined]  # what a disk may have
    bench, _ = make(disk)
    bench.driver().add([head(1, 3), b"n" * 512], [1])
    bench.kick()
    assert [data for _, data in bench.driver().used()] == [b"\0"]
    assert disk.data[1536:2048] == b"n" * 512
    ready = False
    disk.calls.clear()
    for at in range(20):
        bench.driver().add([head(1, at), b"m" * 512], [1])
    bench.kick()
    assert len(bench.wait(0, 20)) == 20
    assert len(disk.calls) == 20
    assert bench.call([head(1, 1 << 40), bytes(512)], [1]) == b"\1"
    bench.close()


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("features", [0, 1 << 32])
def test_a_write_without_a_cache_is_flushed(write: bool, features: int) -> None:
    """A driver that did not agree to flushes gets each write flushed, at hand or not."""
    disk = MemoryDisk()
    disk.try_writev = lambda offset, buffers: write  # type: ignore[attr-defined]  # as above
    bench, _ = make(disk, **({"features": features} if features else {}))
    assert bench.call([head(1), bytes(512)], [1]) == b"\0"
    assert (("flush",) in disk.calls) == bool(features)
    bench.close()


@pytest.mark.parametrize("packed", [False, True])
def test_long_requests_reach_the_file(packed: bool, tmp_path: Path) -> None:
    """A transfer of hundreds of parts is right, at once or by a worker, with and without the host's cache."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(4 << 20))
    for cache in ("writeback", "none"):
        image = open_image(Drive(str(path), format="raw", cache=cache), warn=print)
        for quick in (True, False):
            bench = Bench(Blk(BlkOptions(drive="x")), backends={"block": image}, packed=packed, indirect=True, size=256)
            if not quick:
                bench.device._workers._quick = None
            parts = [bytes([at ^ quick]) * 512 * (1 + at % 3) for at in range(250)]
            assert bench.call([head(1, 8), *parts], [1]) == b"\0"
            whole = b"".join(parts)
            assert path.read_bytes()[4096 : 4096 + len(whole)] == whole
            assert bench.call([head(0, 8)], [*map(len, parts), 1]) == whole + b"\0"
            bench.device._workers.close()
        image.close()


def test_workers_share_a_queue_whose_requests_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """After requests that had to wait for the host, as many as there are workers are under way together."""
    monkeypatch.setattr("cardcage_virtio.queue.workers.LINGER", 0)  # each request counts as one that had to wait
    disk = MemoryDisk()
    together = Barrier(4)
    bench, _ = make(disk, threads=4)
    for _ in range(SLOW):
        assert bench.call([head(0)], [512, 1])[-1] == 0
    disk.readv = lambda offset, buffers: together.wait(10) and None  # type: ignore[method-assign, assignment]  # a disk that waits
    for at in range(8):
        bench.driver().add([head(0, at)], [512, 1])
    bench.kick()
    assert {data[-1] for data in bench.wait(0, 8).values()} == {0}
    bench.close()


REQUEST = st.tuples(
    st.lists(st.binary(max_size=40) | st.builds(head, st.integers(0, 14), st.integers(0, 4096)), max_size=4),
    st.lists(st.sampled_from([0, 1, 20, 511, 512, 4096]), max_size=4),
)


@given(st.lists(REQUEST, max_size=10), st.booleans())
@settings(deadline=None)
def test_random_requests_never_hurt(requests: list[tuple[list[bytes], list[int]]], packed: bool) -> None:
    """Whatever a request looks like, it is answered or the device needs a reset, after which it works."""
    bench, disk = make(packed=packed, threads=1)
    for readable, sizes in requests:
        driver = bench.driver()
        parts = [(driver.place(max(len(data), 1)), len(data), 0) for data in readable]
        for (address, _, _), data in zip(parts, readable, strict=True):
            bench.memory.write(address, data)
        parts += [(driver.place(max(size, 1)), size, WRITE) for size in sizes]
        if parts:
            driver.add_raw(parts)
    bench.kick()
    bench.start()
    assert bench.call([head(0)], [512, 1])[-1] == 0
    assert len(disk.data) == MIB
    bench.close()


def test_a_revoked_disk_fails_requests_and_comes_back() -> None:
    """While the back end is shut reads and writes are I/O errors, however they are served; after it they go on."""

    class Memory:
        info = BlockInfo(1 << 20)

        def try_readv(self, offset: int, buffers: Any) -> bool:
            self.readv(offset, buffers)
            return True

        def readv(self, offset: int, buffers: Any) -> None:
            for buffer in buffers:
                buffer[:] = b"x" * len(buffer)

        def close(self) -> None: ...

    gate = BackendGate("block")
    bench = Bench(Blk(BlkOptions(drive="")), backends={"block": gate.before(Memory())})
    read = [struct.pack("<IIQ", 0, 0, 0)], [512, 1]
    assert bench.call(*read) == b"x" * 512 + b"\0"
    gate.shut("image")()
    assert bench.call(*read)[-1] == 1
    gate.open("image")()
    assert bench.call(*read) == b"x" * 512 + b"\0"
    bench.close()


def test_a_window_of_revoked_memory_is_shut() -> None:
    """The long view of RAM that buffers are cut from is given up when DMA is revoked, and asked for again."""
    physical = ram(1 << 20)
    gate = MemoryGate(physical, Log(LogSink(level="error")))
    window = Window(gate.memory)
    window.renew()
    assert window.piece(0, 16) == bytes(16)
    gate.switch("writes", False)()
    window.renew()
    with pytest.raises(GuestMemoryError):
        window.piece(0, 16)
    gate.switch("writes", True)()
    window.renew()
    assert window.piece(0, 16) == bytes(16)
