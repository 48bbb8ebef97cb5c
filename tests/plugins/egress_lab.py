"""A world in a network namespace, which hears all that a host in another one lets out: what the egress tests need."""

from __future__ import annotations

import ctypes
import select
import socket
import struct
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from net_lab import Namespace

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["ALLOWED", "FORBIDDEN", "HOST", "SECRET", "World", "hello", "record"]

HOST, RESOLVER, ALLOWED, FORBIDDEN, PRIVATE, METADATA = (
    "20.0.0.1",
    "20.0.0.53",
    "20.0.1.1",
    "20.0.1.2",
    "10.9.9.9",
    "169.254.169.254",
)
SECRET = b"s3cr3t"
"""What no attempt gets out."""
NAMES = {
    "good.test": [ALLOWED],
    "raw.test": [ALLOWED],
    "evil.test": [FORBIDDEN],
    "private.test": [PRIVATE],
    "loop.test": ["127.0.0.1"],
    "meta.test": [METADATA],
    "host.test": [HOST],
    "inside.test": ["198.18.0.1"],
    "both.test": [PRIVATE, ALLOWED],
}
T = TypeVar("T")
CLONE_NEWNS, MS_BIND, MS_REC, MS_PRIVATE = 0x20000, 0x1000, 0x4000, 0x40000
PORTS = (80, 443, 22, 8080, 9000)


