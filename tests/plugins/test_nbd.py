"""NBD disks: against qemu-nbd and nbdkit, against servers that break off, and against servers that lie."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cardcage.errors import ConfigError, HostError
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage_block.drive import parse_drive_flag
from cardcage_nbd.disk import NbdDisk, NbdOptions, open_nbd, parse_tcp, parse_unix
from cardcage_nbd.wire import BrokenServer, Wire
from cardcage_testing import TestSlot
from hypothesis import given, settings
from hypothesis import strategies as st
from leftovers import Leftovers

MIB = 1 << 20


def disk(**options: Any) -> NbdDisk:
    """A disk of the server at these options, on a slot of a test's."""
    return open_nbd(TestSlot(), NbdOptions(**options))  # type: ignore[arg-type]  # it is one


def read(one: NbdDisk, offset: int, size: int) -> bytes:
    data = bytearray(size)
    view = memoryview(data)
    one.readv(offset, [view[: size // 3], view[size // 3 :]])
    return bytes(data)


def write(one: NbdDisk, offset: int, data: bytes) -> None:
    view = memoryview(data)
    one.writev(offset, [view[: len(data) // 2], view[len(data) // 2 :]])


@contextmanager
def serving(server: str, image: Path, path: Path, *words: str) -> Iterator[None]:
    """A server of *image* at the Unix socket *path*."""
    if shutil.which(server) is None:
        pytest.skip(f"needs {server}")
    if server == "qemu-nbd":
        command = [server, "-f", "raw", "-k", path, "--discard=unmap", "-t", "-e", "4", "-x", "disk", *words, image]
    else:
        command = [server, "-f", "-U", path, "-e", "disk", *words, "file", image]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            while True:
                assert process.poll() is None, command
                try:
                    probe.connect(str(path))
                    break
                except OSError:
                    threading.Event().wait(0.01)
        yield
    finally:
        process.terminate()
        process.wait()
        path.unlink(missing_ok=True)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image of 8 MiB of random bytes."""
    (tmp_path / "image").write_bytes(os.urandom(8 * MIB))
    return tmp_path / "image"


@pytest.mark.parametrize("server", ["qemu-nbd", "nbdkit"])
def test_a_servers_disk_is_read_and_written(server: str, image: Path, tmp_path: Path) -> None:
    """Reads, writes, zeroes, trims and flushes of real servers do what they say, from several threads at once."""
    before = image.read_bytes()
    with serving(server, image, tmp_path / "s"):
        one = disk(path=str(tmp_path / "s"), export="disk")
        try:
            assert (one.info.size, one.info.readonly, one.info.write_zeroes) == (8 * MIB, False, True)
            assert read(one, 512, 3 * MIB) == before[512 : 3 * MIB + 512]
            wrong: list[int] = []

            def work(at: int) -> None:
                for turn in range(8):
                    data = bytes([at, turn]) * 2048
                    write(one, at * MIB + turn * 4096, data)
                    wrong.extend([at] * (read(one, at * MIB + turn * 4096, 4096) != data))

            threads = [threading.Thread(target=work, args=(at,)) for at in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert wrong == []
            one.write_zeroes(5 * MIB, MIB, unmap=True)
            one.write_zeroes(6 * MIB, 4096, unmap=False)
            assert read(one, 5 * MIB, MIB + 4096) == bytes(MIB + 4096)
            one.discard(7 * MIB, 65536)
            one.flush()
        finally:
            one.close()
    after = image.read_bytes()
    assert after[:4] == b"\0\0\0\0"
    assert after[3 * MIB : 3 * MIB + 2] == b"\x03\x00"
    assert after[5 * MIB : 6 * MIB] == bytes(MIB)


def test_a_read_only_export_is_one(image: Path, tmp_path: Path) -> None:
    """What the server or the options say is read-only cannot be written; an unknown export is one clear error."""
    with serving("qemu-nbd", image, tmp_path / "s", "-r"):
        one = disk(path=str(tmp_path / "s"), export="disk")
        assert one.info.readonly
        with pytest.raises(OSError, match="read-only"):
            write(one, 0, bytes(512))
        one.close()
        with pytest.raises(HostError, match=r"nbd\+unix:///none\?socket=.*: "):
            disk(path=str(tmp_path / "s"), export="none")


def test_requests_wait_for_a_server_that_comes_back(image: Path, tmp_path: Path) -> None:
    """A server that comes back does what was under way; while it stays away requests fail, and later ones are done."""
    path = tmp_path / "s"
    with serving("qemu-nbd", image, path):
        one = disk(path=str(path), export="disk", reconnect=60)
        two = disk(path=str(path), export="disk", reconnect=0)
        assert read(one, 0, 512) == read(two, 0, 512)
    try:
        with pytest.raises(OSError, match="Input/output error"):
            read(two, 0, 512)
        found: list[bytes] = []
        waiting = threading.Thread(target=lambda: found.append(read(one, 0, 4096)))
        waiting.start()
        with serving("qemu-nbd", image, path):
            waiting.join()
            assert found == [image.read_bytes()[:4096]]
            assert read(two, 0, 512) == found[0][:512]
    finally:
        one.close()
        two.close()


def test_a_flush_fails_once_when_a_server_went_with_what_was_written(image: Path, tmp_path: Path) -> None:
    """Writes that were answered and not flushed may be gone with the server: one flush fails; flushed ones are not."""
    path = tmp_path / "s"
    with serving("qemu-nbd", image, path):
        one = disk(path=str(path), export="disk", reconnect=60)
        write(one, 0, bytes(4096))
    try:
        with serving("qemu-nbd", image, path):
            with pytest.raises(OSError, match=r"Input/output|went before it had flushed"):
                one.flush()
            one.flush()
            write(one, 0, b"x" * 4096)
            one.flush()
        with serving("qemu-nbd", image, path):
            assert read(one, 0, 4096) == b"x" * 4096
            one.flush()
    finally:
        one.close()


def test_a_server_that_only_greets_does_not_keep_requests() -> None:
    """One that takes each connection and breaks it is not tried in a loop: a request fails after ``reconnect``."""
    servers: list[Server] = []

    def dial() -> socket.socket:
        servers.append(Server(HELLO + EXPORT, [b"no reply"]))
        return servers[-1].dial()

    options = NbdOptions(path="x", reconnect=0.3)  # type: ignore[arg-type]  # seconds
    one = NbdDisk(dial, options, "greets", TestSlot().log)
    try:
        with pytest.raises(OSError, match="Input/output error"):
            read(one, 0, 512)
        assert len(servers) <= 6
    finally:
        one.close()
        for server in servers:
            server.close()


def test_each_address_of_a_name_is_tried(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host's first address may be one where no server listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        stream = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        found = [(*stream, ("127.0.0.2", port)), (*stream, ("127.0.0.1", port))]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)

        def greet() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.sendall(HELLO + EXPORT)
                while peer.recv(4096):
                    pass

        thread = threading.Thread(target=greet)
        thread.start()
        one = disk(host="server", port=port, reconnect=0)
        assert one.info.size == MIB
        one.close()
        thread.join()


class Server:
    """A server that greets with *hello*, and answers each request with the next of *replies*; then it hangs up."""

    def __init__(self, hello: bytes, replies: list[bytes]) -> None:
        self.hello, self.replies = hello, replies
        self.threads: list[threading.Thread] = []

    def dial(self) -> socket.socket:
        if self.threads:
            raise ConnectionRefusedError(111, "Connection refused")
        mine, theirs = socket.socketpair()
        self.threads.append(threading.Thread(target=self.talk, args=(mine,)))
        self.threads[-1].start()
        return theirs

    def talk(self, mine: socket.socket) -> None:
        with mine:
            try:
                mine.sendall(self.hello)
                if self.replies:
                    mine.recv(44, socket.MSG_WAITALL)  # the options
                for one in self.replies:
                    mine.recv(28, socket.MSG_WAITALL)
                    mine.sendall(one)
                mine.shutdown(socket.SHUT_WR)
                while mine.recv(4096):
                    pass
            except OSError:  # it has heard enough
                return

    def close(self) -> None:
        for one in self.threads:
            one.join()


def answer(option: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data)) + data


HELLO = b"NBDMAGICIHAVEOPT\x00\x03"
EXPORT = answer(8, 1) + answer(7, 3, struct.pack(">HQH", 0, MIB, 0b1101101)) + answer(7, 1)
DATA = struct.pack(">IHHQIQ", 0x668E33EF, 1, 1, 1, 520, 0) + bytes(range(256)) * 2


def lying(hello: bytes, *replies: bytes) -> tuple[NbdDisk, Server]:
    server = Server(hello, list(replies))
    options = NbdOptions(path="x", reconnect=0, timeout=20)  # type: ignore[arg-type]  # seconds
    try:
        return NbdDisk(server.dial, options, "lies", TestSlot().log), server
    except BaseException:
        server.close()
        raise


def test_structured_and_simple_replies_are_read() -> None:
    """Data in parts, holes, errors with text, and simple replies make up what was asked for."""
    hole = struct.pack(">IHHQIQI", 0x668E33EF, 0, 2, 1, 12, 0, 256)
    part = struct.pack(">IHHQIQ", 0x668E33EF, 0, 1, 1, 264, 256) + b"x" * 256
    end = struct.pack(">IHHQI", 0x668E33EF, 1, 0, 1, 0)
    wrong = struct.pack(">IHHQIIH", 0x668E33EF, 1, 0x8001, 2, 9, 28, 3) + b"why"
    simple = struct.pack(">IIQ", 0x67446698, 0, 3) + b"y" * 512
    odd = struct.pack(">IIQ", 0x67446698, 9999, 4)
    one, server = lying(HELLO + EXPORT, hole + part + end, wrong, simple, odd)
    try:
        found = []
        for _ in range(4):
            try:
                found.append(read(one, 0, 512))
            except OSError as error:
                found.append(str(error.errno).encode())
        assert found == [bytes(256) + b"x" * 256, b"28", b"y" * 512, b"5"]
    finally:
        one.close()
        server.close()


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"SSH-2.0-OpenSSH_9.2p1\r\n", "no NBD server"),
        (b"NBDMAGIC" + (0x00420281861253).to_bytes(8, "big") + bytes(200), "old style"),
        (b"NBDMAGICIHAVEOPT\x00\x00", "without fixed newstyle"),
        (b"NBDMAGIC", "hung up"),
        (HELLO + answer(8, 1) + answer(7, 1), "without a size"),
        (HELLO + answer(8, 1) + struct.pack(">QIII", 0x3E889045565A9, 7, 3, 1 << 30), "an answer to no option"),
        (HELLO + answer(8, 1) + answer(7, 3) * 100, "no end of answers"),
        (HELLO + answer(8, 1) + answer(7, (1 << 31) | 5), "TLS"),
        (HELLO + answer(8, 1) + answer(7, (1 << 31) | 6, b"no\x1b[1m"), r"no\?\[1m"),
        (HELLO + answer(8, 1) + answer(7, 3, struct.pack(">HQH", 0, (1 << 64) - 1, 1)) + answer(7, 1), "an export of"),
        (HELLO + answer(8, 1) + answer(7, 3, struct.pack(">HIII", 3, 3, 3, 3)) + answer(7, 1), "without a size|block"),
    ],
)
def test_what_is_no_server_is_refused(said: bytes, why: str) -> None:
    """Another service, an old server, or one that breaks the protocol is one error in words; nothing is left."""
    left = Leftovers()
    with pytest.raises(HostError, match=why):
        lying(said)
    assert left.threads() == []


@given(noise=st.binary(max_size=80) | st.binary(max_size=30).map(lambda tail: b"\x66\x8e\x33\xef" + tail))
@settings(max_examples=60)
def test_whatever_a_server_says_a_request_ends(noise: bytes) -> None:
    """A server's lies end its connection: a request fails or is answered, and nothing outside it is written."""
    one, server = lying(HELLO + EXPORT, noise + DATA)
    guard = bytearray(b"g" * 1024)
    try:
        one.readv(0, [memoryview(guard)[256:768]])
    except OSError:
        pass
    finally:
        one.close()
        server.close()
    assert (guard[:256], guard[768:]) == (b"g" * 256, b"g" * 256)


def test_an_old_negotiation_is_understood() -> None:
    """A server that knows neither structured replies nor GO is asked by the name of the export."""
    unknown = (1 << 31) | 1
    mine, theirs = socket.socketpair()
    with mine, theirs:
        mine.sendall(HELLO + answer(8, unknown) + answer(7, unknown) + struct.pack(">QH", MIB, 1))
        export = Wire(theirs).negotiate("x")
        assert (export.size, export.flags) == (MIB, 1)
        mine.sendall(struct.pack(">IHHQI", 0x668E33EF, 1, 0, 1, 0))
        with pytest.raises(BrokenServer, match="no reply"):
            Wire(theirs).reply()


def test_uris_are_read() -> None:
    """Both forms of the URI name a server and an export; what is neither is an error."""
    assert parse_tcp("//h") == {"host": "h", "export": ""}
    assert parse_tcp("//[::1]:99/a%20b") == {"host": "::1", "port": 99, "export": "a b"}
    assert parse_unix("///e?socket=/run/s") == {"path": "/run/s", "export": "e"}
    for text in ("", "h", "//", "//h?x=1", "//u@h", "//h:x"):
        with pytest.raises(ValueError, match=r"nbd|[Pp]ort"):
            parse_tcp(text)
    for text in ("//h/e?socket=/s", "///e", "///e?socket=", "///e?socket=/s&x=1"):
        with pytest.raises(ValueError, match="expected nbd"):
            parse_unix(text)
    with pytest.raises(ConfigError, match="expected a host, or the path"):
        disk()
    with pytest.raises(HostError, match=r"nbd://127\.0\.0\.1:1/: Connection refused"):
        disk(host="127.0.0.1", port=1)


def test_a_machine_has_such_a_disk(image: Path, tmp_path: Path) -> None:
    """A drive may be a URI, with the default policy's leave."""
    with serving("qemu-nbd", image, tmp_path / "s"):
        drive = f"nbd+unix:///disk?socket={tmp_path / 's'}"
        with Host() as host:
            assert parse_drive_flag(drive, host) == {
                "device": [
                    {
                        "type": "virtio-blk",
                        "drive": {"type": "nbd+unix", "path": str(tmp_path / "s"), "export": "disk"},
                    }
                ]
            }
        devices = [{"type": "virtio-blk", "drive": drive}]
        with Machine(accel="tcg", memory="4M", devices=devices, fragments=[{"security": "default"}]) as vm:
            assert vm.devices["virtio-blk"].device.virtio.device.info.size == 8 * MIB
