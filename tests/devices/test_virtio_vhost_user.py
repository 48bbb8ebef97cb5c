"""vhost-user front ends against qemu-storage-daemon, virtiofsd, and back ends that misbehave."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import struct
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cardcage.errors import ConfigError
from cardcage_virtio.testing import Bench
from cardcage_virtio.vhost.kinds import (
    VhostUserBlkOptions,
    VhostUserFsOptions,
    VhostUserOptions,
    vhost_user_blk,
    vhost_user_device,
    vhost_user_fs,
)
from listens import listens

DAEMON = shutil.which("qemu-storage-daemon")
VIRTIOFSD = next((path for path in ("/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd") if os.path.exists(path)), None)
MIB = 1 << 20


class Daemon:
    """A qemu-storage-daemon that exports one raw file."""

    def __init__(self, folder: Path, *, throttled: bool = False) -> None:
        self.folder, self.socket, self.disk = folder, folder / "s", folder / "disk"
        self.throttled = throttled
        if not self.disk.exists():
            self.disk.write_bytes(b"".join(struct.pack("<Q", at) * 64 for at in range(8 * MIB // 512)))
        self.start()

    def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        node, blocks = "f", ["--blockdev", f"driver=file,node-name=f,filename={self.disk},locking=off"]
        if self.throttled:
            blocks = ["--object", "throttle-group,id=t,x-iops-total=400", *blocks]
            blocks += ["--blockdev", "driver=throttle,node-name=d,throttle-group=t,file=f"]
            node = "d"
        export = f"type=vhost-user-blk,id=e,addr.type=unix,addr.path={self.socket},node-name={node},writable=on"
        pipe = self.folder / "pid"
        pipe.unlink(missing_ok=True)
        command = [DAEMON or "", *blocks, "--export", export + ",num-queues=2", "--pidfile", str(pipe)]
        self.process = subprocess.Popen(command)
        while not pipe.exists():
            assert self.process.poll() is None
            try:
                self.process.wait(0.02)
            except subprocess.TimeoutExpired:
                continue

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def daemon(tmp_path: Path) -> Any:
    if DAEMON is None:
        pytest.skip("needs qemu-storage-daemon (Debian: qemu-system-common)")
    daemon = Daemon(tmp_path)
    yield daemon
    daemon.kill()


def blk(daemon: Daemon, **options: Any) -> Bench:
    return Bench(vhost_user_blk(VhostUserBlkOptions(str(daemon.socket), **options)), shared=True)


def read(sector: int) -> bytes:
    return struct.pack("<IIQ", 0, 0, sector)


def test_a_disk_served_by_qemu_storage_daemon(daemon: Daemon) -> None:
    """Reads, writes and flushes reach the file; capacity and queues are in the configuration."""
    bench = blk(daemon, queues=2)
    assert struct.unpack_from("<Q", bench.device.config()) == (8 * MIB // 512,)
    assert struct.unpack_from("<H", bench.device.config(), 34) == (2,)
    for queue in (0, 1):
        data = bench.call([read(5 + queue)], [512, 1], queue=queue)
        assert data == struct.pack("<Q", 5 + queue) * 64 + b"\0"
    assert bench.call([struct.pack("<IIQ", 1, 0, 9), b"w" * 512], [1]) == b"\0"
    assert bench.call([struct.pack("<IIQ", 4, 0, 0)], [1]) == b"\0"
    assert daemon.disk.read_bytes()[9 * 512 : 10 * 512] == b"w" * 512
    assert bench.interrupts
    bench.close()


def test_a_device_reset_and_a_second_start(daemon: Daemon) -> None:
    """After a reset the same back end serves new rings."""
    bench = blk(daemon)
    for _ in range(3):
        assert bench.call([read(1)], [512, 1])[-1] == 0
        bench.start()
    bench.close()


def test_an_answer_already_read_is_no_hang_up(daemon: Daemon) -> None:
    """The loop's late word that the socket was readable does not cost a living back end its connection."""
    bench = blk(daemon)
    channel = bench.device.link.channel
    bench.device.link._spoke()
    assert bench.device.link.channel is channel
    assert bench.call([read(1)], [512, 1])[-1] == 0
    bench.close()


