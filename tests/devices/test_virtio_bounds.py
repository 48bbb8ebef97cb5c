"""What a guest, or who is at the other end of a socket, may take of the host is bounded."""

from __future__ import annotations

import os
import resource
import socket
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fuse_client
import nine_client as nine
import pytest
from cardcage.backends import NetFeatures
from cardcage_virtio.devices.balloon import LIST_MAX, Balloon
from cardcage_virtio.devices.console import MESSAGES_MAX, Console, ConsoleOptions
from cardcage_virtio.devices.net import Net, NetOptions
from cardcage_virtio.share.fuse import Op
from cardcage_virtio.share.p9_tree import DEPTH_MAX, Listings
from cardcage_virtio.share.p9_wire import text
from cardcage_virtio.testing import Bench
from cardcage_virtio.vhost.channel import Channel, MemoryRegion
from cardcage_virtio.vhost.kinds import VhostUserFsOptions, vhost_user_fs
from cardcage_virtio.vhost.log import WriteLog
from cardcage_virtio.vsock.stream import BUFFER
from leftovers import Leftovers
from test_virtio_vsock import Guest

DEEP = 1500
NEEDS_RESET = 64


@pytest.fixture
def share(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True)  # pytest's own way recurses


def test_a_fuse_guest_nests_directories(share: Path) -> None:
    """Directories one in the other, far deeper than a path can say, are saved, loaded, and found after being closed."""
    client = fuse_client.Client(share)
    node = 1
    for _ in range(DEEP):
        node = int.from_bytes(client.call(Op.MKDIR, node, struct.pack("<II", 0o755, 0) + b"d\0")[:8], "little")
    device = client.bench.device
    for one in list(device.tree)[1:]:
        one.node = None
    client.call(Op.GETATTR, node, bytes(16))
    state = client.bench.virtio.save()
    assert max(len(names) for _, _, names in state.device.inodes) == DEEP
    client.bench.virtio.load(state)
    client.call(Op.GETATTR, node, bytes(16))
    client.close()


def test_a_9p_guest_nests_directories(tmp_path: Path, monkeypatch: Any) -> None:
    """A fid holds its ancestors' descriptors: past a share of those the process may have, there are no more."""
    monkeypatch.setattr(resource, "getrlimit", lambda which: (400, 400))
    client = nine.Client(tmp_path)
    client.walk(0, 1)
    depths = []

    def deeper() -> None:
        client.call(72, struct.pack("<I", 1) + text(b"d") + struct.pack("<II", 0o755, 0))
        client.walk(1, 2, b"d")
        client.call(120, struct.pack("<I", 1))
        client.walk(2, 1)
        client.call(120, struct.pack("<I", 2))
        depths.append(len(depths) + 1)

    def to_the_end() -> None:
        while len(depths) < 1000:
            deeper()

    with pytest.raises(nine.NineError, match="ENFILE"):
        to_the_end()
    assert 90 < len(depths) < 101
    assert [len(names) for _, names, _ in client.bench.virtio.save().device.fids] == [0, len(depths)]
    client.call(120, struct.pack("<I", 1))
    client.walk(0, 1, b"d")
    client.close()


