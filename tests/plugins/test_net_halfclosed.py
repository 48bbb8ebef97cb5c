"""Connections whose guest half is closed first, through the passt that is installed, and the frames by themselves."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import threading
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

import pytest
from cardcage_net.halfclosed import FLOWS, HalfClosed, damages
from cardcage_net.tap import Tap, TapNet
from cardcage_net.user import User, UserNet, check_passt
from hypothesis import given
from hypothesis import strategies as st
from net_lab import Cable, Namespace, Slot, outside_world

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

FIN, SYN, RST, ACK = 1, 2, 4, 16
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces and tap interfaces need root")
needs_passt = pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed")


class Ends:
    """The two ends of one connection through user mode: the guest's, and the one outside."""

    def __init__(self, stack: ExitStack, way: str) -> None:
        self.slot = stack.enter_context(closing(Slot()))
        outside, inside = stack.enter_context(closing(outside_world())), stack.enter_context(closing(Namespace()))
        options = User(hostfwd=["tcp:127.0.0.1:2222-:22"])
        user = outside.run(lambda: UserNet(self.slot, options))
        tap = inside.run(lambda: TapNet(self.slot, Tap("eth0", vnet_header=False, mtu=options.mtu)))
        stack.enter_context(closing(Cable(self.slot, user, tap)))
        inside.shell("ip addr add 10.0.2.15/24 dev eth0", "ip route add default via 10.0.2.2")
        self._stack = stack
        server = outside.run(lambda: self._serve("192.0.2.2"))
        self.guest = inside.run(lambda: self._call(("192.0.2.2", 22)))
        self.host = self._accept(server)
        if way == "in":  # only now does passt know the guest's address
            server = inside.run(lambda: self._serve("10.0.2.15"))
            self.host = outside.run(lambda: self._call(("127.0.0.1", 2222)))
            self.host.sendall(b"a")  # Debian 12's passt ends the handshake only with data
            self.guest = self._accept(server)
            assert self.guest.recv(1) == b"a"

    def _serve(self, address: str) -> socket.socket:
        return self._stack.enter_context(socket.create_server((address, 22)))

    def _call(self, where: tuple[str, int]) -> socket.socket:
        return self._stack.enter_context(socket.create_connection(where, 60))

    def _accept(self, server: socket.socket) -> socket.socket:
        server.settimeout(60)
        made = self._stack.enter_context(server.accept()[0])
        made.settimeout(60)
        return made


@pytest.fixture
def ends() -> Iterator[Callable[[str], Ends]]:
    with ExitStack() as stack:
        yield lambda way: Ends(stack, way)


def all_of(end: socket.socket) -> tuple[bytes, bool]:
    """What comes from *end*, and that it came to its end."""
    data = b""
    try:
        while piece := end.recv(1 << 20):
            data += piece
    except ConnectionResetError:
        return data, False
    return data, True


@pytest.mark.once
@needs_root
@needs_passt
@pytest.mark.parametrize(("way", "size"), [("out", 1000), ("out", 2 << 20), ("in", 2 << 20)])
def test_nothing_is_damaged_after_the_guest_closed_its_half(ends: Callable[[str], Ends], way: str, size: int) -> None:
    """A guest that closes its half first gets all that comes; with an old passt whole bytes, a reset, and one line."""
    made, blob = ends(way), os.urandom(size)
    made.guest.sendall(b"go")
    made.guest.shutdown(socket.SHUT_WR)
    assert all_of(made.host) == (b"go", True)

    def answer() -> None:
        try:
            made.host.sendall(blob)
            made.host.shutdown(socket.SHUT_WR)
        except ConnectionResetError:  # an old passt
            pass

    sender = threading.Thread(target=answer)
    sender.start()
    got, ended = all_of(made.guest)
    sender.join()
    said = [text for text, _ in made.slot.said]
    if damages("passt"):
        assert got
        assert blob.startswith(got)
        assert not ended
        assert ["half of a connection first" in one for one in said] == [True]
        assert "old one" in check_passt()[1]
    else:
        assert got == blob
        assert ended
        assert not said


@needs_root
@needs_passt
@pytest.mark.parametrize("way", ["out", "in"])
@pytest.mark.parametrize("first", ["guest", "host"])
def test_connections_end_from_either_side(ends: Callable[[str], Ends], way: str, first: str) -> None:
    """Data both ways, then one end closes and then the other: both see all and the end, and nothing is said of it."""
    made = ends(way)
    one, other = (made.guest, made.host) if first == "guest" else (made.host, made.guest)
    other.sendall(b"question")
    assert one.recv(8) == b"question"
    one.sendall(b"answer")
    one.shutdown(socket.SHUT_WR)
    assert all_of(other) == (b"answer", True)
    other.close()
    assert all_of(one) == (b"", True)
    assert not made.slot.said