def test_saving_a_running_device_and_going_on(daemon: Daemon) -> None:
    """A save stops the rings for a moment; they go on, and also from the saved state."""
    bench = blk(daemon)
    for at in range(5):
        assert bench.call([read(at)], [512, 1])[:8] == struct.pack("<Q", at)
    state = bench.virtio.save()
    assert state.device.bases == {0: 5}
    for at in range(5):
        assert bench.call([read(at)], [512, 1])[:8] == struct.pack("<Q", at)
    bench.virtio.pause()
    bench.driver().add([read(7)], [512, 1])
    bench.kick()
    state = bench.virtio.save()
    assert bench.driver().used() == []
    bench.virtio.resume()
    assert [data[:8] for data in bench.wait(0).values()] == [struct.pack("<Q", 7)]
    state = bench.virtio.save()
    bench.virtio.load(state)
    for at in range(5):
        assert bench.call([read(at)], [512, 1])[:8] == struct.pack("<Q", at)
    bench.close()


def test_no_request_is_lost_when_the_back_end_is_killed(tmp_path: Path) -> None:
    """Kill and restart under load: each request comes back, with the right bytes, and each write is in the file."""
    if DAEMON is None:
        pytest.skip("needs qemu-storage-daemon (Debian: qemu-system-common)")
    daemon = Daemon(tmp_path, throttled=True)
    bench = Bench(vhost_user_blk(VhostUserBlkOptions(str(daemon.socket))), shared=True, size=128)
    driver = bench.driver()
    wanted: dict[int, bytes] = {}
    written: dict[int, bytes] = {}
    done = at = 0

    def fill() -> None:
        nonlocal at
        while driver.free > 3 and at < 900:
            if at % 2:
                data = struct.pack("<Q", at | 1 << 40) * 64
                wanted[driver.add([struct.pack("<IIQ", 1, 0, 8000 + at), data], [1])] = b"\0"
                written[8000 + at] = data
            else:
                wanted[driver.add([read(at)], [512, 1])] = struct.pack("<Q", at) * 64 + b"\0"
            at += 1
        bench.kick()

    def some_done(more: int) -> bool:
        nonlocal done
        for token, data in driver.used():
            assert data == wanted.pop(token)
            done += 1
        return done >= more

    try:
        for _ in range(3):
            fill()
            target = done + 40
            bench.until(lambda target=target: some_done(target))  # type: ignore[misc]  # binds this turn's
            daemon.kill()
            fill()
            bench.until(lambda: bench.device.link.channel is None)
            daemon.start()
            bench.slot.clock.advance(200_000_000)
            bench.until(lambda: bench.device.link.channel is not None)
        while at < 900 or wanted:
            fill()
            target = done + min(20, len(wanted))
            bench.until(lambda target=target: some_done(target))  # type: ignore[misc]  # binds this turn's
        bench.call([struct.pack("<IIQ", 4, 0, 0)], [1])
        disk = daemon.disk.read_bytes()
        assert all(disk[512 * sector : 512 * sector + 512] == data for sector, data in written.items())
    finally:
        bench.close()
        daemon.kill()


