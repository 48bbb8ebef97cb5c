"""The socket device between a driver kit and real AF_UNIX sockets."""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from typing import Any

import pytest
from cardcage.errors import ConfigError
from cardcage_virtio.testing import Bench
from cardcage_virtio.vsock.device import Vsock, VsockOptions
from cardcage_virtio.vsock.stream import BUFFER, Header
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CID = 7


class Guest:
    """A driver that speaks packets."""

    def __init__(self, path: Path, packed: bool = False) -> None:
        self.path = path
        self.bench = Bench(Vsock(VsockOptions(cid=CID, uds=str(path))), packed=packed)
        self.got: list[tuple[Header, bytes]] = []
        for _ in range(8):
            self.bench.driver(0).add([], [44, 8192])
        self.bench.kick(0)

    def send(self, op: int, port: int, peer: int, data: bytes = b"", **more: Any) -> None:
        fields = {"credit": 1 << 18, "forwarded": 0, "flags": 0, "type": 1, **more}
        packet = Header(CID, 2, port, peer, len(data), op=op, **fields).pack()
        self.bench.driver(1).add([packet, data] if data else [packet])
        self.bench.kick(1)
        self.bench.driver(1).used()

    def take(self) -> None:
        for _, data in self.bench.driver(0).used():
            header = Header.unpack([memoryview(data)])
            assert header is not None
            self.got.append((header, data[44:]))
            self.bench.driver(0).add([], [44, 8192])
        self.bench.kick(0)

    def expect(self, op: int) -> tuple[Header, bytes]:
        def there() -> bool:
            self.take()
            return any(header.op == op for header, _ in self.got)

        self.bench.until(there)
        found = next(one for one in self.got if one[0].op == op)
        self.got.remove(found)
        return found

    def call(self, port: int) -> tuple[socket.socket, int]:
        """A host program connects to the guest's *port*."""
        program = socket.socket(socket.AF_UNIX)
        program.settimeout(10)
        program.connect(str(self.path))
        program.sendall(b"CONNECT %d\n" % port)
        header, _ = self.expect(1)
        assert (header.destination_port, header.source_cid, header.destination_cid) == (port, 2, CID)
        self.send(2, port, header.source_port)
        assert program.recv(100) == b"OK %d\n" % header.source_port
        return program, header.source_port

    def close(self) -> None:
        self.bench.close()


@pytest.fixture
def guest(tmp_path: Path) -> Any:
    guest = Guest(tmp_path / "v")
    yield guest
    guest.close()
    assert not (tmp_path / "v").exists()


def test_host_connects_to_guest(guest: Guest) -> None:
    """CONNECT, OK, bytes both ways, and the end of each side."""
    program, port = guest.call(1234)
    program.sendall(b"to guest")
    header, data = guest.expect(5)
    assert (data, header.source_port, header.destination_port) == (b"to guest", port, 1234)
    guest.send(5, 1234, port, b"to host")
    assert program.recv(100) == b"to host"
    program.close()
    while guest.expect(4)[0].flags != 3:
        continue
    guest.send(4, 1234, port, flags=3)
    guest.expect(3)
    assert not guest.bench.device.streams


def test_guest_connects_to_host(guest: Guest) -> None:
    """A guest's connection reaches the listener at path_PORT; half-close is passed on."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{guest.path}_80")
        listener.listen()
        guest.send(1, 5000, 80)
        guest.expect(2)
        program, _ = listener.accept()
        program.settimeout(10)
        guest.send(5, 5000, 80, b"GET")
        assert program.recv(10) == b"GET"
        guest.send(4, 5000, 80, flags=2)
        assert program.recv(10) == b""
        program.sendall(b"answer")
        assert guest.expect(5)[1] == b"answer"
        program.close()
        while guest.expect(4)[0].flags != 3:
            continue


def test_half_a_close_leaves_the_other_half(guest: Guest) -> None:
    """A host program that sends no more is still sent to; one that is gone is not."""
    program, port = guest.call(9)
    program.shutdown(socket.SHUT_WR)
    assert guest.expect(4)[0].flags == 2
    guest.send(5, 9, port, b"still here")
    assert program.recv(100) == b"still here"
    program.close()
    assert guest.expect(4)[0].flags == 3
    guest.send(4, 9, port, flags=3)
    guest.expect(3)


def test_no_listener_is_a_reset(guest: Guest) -> None:
    """Connecting to a port without listener, or sending on a stream that is not, is reset."""
    guest.send(1, 5000, 81)
    assert guest.expect(3)[0].destination_port == 5000
    guest.send(5, 5001, 99, b"x")
    assert guest.expect(3)[0].destination_port == 5001
    guest.send(3, 5001, 99)
    guest.take()
    assert guest.got == []


def test_other_types_and_strangers(guest: Guest) -> None:
    """Unknown socket types are reset; packets in another's name are dropped."""
    guest.send(1, 5000, 80, type=2)
    assert guest.expect(3)[0].type == 2
    packet = Header(99, 2, 1, 2, 0, 1, 1).pack()
    guest.bench.driver(1).add([packet])
    guest.bench.kick(1)
    guest.take()
    assert guest.got == []