def test_a_9p_guest_moves_a_directory_into_its_child(tmp_path: Path) -> None:
    """A fid walked through a directory that then moves below it makes no circle: saving ends."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    client = nine.Client(tmp_path)
    client.walk(0, 1, b"a")
    client.walk(0, 2, b"a", b"b")
    client.walk(0, 3, b"a")
    client.call(74, struct.pack("<I", 3) + text(b"b") + struct.pack("<I", 0) + text(b"b"))
    client.call(20, struct.pack("<II", 3, 2) + text(b"x"))
    rows = client.bench.virtio.save().device.fids
    assert max(len(names) for _, names, _ in rows) < DEPTH_MAX
    client.close()


def test_listings_are_few(tmp_path: Path, monkeypatch: Any) -> None:
    """Readers of long directories, all at once, keep few rows between them, and each still sees every name once."""
    monkeypatch.setattr(Listings, "ROWS", 60)
    names = {b"n%d" % at for at in range(50)}
    for name in names:
        (tmp_path / os.fsdecode(name)).touch()
    client = fuse_client.Client(tmp_path)
    handles = [client.open(1, op=Op.OPENDIR) for _ in range(5)]
    found: dict[int, list[bytes]] = {handle: [] for handle in handles}
    offsets = dict.fromkeys(handles, 0)
    going = set(handles)
    while going:
        for handle in sorted(going):
            body = struct.pack("<QQIIQII", handle, offsets[handle], 300, 0, 0, 0, 0)
            rows = client.call(Op.READDIR, 1, body)
            if not rows:
                going.discard(handle)
            while rows:
                _, offsets[handle], length, _ = struct.unpack_from("<QQII", rows)
                found[handle].append(rows[24 : 24 + length])
                rows = rows[24 + (length + 7 & ~7) :]
    for rows_found in found.values():
        assert sorted(rows_found) == sorted({*names, b".", b".."})
    assert len(client.bench.device._listings._kept) == 1
    client.close()


def test_bytes_that_wait_cost_what_they_are(tmp_path: Path) -> None:
    """A guest that sends byte by byte to a program that does not read has no more kept for it than its credit."""
    guest = Guest(tmp_path / "v")
    program, port = guest.call(9)
    driver, stream = guest.bench.driver(1), next(iter(guest.bench.device.streams))
    while not stream.pending:
        guest.send(5, 9, port, b"x" * 4096)
    for _ in range(3000):
        guest.send(5, 9, port, b"y")
    assert stream.pending.endswith(b"y" * 3000)
    assert sys.getsizeof(stream.pending) < 2 * BUFFER
    waiting = len(stream.pending)
    program.settimeout(10)
    got = 0
    while got < 1 or stream.pending:
        got += len(program.recv(1 << 20))
        guest.bench.slot.loop.poll(0.001)
        guest.take()
    assert got >= waiting
    assert driver.free
    program.close()
    guest.close()


def test_a_balloons_lists_are_short() -> None:
    """A list with more pages than any driver sends breaks the device before anything is done."""
    bench = Bench(Balloon())
    bench.driver(0).add([struct.pack("<I", 8000) * LIST_MAX])
    bench.kick(0)
    assert not bench.virtio.status & NEEDS_RESET
    bench.driver(0).add([struct.pack("<I", 8000) * (LIST_MAX + 1)])
    bench.kick(0)
    assert bench.virtio.status & NEEDS_RESET
    bench.close()


def test_resizing_meets_a_driver_that_reads_nothing() -> None:
    """The host may resize the terminal as often as it likes: a driver that takes no message breaks its own device."""

    class Silent:
        def start(self, received: Any) -> None: ...
        def write(self, data: bytes) -> None: ...
        def close(self) -> None: ...

    bench = Bench(Console(ConsoleOptions(char="x", columns=80, rows=25)), backends={"char": Silent()})
    for at in range(MESSAGES_MAX + 5):
        bench.device.resize(80 + at % 7, 25)
    assert bench.virtio.status & NEEDS_RESET
    bench.close()


def test_the_write_log_cannot_be_cut() -> None:
    """A back end that has the log's memory cannot make it shorter under the process that reads it."""
    log = WriteLog([MemoryRegion(0, 1 << 20, 0, 0, -1)])
    with pytest.raises(PermissionError):
        os.ftruncate(log._fd, 0)
    assert log.take(None) == []
    log.close()


def test_descriptors_that_nobody_asked_for_are_closed(tmp_path: Path) -> None:
    """What a back end sends along with an answer that has none does not stay open."""
    ours, peer = socket.socketpair()
    channel = Channel(str(tmp_path / "none"))
    channel._socket.close()
    channel._socket = ours
    left = Leftovers()
    for _ in range(3):
        with open("/dev/null") as one:
            socket.send_fds(peer, [struct.pack("<III", 6, 5, 0)], [one.fileno()] * 5)
        channel.set_log(0, 4096)
    assert left() == []
    channel.close()
    peer.close()