@pytest.mark.parametrize(
    ("version", "old"),
    [
        ("passt unknown version", True),
        ("passt 0.0~git20240220.1e6f92b-1", True),
        ("passt 2025_02_17.a1e48a0", True),
        ("passt 2025_03_20.32f6212", False),
        ("passt 0^20250503.g587980c-1.fc42.x86_64", False),
        ("passt unknown version\n  --repair-path PATH", False),
    ],
)
def test_an_old_passt_is_known_by_what_it_says(tmp_path: Path, version: str, old: bool) -> None:
    """Versions are read as Debian, Fedora and passt itself write them; without one the options tell."""
    program = tmp_path / "passt"
    program.write_text(f"#!/bin/sh\necho '{version}'\n")
    program.chmod(0o755)
    assert damages(str(program)) == old
    assert not damages(str(tmp_path / "none"))


def tcp(flags: int, *, ack: int = 7, data: bytes = b"", v6: bool = False, back: bool = False, port: int = 1) -> bytes:
    """A frame from the guest, or *back* to it, with a right checksum."""
    near, far = (bytes([1] * 16), bytes([2] * 16)) if v6 else (bytes([10, 0, 2, 15]), bytes([192, 0, 2, 2]))
    ports = (80, port) if back else (port, 80)
    addresses = far + near if back else near + far
    body = struct.pack(">HHIIBBHHH", *ports, 100, ack, 5 << 4, flags, 500, 0, 0) + data
    body = body[:16] + struct.pack(">H", 0xFFFF ^ ones(addresses + struct.pack(">HH", 6, len(body)) + body)) + body[18:]
    if v6:
        return bytes(12) + b"\x86\xdd" + struct.pack(">IHBB", 6 << 28, len(body), 6, 64) + addresses + body
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0x4000, 64, 6, 0)
    return bytes(12) + b"\x08\0" + head + addresses + body


def ones(data: bytes) -> int:
    """The sum of 16-bit words that Internet checksums use."""
    total = sum(struct.unpack(f">{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(total)


class Engine:
    """Collects what one that damages would have."""

    def __init__(self) -> None:
        self.told = 0
        self.guard = HalfClosed(self._tell)
        self.received = self.guard.watch(lambda queue, frame: True)

    def _tell(self) -> None:
        self.told += 1

    def has(self, frame: bytes, cut: int = 0) -> bytes | None:
        """*frame* as it comes out, sent in two parts where *cut* is not 0."""
        return b"".join(self.guard.outgoing([frame[:cut], frame[cut:]] if cut else [frame])) or None


@pytest.mark.parametrize("v6", [False, True])
@pytest.mark.parametrize("cut", [0, 20, 60])
def test_acknowledgements_are_kept_back_between_the_two_ends(v6: bool, cut: int) -> None:
    """From the guest's FIN to the engine's own, or a reset or new connection, no new acknowledgement gets through."""
    engine = Engine()
    for begin in (tcp(SYN, v6=v6), tcp(RST, v6=v6)):
        assert engine.has(begin, cut) == begin
        plain, fin = tcp(ACK, ack=8, v6=v6), tcp(ACK | FIN, ack=9, v6=v6)
        assert engine.has(plain, cut) == plain
        assert engine.has(fin, cut) == fin
        assert engine.has(tcp(ACK, ack=50, v6=v6), cut) is None
        for data in (b"", b"abc"):  # sent again
            assert engine.has(tcp(ACK | FIN, ack=50, data=data, v6=v6), cut) == tcp(ACK | FIN, ack=9, data=data, v6=v6)
            again = tcp(ACK, ack=70000, data=b"abcd", v6=v6)
            assert engine.has(again, cut) == tcp(ACK, ack=9, data=b"abcd", v6=v6)
        other = tcp(ACK, ack=50, v6=v6, port=2)
        assert engine.has(other, cut) == other
    assert engine.received(0, tcp(ACK | FIN, v6=v6, back=True))
    last = tcp(ACK, ack=51, v6=v6)
    assert engine.has(last, cut) == last
    fin = tcp(ACK | FIN, ack=51, v6=v6)
    assert engine.has(fin, cut) == fin
    assert engine.has(last, cut) == last
    assert engine.told == 1


def test_memory_of_connections_is_bounded() -> None:
    """A guest that opens and half closes ports without end makes the guard forget the oldest, not grow."""
    engine = Engine()
    for port in range(2 * FLOWS):
        engine.has(tcp(ACK | FIN, port=port))
        engine.received(0, tcp(RST, port=port + 10000, back=True))
        engine.has(tcp(ACK, port=5 * (port >= 5)))  # one that lives
    assert len(engine.guard._acked) == len(engine.guard._over) == FLOWS
    assert engine.has(tcp(ACK, port=5)) is None


@given(st.lists(st.tuples(st.booleans(), st.binary(max_size=40), st.integers(0, 60), st.booleans()), max_size=8))
def test_frames_that_are_anything_pass(frames: list[tuple[bool, bytes, int, bool]]) -> None:
    """Frames that are cut short or make no sense do not raise, and what is no TCP goes through as it is."""
    engine = Engine()
    for back, noise, at, v6 in frames:
        frame = tcp(ACK | FIN, v6=v6, back=back)
        frame = frame[:at] + noise + frame[at + len(noise) :]
        if back:
            assert engine.received(0, frame)
        else:
            engine.has(frame)
            assert engine.has(frame[:14] + noise) == frame[:14] + noise
            assert engine.has(bytes(14) + noise) == bytes(14) + noise