def test_credit_limits_what_the_guest_gets(guest: Guest) -> None:
    """The device sends no more than the guest has room for, and goes on when it has taken some."""
    program, port = guest.call(9)
    guest.send(6, 9, port, credit=10)
    program.sendall(b"0123456789abcdef")
    assert guest.expect(5)[1] == b"0123456789"
    guest.take()
    assert guest.got == []
    guest.send(6, 9, port, credit=10, forwarded=8)
    assert guest.expect(5)[1] == b"abcdef"
    program.close()


def test_a_slow_host_program_holds_a_bounded_amount(guest: Guest) -> None:
    """A guest that sends beyond its credit is reset; what fits arrives whole and in order."""
    program, port = guest.call(9)
    sent = 0
    while not guest.got or guest.got[-1][0].op != 3:
        guest.send(5, 9, port, struct.pack("<Q", sent) * 500)
        sent += 1
        guest.bench.slot.loop.poll()
        guest.take()
        guest.got = [one for one in guest.got if one[0].op == 3]
        assert sent * 4000 < 16 * BUFFER
    assert not guest.bench.device.streams
    program.close()


def test_megabytes_arrive_in_order(guest: Guest) -> None:
    """Much data through small buffers arrives whole, with credit updates on the way."""
    program, port = guest.call(9)
    program.setblocking(False)
    source = b"".join(struct.pack("<I", at) for at in range(1 << 18))
    arrived, at, forwarded = bytearray(), 0, 0
    device = guest.bench.device
    stream = next(iter(device.streams))
    while len(arrived) < len(source):
        if at < len(source) and at - stream._taken < BUFFER - 8192:
            guest.send(5, 9, port, source[at : at + 8192])
            at += 8192
        guest.bench.slot.loop.poll()
        guest.take()
        try:
            arrived += program.recv(1 << 16)
        except BlockingIOError:
            continue
    assert bytes(arrived) == source
    assert any(header.op == 6 for header, _ in guest.got)
    program.setblocking(True)
    back = bytearray()
    program.settimeout(10)
    guest.got.clear()
    at = 0
    while len(back) < len(source):
        if at < len(source):
            at += program.send(source[at : at + 65536])
        guest.bench.slot.loop.poll()
        guest.take()
        for _, data in guest.got:
            back += data
        guest.got.clear()
        forwarded = len(back)
        guest.send(6, 9, port, credit=1 << 18, forwarded=forwarded & 0xFFFFFFFF)
    assert bytes(back) == source
    program.close()


@pytest.mark.parametrize("line", [b"HELLO\n", b"CONNECT x\n", b"CONNECT 99999999999\n", b"C" * 40, b"CONNECT 1"])
def test_a_bad_greeting_is_hung_up(guest: Guest, line: bytes) -> None:
    """Host programs that do not say CONNECT PORT are disconnected."""
    with socket.socket(socket.AF_UNIX) as program:
        program.connect(str(guest.path))
        program.sendall(line)
        program.shutdown(socket.SHUT_WR)
        program.setblocking(False)

        def hung_up() -> bool:
            try:
                return program.recv(10) == b""
            except ConnectionResetError:  # it had not read all
                return True
            except BlockingIOError:
                return False

        guest.bench.until(hung_up)


