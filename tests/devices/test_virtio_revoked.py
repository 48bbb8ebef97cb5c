"""Shares, sockets and outside back ends in a whole machine whose policy changes while it runs."""

from __future__ import annotations

import errno
import shutil
import socket
import struct
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cardcage import Machine
from cardcage.config import Draft
from cardcage.host import Host
from cardcage_selinux.card import DEFAULT
from cardcage_virtio.share import fuse
from cardcage_virtio.vsock.stream import Header
from virtio_function import WINDOW, Function

DAEMON = shutil.which("qemu-storage-daemon")
RULES = (
    "(allow share_t svirt_share_t (image (open read write create)))",
    "(allow vsock_t svirt_socket_t (socket (connect listen)))",
    "(allow vhost_t svirt_t (memory (share)))",
)
"""What the devices here live by."""


@pytest.fixture
def server(tmp_path: Path) -> Any:
    """A vhost-user back end's socket, where there is a back end."""
    if DAEMON is None:
        pytest.skip("needs qemu-storage-daemon (Debian: qemu-system-common)")
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    where, pid = tmp_path / "s", tmp_path / "pid"
    export = f"type=vhost-user-blk,id=e,addr.type=unix,addr.path={where},node-name=f,writable=on"
    command = [DAEMON, "--blockdev", f"driver=file,node-name=f,filename={tmp_path / 'disk'},locking=off"]
    process = subprocess.Popen([*command, "--export", export, "--pidfile", str(pid)])
    while not pid.exists():
        assert process.poll() is None
    yield where
    process.kill()
    process.wait()


def header_of(data: bytes) -> Header:
    """A packet to the guest."""
    header = Header.unpack([memoryview(data)])
    assert header is not None
    return header


class Devices:
    """Each device's driver; the methods use one and give 0, or what the guest or host program sees as the error."""

    def __init__(self, vm: Machine, uds: Path) -> None:
        self.vm, self.uds, self.fid = vm, uds, 0
        self.functions = {name: Function(vm, number) for name, number in IDS.items()}
        self.drivers = {
            name: one.start(QUEUES[name], WINDOW + at * (4 << 20))
            for at, (name, one) in enumerate(self.functions.items())
        }

    def call(self, name: str, readable: list[bytes], writable: list[int], queue: int = 0) -> bytes:
        return self.functions[name].call(self.drivers[name][queue], queue, readable, writable)

    def nine(self) -> int:
        self.fid += 1
        body = struct.pack("<II", self.fid, 0xFFFFFFFF) + b"\4\0root\0\0" + bytes(4)
        answer = self.call("9p", [struct.pack("<IBH", 7 + len(body), 104, 1) + body], [64])
        return int(struct.unpack_from("<I", answer, 7)[0]) if answer[4] == 7 else 0

    def share(self) -> int:
        head = fuse.IN_HEADER.pack(56, fuse.Op.GETATTR, 5, 1, 0, 0, 1, 0)
        return -int(fuse.OUT_HEADER.unpack_from(self.call("fs", [head + bytes(16)], [16, 104], 1))[1])

    def disk(self) -> int:
        return self.call("blk", [struct.pack("<IIQ", 0, 0, 0)], [512, 1])[-1]

    def stream(self) -> int:
        """A host program calls: the guest is asked to accept, or the program sees the end."""
        driver = self.drivers["vsock"][0]
        for _ in range(3):  # some for what earlier streams still say
            driver.add([], [44])
        self.functions["vsock"].write(0x3000, 2, 0)
        with socket.socket(socket.AF_UNIX) as program:
            program.connect(str(self.uds))
            try:
                program.sendall(b"CONNECT 9\n")
                program.setblocking(False)
                while not any(header_of(data).op == 1 for _, data in driver.used()):
                    with suppress(BlockingIOError):
                        return errno.ECONNRESET if not program.recv(1) else 0
            except (BrokenPipeError, ConnectionResetError):
                return errno.ECONNRESET
            return 0

    def all(self) -> list[int]:
        return [self.nine(), self.share(), self.disk(), self.stream()]


IDS = {"9p": 0x1049, "fs": 0x105A, "blk": 0x1042, "vsock": 0x1053}
QUEUES = {"9p": 1, "fs": 2, "blk": 1, "vsock": 3}


def test_policy_changes_take_devices_away_and_give_them_back(tmp_path: Path, server: Path) -> None:
    """By a boolean and by a reload: each device's requests become errors, none hangs, the machine runs on."""
    site, uds, share = tmp_path / "site.cil", tmp_path / "v", tmp_path / "share"
    share.mkdir()
    text = DEFAULT.read_text()
    for rule in RULES:
        assert rule in text
        text = text.replace(rule, "")
    switched = f"{text}\n(boolean on true)\n(booleanif on (true {' '.join(RULES)}))\n"
    site.write_text(switched)
    spec = {"type": "selinux", "policy": [str(site)], "audit": str(tmp_path / "log"), "state": str(tmp_path / "state")}
    devices: list[dict[str, Any]] = [
        {"type": "virtio-9p", "path": str(share)},
        {"type": "virtio-fs", "path": str(share)},
        {"type": "vhost-user-blk", "socket": str(server)},
        {"type": "virtio-vsock", "cid": 3, "uds": str(uds)},
    ]
    wanted = {"memory": "32M", "accel": "tcg"}
    with Host(security=Draft.of({"security": [spec]}).config().security) as host:
        card: Any = host.mediator.checkers[0]
        with Machine(host=host, machine=wanted, fragments=[{"memory": {"type": "memfd"}}], devices=devices) as vm:
            used = Devices(vm, uds)
            changes: list[tuple[Any, Any]] = [
                (lambda: card.set_booleans(on=False), lambda: card.set_booleans(on=True)),
                (lambda: (site.write_text(text), card.reload()), lambda: (site.write_text(switched), card.reload())),
            ]
            for revoke, restore in changes:
                assert used.all() == [0, 0, 0, 0]
                revoke()
                assert used.all() == [errno.EACCES, errno.EACCES, 1, errno.ECONNRESET]
                restore()
            assert used.all() == [0, 0, 0, 0]
            assert vm.state == "built"
    assert (tmp_path / "log").read_text().count("denied") >= 3