class World:
    """A host's network namespace, whose every way out leads to a world that answers at all addresses.

    Attributes:
        host: the namespace. packets: IPv4 and other packets that came out of it, without their Ethernet header.
        calls: (address, port, first bytes) of TCP connections. questions: names that the host's resolver asked for.
        answers: addresses by name, which a test may change.
    """

    def __init__(self, folder: Path) -> None:
        self.packets: list[bytes] = []
        self.calls: list[tuple[str, int, bytes]] = []
        self.questions: list[bytes] = []
        self.answers = {name: list(found) for name, found in NAMES.items()}
        self.turning: dict[str, list[list[str]]] = {}
        self._changed = threading.Condition()
        self.host, self.world = Namespace(), Namespace()
        self.host.shell(
            f"ip link add out0 type veth peer name in0 netns {self.world.pid}",
            "sysctl -qw net.ipv6.conf.out0.disable_ipv6=1",
            f"ip addr add {HOST}/24 dev out0",
            "ip link set out0 up",
        )
        self.world.shell(
            "sysctl -qw net.ipv6.conf.in0.disable_ipv6=1",
            f"ip addr add {RESOLVER}/24 dev in0",
            "ip link set in0 up",
            f"ip route add {HOST} dev in0 table local",  # beside it, each address is the world's own
            "ip route add local 0.0.0.0/1 dev lo table local",
            "ip route add local 128.0.0.0/1 dev lo table local",
        )
        self.host.shell(f"ip route add default via {RESOLVER}")
        (folder / "resolv.conf").write_text(f"nameserver {RESOLVER}\noptions timeout:1 attempts:1\nsearch evil.test\n")
        (folder / "hosts").write_text("127.0.0.1 localhost\n")
        self._folder = folder
        self._stop, self._stopped = socket.socketpair()
        self._wire = self.world.run(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3)))
        self._wire.bind(("in0", 3))
        self._dns = self.world.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self._dns.setsockopt(socket.IPPROTO_IP, 20, 1)  # IP_FREEBIND
        self._dns.bind(("0.0.0.0", 53))
        self._listeners = [self.world.run(lambda port=port: socket.create_server(("0.0.0.0", port))) for port in PORTS]
        self._listeners += [self.host.run(lambda port=port: socket.create_server(("0.0.0.0", port))) for port in PORTS]
        self._thread = threading.Thread(target=self._serve, name="world")
        self._thread.start()

    def run(self, act: Callable[[], T]) -> T:
        """Call *act* on a thread in the host, with the world's resolver: what it starts is there too."""

        def inside() -> T:
            libc = ctypes.CDLL(None, use_errno=True)
            failed = libc.unshare(CLONE_NEWNS) or libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)
            for name in ("resolv.conf", "hosts"):
                source = str(self._folder / name).encode()
                failed = failed or libc.mount(source, f"/etc/{name}".encode(), None, MS_BIND, None)
            if failed:
                raise OSError(ctypes.get_errno(), "mount")
            return act()

        return self.host.run(inside)

    def called(self, seconds: float = 20) -> tuple[str, int, bytes]:
        """The first call that came."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.calls, seconds)
            return self.calls[0]

    def targets(self) -> set[tuple[str, int, int]]:
        """Address, protocol and port of each packet that came out, beside those of the host's resolver."""
        found = set()
        for one in self.packets:
            if one[0] >> 4 != 4:
                found.add(("IPv6", 0, 0))
                continue
            port = int.from_bytes(one[22:24], "big") if one[9] in (6, 17) else 0
            found.add((socket.inet_ntoa(one[16:20]), one[9], port))
        return found - {(RESOLVER, 17, 53)}

    def _serve(self) -> None:
        poll = select.poll()
        for one in (self._stopped, self._wire, self._dns, *self._listeners):
            poll.register(one, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == self._stopped.fileno():
                    return
                if fd == self._wire.fileno():
                    data, (_, protocol, kind, *_) = self._wire.recvfrom(65600)
                    if kind != socket.PACKET_OUTGOING and protocol != 0x0806:
                        self.packets.append(data)
                elif fd == self._dns.fileno():
                    self._answer(*self._dns.recvfrom(2000))
                else:
                    listener = next(one for one in self._listeners if one.fileno() == fd)
                    threading.Thread(target=self._call, args=(listener.accept()[0],), daemon=True).start()

    def _answer(self, query: bytes, peer: Any) -> None:
        at, labels = 12, []
        if len(query) < 17 or query[12] > 63:  # no question
            self.questions.append(query)
            return
        while query[at]:
            labels.append(query[at + 1 : at + 1 + query[at]])
            at += 1 + query[at]
        name = b".".join(labels)
        self.questions.append(name)
        text = name.decode("latin-1").lower()
        turns = self.turning.get(text)
        found = turns.pop(0) if turns else self.answers.get(text)
        if found is None and text.endswith(".good.test"):
            found = [ALLOWED]
        rows = b"".join(b"\xc0\x0c\0\1\0\1\0\0\0\0\0\4" + socket.inet_aton(one) for one in found or [])
        flags = 0x8180 if found else 0x8183
        self._dns.sendto(
            query[:2] + struct.pack(">5H", flags, 1, len(found or []), 0, 0) + query[12 : at + 5] + rows, peer
        )

    def _call(self, connection: socket.socket) -> None:
        """Write down the first bytes of a call, and answer: an echo on port 9000, else a page of HTTP."""
        with connection, suppress(OSError):
            address, port = connection.getsockname()
            connection.settimeout(20)
            data = b"" if port == 22 else connection.recv(65536)
            with self._changed:
                self.calls.append((address, port, data))
                self._changed.notify_all()
            if port == 9000:
                while data:
                    connection.sendall(data)
                    data = connection.recv(65536)
            else:
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\nhello\n")
                connection.shutdown(socket.SHUT_WR)
                while data := connection.recv(65536):
                    with self._changed:
                        self.calls.append((address, port, data))

    def close(self) -> None:
        assert self._thread.is_alive(), "nobody listened any more"
        self._stop.send(b"x")
        self._thread.join()
        for one in (self._stop, self._stopped, self._wire, self._dns, *self._listeners):
            one.close()
        self.host.close()
        self.world.close()


def extension(kind: int, body: bytes) -> bytes:
    return struct.pack(">HH", kind, len(body)) + body


def named(*names: bytes) -> bytes:
    """The extension of server names."""
    rows = b"".join(b"\0" + struct.pack(">H", len(one)) + one for one in names)
    return extension(0, struct.pack(">H", len(rows)) + rows)


def hello(*extensions: bytes) -> bytes:
    """A ClientHello of TLS 1.2 and later."""
    rest = b"".join(extensions)
    body = b"\3\3" + bytes(32) + b"\0" + b"\0\2\x13\1" + b"\1\0" + struct.pack(">H", len(rest)) + rest
    return b"\1" + len(body).to_bytes(3, "big") + body


def record(data: bytes, kind: int = 22) -> bytes:
    """A record of TLS."""
    return bytes((kind, 3, 1)) + struct.pack(">H", len(data)) + data