def test_virtiofsd_answers(tmp_path: Path) -> None:
    """The fs front end carries a request to virtiofsd and its answer back, and answers EACCES once that is revoked."""
    if VIRTIOFSD is None or os.geteuid() != 0:
        pytest.skip("needs virtiofsd (Debian: qemu-system-common) and root")
    path = tmp_path / "s"
    command = [VIRTIOFSD, f"--socket-path={path}", "-o", f"source={tmp_path}", "-o", "sandbox=chroot", "-f"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while not listens(path):
            if process.poll() is not None:
                pytest.skip("virtiofsd may not run here")
            try:
                process.wait(0.02)
            except subprocess.TimeoutExpired:
                continue
        bench = Bench(vhost_user_fs(VhostUserFsOptions(str(path), tag="host")), shared=True)
        assert bench.device.config() == b"host".ljust(36, b"\0") + struct.pack("<I", 1)
        init = struct.pack("<IIII", 7, 31, 65536, 0)
        head = struct.pack("<IIQQIIII", 40 + len(init), 26, 1, 0, 0, 0, 0, 0)
        answer = bench.call([head, init], [16, 64], queue=1)
        length, error, unique = struct.unpack_from("<IiQ", answer)
        assert (error, unique) == (0, 1)
        assert length == len(answer) == 80
        assert struct.unpack_from("<I", answer, 16) == (7,)
        bench.slot.host.change("socket", "connect", allowed=False)
        forget = struct.pack("<IIQQIIII", 48, 2, 2, 1, 0, 0, 0, 0) + bytes(8)
        assert bench.call([forget], queue=1) == b""
        answer = bench.call([head, init], [16, 64], queue=1)
        assert struct.unpack("<IiQ", answer) == (16, -errno.EACCES, 1)
        bench.close()
    finally:
        process.kill()
        process.wait()


def test_a_missing_back_end_or_private_memory_is_named(tmp_path: Path) -> None:
    """Configuration errors say which socket, or what to set."""
    with pytest.raises(ConfigError, match="nobody"):
        Bench(vhost_user_blk(VhostUserBlkOptions(str(tmp_path / "nobody"))), shared=True)
    with pytest.raises(ConfigError, match=r"memory\.type"):
        Bench(vhost_user_blk(VhostUserBlkOptions(str(tmp_path / "nobody"))))


@pytest.mark.parametrize(
    "answer", [b"", b"\0" * 12, b"\xff" * 20, struct.pack("<IIIQ", 1, 5, 4, 0), b"\1\0\0\0\5\0\0\0\xff\xff"]
)
def test_a_back_end_that_talks_nonsense_is_an_error(tmp_path: Path, answer: bytes) -> None:
    """Wrong, short or no answers end in one clear error."""
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(100)
                peer.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(ConfigError):
            Bench(vhost_user_device(VhostUserOptions(path, device_id=42)), shared=True)
        thread.join()


def test_calls_become_interrupts_on_a_thread() -> None:
    """Each write to an eventfd delivers its number; the thread ends with the last eventfd."""
    from cardcage_virtio.vhost.calls import CallThread

    got: list[int] = []
    told = threading.Semaphore(0)

    def deliver(number: int) -> None:
        got.append(number)
        told.release()

    calls = CallThread(deliver, "calls")
    fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
    for _ in range(2):
        for at, fd in enumerate(fds):
            calls.add(fd, at + 5)
        for fd in (fds[1], fds[0], fds[1]):
            os.eventfd_write(fd, 1)
            assert told.acquire(timeout=10)
        for fd in fds:
            calls.remove(fd)
            calls.remove(fd)
        assert calls._thread is None
    assert got == [6, 5, 6] * 2
    for fd in fds:
        os.close(fd)


def test_an_accelerator_that_asks_is_told_of_the_rings(daemon: Daemon) -> None:
    """Where the VM has foreign-rings it hears of each ring before the back end does, and when it is over."""
    rings: dict[int, tuple[int, ...]] = {}
    bench = Bench(
        vhost_user_blk(VhostUserBlkOptions(str(daemon.socket), queues=2, queue_size=64)), shared=True, start=False
    )

    def add(*ring: int) -> int:
        rings[len(rings) + 5] = ring
        return len(rings) + 4

    bench.slot.interrupts.vm = SimpleNamespace(
        capabilities=frozenset({"foreign-rings"}), add_foreign_ring=add, remove_foreign_ring=rings.pop
    )
    bench.start()
    drivers = [bench.driver(at) for at in (0, 1)]
    assert rings == {5 + at: (64, one.table, one.driver, one.device) for at, one in enumerate(drivers)}
    assert bench.call([read(5)], [512, 1])[:8] == struct.pack("<Q", 5)
    bench.virtio.reset()
    assert not rings
    bench.close()


@pytest.mark.parametrize("logs", [True, False])
def test_a_dirty_log_hears_what_the_back_end_writes(daemon: Daemon, logs: bool, monkeypatch: Any) -> None:
    """While the log is on, a read's buffer and the used ring are named, by the page; a back end that cannot say so has
    written all memory; requests go on when the log comes and goes, and so does the back end."""
    if not logs:
        monkeypatch.setattr("cardcage_virtio.vhost.channel.WANTED", 1 << 0 | 1 << 3 | 1 << 9 | 1 << 12)
    writers: list[Any] = []
    vm = SimpleNamespace(
        capabilities={"dirty-log"},
        add_writer=lambda one: writers.append(one),
        remove_writer=lambda one: writers.clear(),
    )
    bench = Bench(vhost_user_blk(VhostUserBlkOptions(str(daemon.socket))), shared=True, vm=vm)
    assert writers == [bench.device]
    assert bench.call([read(5)], [512, 1])[:8] == struct.pack("<Q", 5)
    assert bench.device.collect_writes() == []
    bench.device.log_writes(True)
    everything = {address + at for address, size in [(0, bench.memory.slots[0].size)] for at in range(0, size, 4096)}
    for turn in range(3):
        driver = bench.driver()
        driver.add([read(6)], [4096, 1])
        (areas,) = [held[2] for held in driver._held.values()]
        bench.kick()
        bench.wait(0)
        if turn == 1:
            daemon.kill()
            bench.slot.loop.poll(10)
        pages = {address + at for address, size in bench.device.collect_writes() for at in range(0, size, 4096)}
        touched = {at & ~4095 for at in (areas[0][0], areas[1][0], driver.device)}
        assert touched <= pages
        assert (pages == everything) != logs
        if turn == 1:
            daemon.start()
            bench.slot.clock.advance(200_000_000)
    bench.device.log_writes(False)
    assert bench.call([read(5)], [512, 1])[:8] == struct.pack("<Q", 5)
    assert bench.device.collect_writes() == []
    bench.close()
    assert not writers


@pytest.mark.parametrize("act", [("socket", "connect"), ("memory", "share")])
def test_a_revoked_disk_fails_requests_and_comes_back(daemon: Daemon, act: tuple[str, str]) -> None:
    """Barred, the back end is hung up on and requests are I/O errors; allowed again, they reach it once more."""
    bench = blk(daemon, queues=2)
    for at in range(3):
        assert bench.call([read(at)], [512, 1])[-1] == 0
    bench.slot.host.change(*act, allowed=False)
    assert bench.device.link.channel is None
    for queue in (0, 1, 0):
        assert bench.call([read(1)], [512, 1], queue=queue)[-1] == 1
    assert bench.call([struct.pack("<IIQ", 1, 0, 9), b"w" * 512], [1]) == b"\1"
    state = bench.virtio.save()
    assert state.device.bases == {0: 6, 1: 1}
    bench.slot.clock.advance(10**9)
    assert bench.device.link.channel is None
    bench.slot.host.change(*act, allowed=True)
    for queue in (0, 1, 0):
        data = bench.call([read(5 + queue)], [512, 1], queue=queue)
        assert data == struct.pack("<Q", 5 + queue) * 64 + b"\0"
    assert daemon.disk.read_bytes()[9 * 512 : 10 * 512] == struct.pack("<Q", 9) * 64
    bench.close()


def test_a_reset_while_a_disk_is_revoked(daemon: Daemon) -> None:
    """A driver that starts the device meanwhile gets errors too, and the disk once it may be used again."""
    bench = blk(daemon)
    bench.slot.host.change("socket", "connect", allowed=False)
    for _ in range(2):
        bench.start()
        assert bench.call([read(1)], [512, 1])[-1] == 1
    daemon.kill()
    bench.slot.host.change("socket", "connect", allowed=True)
    for sector in (3, 4):
        bench.driver().add([read(sector)], [512, 1])
        bench.kick()
        bench.slot.loop.poll()
        assert bench.driver().used() == []  # allowed, with no back end: it waits, as when one dies
    bench.slot.host.change("socket", "connect", allowed=False)
    assert [data[-1] for data in bench.wait(0, 2).values()] == [1, 1]
    daemon.start()
    bench.slot.host.change("socket", "connect", allowed=True)
    assert bench.call([read(5)], [512, 1]) == struct.pack("<Q", 5) * 64 + b"\0"
    bench.close()