def test_callers_are_turned_away_without_descriptors(tmp_path: Path) -> None:
    """A host program that calls while the process has no descriptor left is hung up on, and the next one is heard."""
    guest = Guest(tmp_path / "v")
    guest.bench.slot.loop.poll()  # makes the loop's own descriptor
    callers = [socket.socket(socket.AF_UNIX) for _ in range(2)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
    taken: list[int] = []
    try:
        with pytest.raises(OSError, match="Too many open files"):
            taken.extend(iter(lambda: os.dup(0), -1))
        callers[0].settimeout(10)
        callers[0].connect(str(tmp_path / "v"))
        guest.bench.slot.loop.poll(10)
        assert callers[0].recv(1) == b""
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in taken:
            os.close(fd)
    callers[1].connect(str(tmp_path / "v"))
    callers[1].sendall(b"CONNECT 9\n")
    assert guest.expect(1)[0].destination_port == 9
    guest.close()
    for one in callers:
        one.close()


def test_a_fault_on_a_worker_is_not_silent(tmp_path: Path) -> None:
    """What a device's worker raises reaches the machine's loop, which stops the machine with it."""
    (tmp_path / "file").touch()
    client = fuse_client.Client(tmp_path, cache="never")

    def fail(request: Any) -> int:
        raise ZeroDivisionError("a fault")

    client.bench.device._workers._process = fail
    client.bench.device._workers._quick = None
    with pytest.raises(ZeroDivisionError, match="a fault"):
        client.lookup(b"file")
    client.close()


def whole_memory(bench: Bench, queue: int, first: int) -> None:
    """A chain that begins with *first* bytes and then names all of memory, thirty times over."""
    size = bench.memory.slots[0].size
    bench.driver(queue).add_raw([(0, first, 0), *[(0, size, 0)] * 30])
    bench.kick(queue)


def test_a_frame_as_long_as_memory(tmp_path: Path) -> None:
    """It is dropped without being copied, whatever its parts are; the next frame is sent."""
    sent: list[bytes] = []

    class Wire:
        features = NetFeatures(0, 1, frozenset())

        def start(self, received: Any) -> None: ...
        def resume(self, queue: int) -> None: ...
        def set_offloads(self, offloads: Any, header: int) -> None: ...
        def send(self, queue: int, parts: Any) -> None:
            sent.append(b"".join(parts))

    bench = Bench(Net(NetOptions(net="x")), backends={"net": Wire()})
    tracemalloc.start()
    try:
        whole_memory(bench, 1, 5)
        bench.until(lambda: bool(bench.driver(1).collect()))
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    bench.driver(1).add([bytes(12) + b"f" * 60])
    bench.kick(1)
    bench.until(lambda: bool(sent))
    assert sent == [b"f" * 60]
    bench.close()


def test_output_as_long_as_memory() -> None:
    """A console buffer that no driver makes breaks the device in place of holding the machine up."""

    class Full:
        def start(self, received: Any) -> None: ...
        def write(self, data: bytes) -> None:
            raise AssertionError("something was written")

        def close(self) -> None: ...

    bench = Bench(Console(ConsoleOptions(char="x")), backends={"char": Full()})
    whole_memory(bench, 1, 5)
    assert bench.virtio.status & NEEDS_RESET
    bench.close()


def test_a_refused_message_as_long_as_memory() -> None:
    """A revoked vhost-user-fs answers from a message's header, without a copy of what follows."""
    device = vhost_user_fs(VhostUserFsOptions("/nowhere"))
    memory = memoryview(bytearray(1 << 20))
    struct.pack_into("<IIQ", memory, 0, 40, 1, 77)
    answers: list[bytes] = []
    request = SimpleNamespace(
        readable=[memory[:5], memory[5:], *[memory] * 4000],
        readable_size=4001 << 20,
        writable_size=100,
        write=lambda data: answers.append(data) or len(data),
        done=lambda written=0: None,
    )
    device._refuse(request)
    assert answers == [struct.pack("<IiQ", 16, -13, 77)]
