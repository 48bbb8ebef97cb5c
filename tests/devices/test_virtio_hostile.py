"""Every device against a driver that does anything at all: rings, descriptors, registers, resets, in any order.

The vhost-user front end has a back end besides that answers anything at all.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import struct
import threading
from pathlib import Path
from typing import Any

import pytest
from cardcage.backends import BlockInfo, NetFeatures
from cardcage.errors import ConfigError
from cardcage_virtio.devices.balloon import Balloon, BalloonOptions
from cardcage_virtio.devices.blk import Blk, BlkOptions
from cardcage_virtio.devices.console import Console, ConsoleOptions, PortOptions
from cardcage_virtio.devices.net import Net, NetOptions
from cardcage_virtio.devices.rng import Rng, RngOptions
from cardcage_virtio.share.fs import Fs, FsOptions
from cardcage_virtio.share.p9 import P9, P9Options
from cardcage_virtio.testing import Bench
from cardcage_virtio.vhost.kinds import VhostUserBlkOptions, vhost_user_blk
from cardcage_virtio.vsock.device import Vsock, VsockOptions
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

MEMORY = 1 << 20
BUFFERS = MEMORY // 2


class AnyBackend:
    """A disk, a network and a character back end at once."""

    def __init__(self) -> None:
        self.info = BlockInfo(1 << 16, discard=True, write_zeroes=True)
        self.features = NetFeatures(vnet_header=12, offloads=frozenset({"csum", "tso4"}))
        self.data = bytearray(1 << 16)

    def readv(self, offset: int, buffers: Any) -> None:
        for buffer in buffers:
            buffer[:] = self.data[offset : offset + len(buffer)]
            offset += len(buffer)

    def writev(self, offset: int, buffers: Any) -> None:
        for buffer in buffers:
            assert offset + len(buffer) <= len(self.data)
            self.data[offset : offset + len(buffer)] = buffer
            offset += len(buffer)

    def flush(self) -> None: ...

    def discard(self, offset: int, length: int) -> None:
        assert offset + length <= len(self.data)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        assert offset + length <= len(self.data)

    def start(self, received: Any) -> None:
        self.received = received

    def send(self, queue: int, parts: Any) -> None:
        assert sum(map(len, parts)) <= 65550 + 12

    def write(self, data: bytes) -> None:
        assert len(data) <= 1 << 16

    def resume(self, queue: int) -> None: ...

    def set_offloads(self, offloads: frozenset[str], vnet_header: int) -> None: ...

    def close(self) -> None: ...


def device(name: str, folder: Path) -> Any:
    """A device of each kind."""
    if name in ("9p", "fs"):
        (folder / "d").mkdir(exist_ok=True)
        (folder / "d" / "f").write_text("x")
    return {
        "blk": lambda: Blk(BlkOptions(drive="x", queues=2, threads=1)),
        "net": lambda: Net(NetOptions(net="x", queues=2)),
        "console": lambda: Console(ConsoleOptions(char="x", ports=(PortOptions("y", name="z"),))),
        "rng": lambda: Rng(RngOptions()),
        "balloon": lambda: Balloon(BalloonOptions(stats_interval=1)),
        "vsock": lambda: Vsock(VsockOptions(cid=3, uds=str(folder / "v"))),
        "9p": lambda: P9(P9Options(path=str(folder / "d"))),
        "fs": lambda: Fs(FsOptions(path=str(folder / "d"))),
    }[name]()


ADDRESS = st.sampled_from([0, 4096, 8192, BUFFERS, BUFFERS + 4096, MEMORY - 1, MEMORY, 1 << 32, (1 << 64) - 1])
LENGTH = st.sampled_from([0, 1, 8, 12, 16, 32, 44, 100, 512, 513, 4096, 70000, 1 << 19, 0xFFFFFFFF])
PART = st.tuples(ADDRESS, LENGTH, st.integers(0, 7))
BODY = st.one_of(
    st.binary(max_size=64),
    st.builds(struct.pack, st.just("<IIQ"), st.integers(0, 14), st.just(0), st.integers(0, 200)),
    st.builds(struct.pack, st.just("<IHH"), st.integers(0, 3), st.integers(0, 8), st.integers(0, 2)),
    st.builds(struct.pack, st.just("<IIQQ4I"), *[st.just(40), st.integers(0, 50), *[st.integers(0, 3)] * 6]),
    st.builds(struct.pack, st.just("<IBHI"), st.just(30), st.integers(6, 126), st.just(1), st.integers(0, 3)),
)
OPERATION = st.one_of(
    st.tuples(st.just("parts"), st.integers(0, 6), st.lists(PART, min_size=1, max_size=5)),
    st.tuples(st.just("good"), st.integers(0, 6), st.tuples(BODY, st.integers(0, 600))),
    st.tuples(st.just("ring"), st.integers(0, 6), st.tuples(st.integers(0, 700), st.binary(min_size=1, max_size=20))),
    st.tuples(st.just("buffer"), st.just(0), st.tuples(st.integers(0, 8000), BODY)),
    st.tuples(st.just("kick"), st.integers(0, 9), st.none()),
    st.tuples(st.just("config"), st.integers(0, 70), st.integers(0, 255)),
    st.tuples(st.just("status"), st.sampled_from([0, 1, 3, 11, 15, 128, 255]), st.none()),
    st.tuples(st.just("queue-reset"), st.integers(0, 6), st.none()),
    st.tuples(st.just("save"), st.just(0), st.none()),
    st.tuples(st.just("time"), st.just(0), st.integers(1, 3)),
    st.tuples(st.just("frame"), st.just(0), st.binary(max_size=80)),
)


def act(bench: Bench, backend: AnyBackend, kind: str, at: int, what: Any) -> None:
    """One thing that a driver, or the world, does."""
    driver = bench.drivers.get(at % len(bench.virtio.queues))
    assert driver is not None
    if kind == "parts" and driver.free >= len(what):
        driver.add_raw(what)
    elif kind == "good" and driver.free >= 2:
        bench.memory.write(BUFFERS, what[0])
        parts = [(BUFFERS, len(what[0]), 0)] if what[0] else []
        parts += [(BUFFERS + 8192, what[1], 2)] if what[1] else []
        if parts:
            driver.add_raw(parts)
    elif kind == "ring":
        bench.memory.write(driver.table + what[0], what[1])
    elif kind == "buffer":
        bench.memory.write(BUFFERS + what[0], what[1])
    elif kind == "kick":
        bench.kick(at)
    elif kind == "config":
        bench.virtio.config_write(at, 1, what)
        bench.virtio.config_read(at, 4)
    elif kind == "status":
        bench.virtio.set_status(at)
    elif kind == "queue-reset":
        bench.virtio.reset_queue(at % len(bench.virtio.queues))
    elif kind == "save":
        bench.virtio.save()
    elif kind == "time":
        bench.slot.clock.advance(what * 10**9)
    elif kind == "frame" and hasattr(backend, "received"):
        backend.received(*((0, what.rjust(26)) if hasattr(bench.device, "backend") else (what,)))
    bench.slot.loop.poll()


@pytest.mark.parametrize("name", ["blk", "net", "console", "rng", "balloon", "vsock", "9p", "fs"])
@given(operations=st.lists(OPERATION, max_size=40), packed=st.booleans(), indirect=st.booleans())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_a_hostile_driver_never_hurts(
    name: str, operations: list[Any], packed: bool, indirect: bool, tmp_path: Path
) -> None:
    """Nothing a driver does raises in the VMM, and after a reset the device takes requests again."""
    backend = AnyBackend()
    kinds = dict.fromkeys(("block", "net", "char"), backend)
    form = {"packed": packed, "indirect": indirect}
    bench = Bench(device(name, tmp_path), backends=kinds, memory=MEMORY, size=16, **form)
    try:
        for operation in operations:
            try:
                act(bench, backend, *operation)
            except MemoryError:  # of the driver kit: its own room is used up
                break
        bench.start()
        assert bench.virtio.status == 15
        assert all(ring is not None for ring in bench.virtio.rings)
    finally:
        bench.close()


HEAD = struct.Struct("<III")
FEATURES, PROTOCOL = 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28 | 1 << 9, 1 << 0 | 1 << 3 | 1 << 9 | 1 << 12
GET_INFLIGHT = 31


class AnyServer:
    """A vhost-user back end that serves no ring; *plan* says how it answers, and once that is used up it does well."""

    def __init__(self, path: Path, plan: list[tuple[str, bytes]]) -> None:
        self.plan = plan
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(8)
        self._peer: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:  # shut down: the test is over
                return
            self._peer = peer
            with peer:
                while self._answer(peer):
                    pass

    def _answer(self, peer: socket.socket) -> bool:
        """Take a message; whether to go on."""
        try:
            head, fds, _, _ = socket.recv_fds(peer, HEAD.size, 8)
            for fd in fds:
                os.close(fd)
            if len(head) < HEAD.size:
                return False
            request, flags, size = HEAD.unpack(head)
            body = peer.recv(size, socket.MSG_WAITALL) if size else b""
            good = self._good(request, body, bool(flags & 8))
            return good is None or self._send(peer, request, good)
        except ConnectionError:
            return False

    def _good(self, request: int, body: bytes, acknowledge: bool) -> bytes | None:
        number = {1: FEATURES, 15: PROTOCOL, 17: 4}.get(request, 0 if acknowledge else None)
        if number is not None:
            return struct.pack("<Q", number)
        return body if request in (11, 24, GET_INFLIGHT) else None

    def _send(self, peer: socket.socket, request: int, good: bytes) -> bool:
        how, data = self.plan.pop(0) if self.plan else ("well", b"")
        fds = [os.memfd_create("inflight")] if request == GET_INFLIGHT and how != "bare" else []
        body = {"other": data, "refuse": b"\1".ljust(8, b"\0"), "changed": (data + good)[: len(good)]}.get(how, good)
        message = HEAD.pack(request + (how == "wrong"), 5 + (how == "flags"), len(body)) + body
        socket.send_fds(peer, [message[: len(data)] if how == "cut" else message + data * (how == "more")], fds)
        for fd in fds:
            os.close(fd)
        return how not in ("cut", "end", "more")  # of what was cut short, or too much, the rest is waited for

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        if self._peer is not None:  # which a front end that failed may never close: the test is to say so, not to wait
            with contextlib.suppress(OSError):
                self._peer.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()


HOW = st.sampled_from(["well", "other", "refuse", "changed", "wrong", "flags", "cut", "more", "end", "bare"])


@given(
    plan=st.lists(st.tuples(HOW, st.binary(max_size=20)), max_size=30),
    fine=st.integers(0, 40),
    operations=st.lists(OPERATION, max_size=20),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_neither_driver_nor_back_end_hurts_a_vhost_user_front_end(
    plan: list[tuple[str, bytes]], fine: int, operations: list[Any], tmp_path: Path
) -> None:
    """Whatever the driver does and the back end answers, nothing raises in the VMM; with a good one it works again."""
    server = AnyServer(tmp_path / "s", [("well", b"")] * fine + plan)
    try:
        try:
            device = vhost_user_blk(VhostUserBlkOptions(str(tmp_path / "s"), queues=2))
            bench = Bench(device, memory=MEMORY, size=16, shared=True)
        except ConfigError:  # a back end that is no good from the first moment on
            return
        try:
            for operation in operations:
                try:
                    act(bench, AnyBackend(), *operation)
                except MemoryError:  # of the driver kit: its own room is used up
                    break
            server.plan.clear()

            def works() -> bool:
                bench.slot.clock.advance(10**9)
                bench.start()
                bench.virtio.save()  # which asks the back end where each ring is
                return device.link.channel is not None and bench.virtio.status == 15

            bench.until(works)
        finally:
            bench.close()
    finally:
        server.close()
        gc.collect(1)  # guest memory is a file whose views are in cycles: thousands would be open in a long run