def test_reset_ends_all_streams(guest: Guest) -> None:
    """After a device reset host programs see the end, and new ones can connect."""
    program, _ = guest.call(9)
    guest.bench.virtio.set_status(0)
    assert program.recv(10) == b""
    assert not guest.bench.device.streams


def test_a_path_that_exists_is_refused(tmp_path: Path) -> None:
    """The device does not take over a path that is there already."""
    (tmp_path / "v").touch()
    with pytest.raises(ConfigError, match="uds"):
        Bench(Vsock(VsockOptions(cid=3, uds=str(tmp_path / "v"))))


def test_a_socket_left_by_a_killed_process_is_replaced(tmp_path: Path) -> None:
    """A socket file that nobody serves is taken over; one that is served is not."""
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(tmp_path / "v"))
        gone.listen()
    guest = Guest(tmp_path / "v")
    with pytest.raises(ConfigError, match="in use"):
        Bench(Vsock(VsockOptions(cid=3, uds=str(tmp_path / "v"))))
    program, _ = guest.call(1)
    program.close()
    guest.close()


FIELDS = st.tuples(
    st.integers(0, 9), st.integers(8, 10), st.integers(78, 81), st.binary(max_size=60), st.integers(0, 4), st.integers()
)


@given(packets=st.lists(FIELDS | st.binary(max_size=60), max_size=30), packed=st.booleans())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_packets_never_hurt(packets: list[Any], packed: bool, tmp_path_factory: Any) -> None:
    """Any packets are answered, dropped or refused; afterwards a host program can still connect."""
    guest = Guest(tmp_path_factory.mktemp("v") / "v", packed)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{guest.path}_80")
        listener.listen()
        for one in packets:
            if isinstance(one, bytes):
                guest.bench.driver(1).add([one] if one else [b"x"])
                guest.bench.kick(1)
            else:
                op, port, peer, data, flags, credit = one
                guest.send(op, port, peer, data, flags=flags, credit=credit & 0xFFFFFFFF, forwarded=flags)
            guest.bench.slot.loop.poll()
            guest.take()
        guest.got.clear()
        program, _ = guest.call(1)
        program.close()
    guest.close()


def test_listening_is_revoked_and_comes_back(guest: Guest) -> None:
    """Programs that called in, and those that call meanwhile, see their end; the guest a reset; then it goes on."""
    slot = guest.bench.slot
    program, port = guest.call(1234)
    greeting = socket.socket(socket.AF_UNIX)
    greeting.settimeout(10)
    greeting.connect(str(guest.path))
    guest.bench.until(lambda: bool(guest.bench.device._callers.waiting))
    slot.host.change("socket", "listen", allowed=False)
    header, _ = guest.expect(3)
    assert (header.source_port, header.destination_port) == (port, 1234)
    late = socket.socket(socket.AF_UNIX)
    late.settimeout(10)
    late.connect(str(guest.path))
    slot.loop.poll(0.1)
    for one in (program, greeting, late):
        assert one.recv(10) == b""
        one.close()
    guest.send(5, 1234, port, b"lost")
    guest.expect(3)
    slot.host.change("socket", "listen", allowed=True)
    program, _ = guest.call(1234)
    program.close()


def test_connecting_is_revoked_and_comes_back(guest: Guest) -> None:
    """A guest's stream to the host is reset when its grant goes, a new one refused; what calls in is not touched."""
    slot = guest.bench.slot
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{guest.path}_80")
        listener.listen()
        inward, port = guest.call(1234)
        guest.send(1, 5000, 80)
        guest.expect(2)
        program, _ = listener.accept()
        program.settimeout(10)
        slot.host.change("socket", "connect", allowed=False)
        header, _ = guest.expect(3)
        assert (header.source_port, header.destination_port) == (80, 5000)
        assert program.recv(10) == b""
        slot.host.denied.add(f"unix:{guest.path}_80")
        guest.send(1, 5001, 80)
        guest.expect(3)
        slot.host.denied.clear()
        guest.send(5, 1234, port, b"still here")
        assert inward.recv(100) == b"still here"
        granted = len(slot.host._granted)
        guest.send(1, 5002, 80)
        guest.expect(2)
        assert len(slot.host._granted) == granted + 1
        guest.send(3, 5002, 80)
        guest.bench.until(lambda: len(slot.host._granted) == granted)
        inward.close()
        program.close()
