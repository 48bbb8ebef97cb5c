"""A way out: entries are what they say, packets and answers hold to the RFCs, and hostile ones do no harm."""

from __future__ import annotations

import socket
import threading
from contextlib import closing, contextmanager, suppress
from ipaddress import IPv4Address
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from cardcage.errors import ConfigError, HostError
from cardcage_egress import net, tcp
from cardcage_egress.answers import GATEWAY, GUEST, KEPT, Names, Question, lease
from cardcage_egress.gate import is_own, parsed
from cardcage_egress.net import MAC, Egress, EgressNet, open_egress, parse_egress
from cardcage_egress.packets import ACK, FIN, RST, SYN, TCP, Arp, Datagram, Ip, Malformed, Segment
from cardcage_egress.policy import INSIDE, OPENED, Policy
from cardcage_egress.reading import Refused, server_name
from cardcage_egress.tcp import ROOM
from hypothesis import given, settings
from hypothesis import strategies as st
from net_lab import Guest, Slot

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.once
OURS = b"\x52\x54\0\0\0\1"
BYTES = st.binary(max_size=200)


# entries


def test_entries() -> None:
    """A name opens TLS and HTTP at their ports, with a port that one alone; *.NAME is what is below; a CIDR is TCP."""
    policy = Policy(["Pypi.org", "*.files.org", "git.org:22/tcp", "git.org:8443", "10.1.0.0/16:5432", "8.8.8.8"])
    assert policy.ports_of("pypi.org") == {443: "tls", 80: "http"}
    assert policy.ports_of("git.org") == {22: "tcp", 8443: "tls"}
    assert policy.ports_of("a.b.files.org")
    for name in ("files.org", "xfiles.org", "pypi.org.evil.org", "a.pypi.org", "org", ""):
        assert not policy.ports_of(name)
    assert policy.opens(IPv4Address("10.1.2.3"), 5432)
    assert policy.opens(IPv4Address("8.8.8.8"), 53)
    for address, port in (("10.1.2.3", 22), ("10.2.0.1", 5432), ("8.8.4.4", 53), ("127.0.0.1", 5432)):
        assert not policy.opens(IPv4Address(address), port)


def test_a_wide_entry_opens_nothing_special() -> None:
    """Private, loopback and link-local addresses are opened by an entry of such, and by no wider one."""
    policy = Policy(["0.0.0.0/0"])
    assert policy.opens(IPv4Address("1.1.1.1"), 80)
    for address in ("10.0.0.1", "127.0.0.1", "169.254.169.254", "192.168.1.1", "224.0.0.1", "198.18.0.1", "0.0.0.0"):
        assert not policy.opens(IPv4Address(address), 80)
    assert Policy(["169.254.169.254"]).opens(IPv4Address("169.254.169.254"), 80)
    assert Policy(["127.0.0.1:80"]).names_host(IPv4Address("127.0.0.1"), 80)
    assert not Policy(["10.0.0.0/8"]).names_host(IPv4Address("10.0.0.1"), 80)


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ("", "expected a name"),
        ("*", "expected a name"),
        ("*.org", "expected a name"),
        ("a..b", "expected a name"),
        ("bücher.de", "expected a name"),
        ("-a.org", "expected a name"),
        ("10.1.2.3/8", "expected a name"),
        ("1.2.3", "expected a name"),
        ("::1", "IPv6"),
        ("2001:db8::/32", "IPv6"),
        ("[::1]:80", "IPv6"),
        ("a.org:0", "a port"),
        ("a.org:65536", "a port"),
        ("a.org:", "a port"),
        ("a.org:22/udp", "tls, http or tcp"),
        ("10.0.0.0/8:443/tls", "not read along"),
        ("224.0.0.0/4", "no server"),
        ("198.18.0.1", "no server"),
        ("127.0.0.0/8", "by itself"),
    ],
)
def test_wrong_entries(entry: str, why: str) -> None:
    """A wrong entry is refused in one line that names it, and says what was expected."""
    with pytest.raises(ValueError, match=why) as found:
        Policy([entry])
    assert "\n" not in str(found.value)
    assert entry in str(found.value)


def test_too_many_entries() -> None:
    """There are 256 entries at most."""
    with pytest.raises(ValueError, match="256 at most"):
        Policy(["a.org"] * 257)


def test_the_short_form() -> None:
    """The short form on the command line is a list of entries."""
    assert parse_egress("pypi.org,allow=10.0.0.0/8") == {"allow": ["pypi.org", "10.0.0.0/8"]}


# packets


def udp(data: bytes, port: int = 53, to: bytes = GATEWAY, source: bytes = GUEST) -> bytes:
    return Datagram(4000, port, data).packed(source, to).framed(MAC, OURS)


def query(name: bytes, kind: int = 1, flags: int = 0x0100) -> bytes:
    labels = b"".join(bytes((len(one),)) + one for one in name.split(b".")) + b"\0"
    return b"\x12\x34" + flags.to_bytes(2, "big") + b"\0\1\0\0\0\0\0\0" + labels + kind.to_bytes(2, "big") + b"\0\1"


@given(BYTES, st.integers(1, 65535))
def test_packets_come_back(data: bytes, port: int) -> None:
    """What is packed is read as it was, with its checksums; a byte that is changed is noticed."""
    frame = Datagram(port, 53, data).packed(GUEST, GATEWAY).framed(MAC, OURS)
    assert Datagram.of(Ip.of(frame)) == Datagram(port, 53, data)
    segment = Segment(port, 80, 1, 2, ACK, 3, data)
    frame = segment.packed(GUEST, GATEWAY).framed(MAC, OURS)
    assert Segment.of(Ip.of(frame)) == segment
    broken = bytearray(frame)
    broken[-1] ^= 0x41
    with pytest.raises(Malformed):
        Segment.of(Ip.of(bytes(broken)))


@given(st.binary(max_size=120))
def test_bytes_of_any_kind(data: bytes) -> None:
    """No bytes do more than be refused, by whatever reads them."""
    for read in (Arp.of, Ip.of, lease, Question.of, parsed, server_name):
        with suppress(Malformed, Refused, ValueError):
            read(data)  # type: ignore[operator]  # one argument, whatever it is called
    for kind in (Datagram.of, Segment.of):
        with suppress(Malformed):
            kind(Ip(GUEST, GATEWAY, TCP, data))


def test_fragments_and_options_are_refused() -> None:
    """A fragment is none of ours, be it the first, the last or one between, nor is a packet with options."""
    good = udp(query(b"a.org"))
    for at, value, why in ((20, 0x20, "fragment"), (21, 1, "fragment"), (14, 0x46, "options"), (14, 0x65, "options")):
        frame = bytearray(good)
        frame[at] = value
        with pytest.raises(Malformed, match=why):
            Ip.of(bytes(frame))


# names


def test_answers_for_names() -> None:
    """A name that is open has an address of the guest's side and no other record; any other name is none."""
    names = Names()
    found = names.address("pypi.org")
    assert IPv4Address(found) in INSIDE
    assert names.name(found) == "pypi.org"
    asked = Question.of(query(b"PyPI.org"))
    assert asked.name == "pypi.org"
    assert asked.answered(found)[-4:] == found
    for kind in (28, 16, 65, 255):
        told = Question.of(query(b"pypi.org", kind)).answered(found)
        assert told[3] & 15 == 0
        assert told[6:8] == b"\0\0"
    assert asked.answered(None)[3] & 15 == 3


def test_names_are_bounded() -> None:
    """So many names have an address at once; then the oldest has none, and a new one its address."""
    names = Names()
    first = names.address("a0.org")
    for number in range(1, KEPT + 1):
        names.address(f"a{number}.org")
    assert names.name(first) == f"a{KEPT}.org"
    assert names.address("a0.org") != first
    assert len(names._names) == KEPT


# the network


@pytest.fixture
def slot() -> Iterator[Slot]:
    with closing(Slot()) as made:
        yield made


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


@contextmanager
def gateless(slot: Slot, allow: list[str]) -> Iterator[EgressNet]:
    """A network whose gate answers nothing."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, pytest.MonkeyPatch.context() as patch:
        patch.setattr(net, "start_gate", lambda policy: (SimpleNamespace(returncode=0), ours))
        with closing(EgressNet(slot, Egress(allow))) as made:
            yield made


class Peer(Guest):
    """A guest that speaks TCP with one server."""

    def __init__(self, slot: Slot, backend: Any, port: int) -> None:
        super().__init__(slot, backend)
        self.port, self.seq, self.next, self.window = port, 1000, 0, 65535
        self.address = socket.inet_aton("127.0.0.1")

    def say(self, flags: int, data: bytes = b"", **keys: Any) -> None:
        segment = Segment(5000, self.port, self.seq, self.next, flags, self.window, data, **keys)
        self.send(segment.packed(GUEST, self.address).framed(MAC, OURS))
        self.seq += len(data) + bool(flags & (SYN | FIN))

    def segments(self) -> list[Segment]:
        return [Segment.of(Ip.of(one)) for one in list(self.frames) if one[23] == TCP]

    def heard(self, flags: int) -> Segment:
        """The first segment with *flags*."""
        return Segment.of(
            Ip.of(self.expect(lambda one: one[23] == TCP and Segment.of(Ip.of(one)).flags & flags == flags))
        )

    def connect(self) -> None:
        self.say(SYN, mss=65480, scale=7)
        self.next = (self.heard(SYN | ACK).seq + 1) & 0xFFFFFFFF
        self.say(ACK)

    def receive(self, count: int) -> bytes:
        """*count* bytes, acknowledged as they come."""
        found, at = b"", 0
        while len(found) < count:
            self.count(at + 1)
            for one in list(self.frames)[at:]:
                at += 1
                if one[23] == TCP and (segment := Segment.of(Ip.of(one))).data:
                    ahead = (segment.seq - self.next) & 0xFFFFFFFF
                    if ahead == 0:
                        found += segment.data
                        self.next = (self.next + len(segment.data)) & 0xFFFFFFFF
                        self.say(ACK)
        return found


@pytest.fixture
def peer(slot: Slot, server: socket.socket) -> Iterator[Peer]:
    port = server.getsockname()[1]
    with closing(Peer(slot, open_egress(slot, Egress([f"127.0.0.1:{port}", "good.test"])), port)) as made:
        yield made


@pytest.fixture
def shut(slot: Slot) -> Iterator[Peer]:
    """A guest whose gate answers nothing."""
    with gateless(slot, ["127.0.0.1:80", "good.test"]) as made:
        yield Peer(slot, made, 80)


def test_a_connection(peer: Peer, server: socket.socket) -> None:
    """A connection carries what both sides say, whole and in order, and ends when both have."""
    peer.connect()
    with server.accept()[0] as connection:
        blob = bytes(range(256)) * 4096
        threading.Thread(target=connection.sendall, args=(blob,)).start()
        assert peer.receive(len(blob)) == blob
        peer.say(ACK, b"one ")
        peer.say(ACK | FIN, b"two")
        assert connection.makefile("rb").read() == b"one two"
        connection.shutdown(socket.SHUT_WR)
        end = peer.heard(FIN)
        peer.next = (end.seq + 1) & 0xFFFFFFFF
        peer.say(ACK)
    assert not peer.backend._connections


def test_what_is_lost_comes_again(peer: Peer, server: socket.socket) -> None:
    """What the guest had no room for comes when it has; what it does not acknowledge comes again; order is kept."""
    peer.connect()
    with server.accept()[0] as connection:
        held = len(peer.frames)
        peer.room = held
        connection.sendall(b"first")
        peer.give_room(1 << 30)
        data = Segment.of(Ip.of(peer.expect(lambda one: one[23] == TCP and b"first" in one)))
        assert data.data == b"first"
        for _ in range(3):  # it asks for it again
            peer.say(ACK)
        peer.expect(lambda one: sum(b"first" in other for other in peer.frames) > 1)
        peer.seq += 4
        peer.say(ACK, b"late")
        peer.seq -= 8
        peer.say(ACK, b"soon")
        peer.say(ACK, b"late")
        assert connection.recv(8, socket.MSG_WAITALL) == b"soonlate"


def test_a_closed_window_is_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that has no room is asked for its window by a number before its own, where the numbers wrap too."""
    monkeypatch.setattr(tcp.secrets, "randbits", lambda bits: 0xFFFFFFFF)
    said: list[Segment] = []
    loop = SimpleNamespace(add_reader=lambda fd, act: None, remove_reader=lambda fd: None)
    wire: Any = SimpleNamespace(loop=loop, time=0, over=lambda one: None)
    wire.now, wire.emit = lambda: wire.time, lambda one, segment: said.append(segment) or True
    ours, gate = socket.socketpair()
    ours.setblocking(False)
    one = tcp.Connection(wire, bytes(4), Segment(5000, 80, 999, 0, SYN, 65535), ours)
    with gate, closing(one):
        gate.send(OPENED + b"data")
        one._answered()
        one.heard(Segment(5000, 80, 1000, 0, ACK, 0))
        wire.time = tcp.FIRST
        one.tick()
        assert [(segment.flags, segment.seq, segment.data) for segment in said] == [
            (SYN | ACK, 0xFFFFFFFF, b""),
            (ACK, 0xFFFFFFFF, b""),
        ]


def test_a_guest_that_floods(peer: Peer, server: socket.socket) -> None:
    """Of what the server does not take, no more is kept than there is room for; the guest is told to wait."""
    peer.connect()
    with server.accept()[0]:
        (one,) = peer.backend._connections.values()
        window = 1
        while window:  # what the host's own sockets take is bounded too
            before = len(peer.frames)
            peer.say(ACK, b"x" * 60000)
            told = Segment.of(Ip.of(peer.count(before + 1)[-1]))
            peer.seq, window = told.ack, told.window
            assert len(one._back) <= ROOM


def test_connections_are_bounded(shut: Peer, slot: Slot) -> None:
    """A guest has so many connections at once, and is refused more."""
    for number in range(6000, 6200):
        shut.send(Segment(number, shut.port, 1, 0, SYN, 100).packed(GUEST, shut.address).framed(MAC, OURS))
    assert len(shut.backend._connections) <= 128
    assert any("there are 128 connections" in values.get("what", "") for _, values in slot.said)


def test_refusals_are_told_within_bounds(shut: Peer, slot: Slot) -> None:
    """A refusal is one line of the log; of very many, some are told, and how many were not."""
    for number in range(1000):
        shut.send(udp(b"x", port=number + 100, to=socket.inet_aton("8.8.8.8")))
    lines = [values["what"] for event, values in slot.said if event == "egress refused"]
    assert lines[0] == "UDP to 8.8.8.8:100"
    assert len(lines) <= 22


@pytest.mark.parametrize("address", ["127.0.0.2", "8.8.8.8", "198.18.1.0"])
def test_what_is_not_open_is_reset(shut: Peer, address: str) -> None:
    """A connection that is not open is refused at once, and so is what belongs to none."""
    shut.address = socket.inet_aton(address)
    shut.say(SYN)
    assert shut.heard(RST).ack == 1001
    shut.say(ACK, b"x")
    shut.expect(lambda one: len(shut.frames) > 1)


def test_dns_of_the_guest(shut: Peer, slot: Slot) -> None:
    """Names are answered for by us: those that are open, and no others, whoever is asked."""
    shut.send(udp(query(b"good.test")))
    told = Datagram.of(Ip.of(shut.expect(lambda one: one[23] == 17)))
    assert IPv4Address(told.data[-4:]) in INSIDE
    shut.send(udp(query(b"s3cr3t.good.test")))
    assert Datagram.of(Ip.of(shut.count(2)[1])).data[3] & 15 == 3
    for _ in range(2000):
        shut.send(udp(query(b"good.test")))
    assert len(shut.frames) < 1500  # within what may be asked in a second
    assert ("egress refused", {"what": "the name s3cr3t.good.test"}) in slot.said


@given(st.lists(st.binary(max_size=90), max_size=20), st.booleans())
@settings(max_examples=30)
def test_frames_of_any_kind(frames: list[bytes], whole: bool) -> None:
    """No frame of the guest does harm: bytes of any kind, and TCP with fields of any kind."""
    with closing(Slot()) as slot, gateless(slot, ["good.test"]) as backend:
        peer = Guest(slot, backend)
        for one in frames:
            if whole:
                ip = Ip(GUEST, GATEWAY, one[0] % 20 if one else 6, one[1:])
                one = ip.framed(MAC, OURS)
            peer.send(one)
        assert not backend._connections


# the gate


@pytest.mark.parametrize(
    "request_",
    [
        b"",
        b"[]",
        b"{" * 500,
        b'{"to": "a.org"}',
        b'{"to": 5, "port": 1}',
        b'{"to": "a.org", "port": 0}',
        b'{"to": "a.org", "port": true, "more": 1}',
        b'{"to": "' + b"a" * 300 + b'", "port": 1}',
    ],
)
def test_requests_that_are_none(request_: bytes) -> None:
    """The gate takes requests of one shape, and refuses the rest."""
    with pytest.raises(ValueError, match=r"not a request|Expecting"):
        parsed(request_)


def test_a_taken_over_machine(slot: Slot, server: socket.socket) -> None:
    """Who asks the gate past the machine's own checks gets what is open, and nothing else."""
    port = server.getsockname()[1]
    backend = EgressNet(slot, Egress([f"127.0.0.1:{port}", "good.test:9"]))
    with closing(backend), backend._link or server as link:  # type: ignore[attr-defined]  # a socket either way
        slot.loop.remove_reader(link.fileno())
        for to, at, opened in (("127.0.0.1", port, True), ("127.0.0.1", port + 1, False), ("good.test", 80, False)):
            ours, theirs = socket.socketpair()
            with ours:
                socket.send_fds(link, [b'{"to": "%s", "port": %d}' % (to.encode(), at)], [theirs.fileno()])
                theirs.close()
                ours.settimeout(20)
                assert ours.recv(1) == (b"\0" if opened else b"")
        socket.send_fds(link, [b"junk"], [])
        backend._link = None


def test_a_gate_that_ends(peer: Peer, server: socket.socket, slot: Slot) -> None:
    """When the gate ends, connections are reset, none is made any more, and a line says so."""
    peer.connect()
    with server.accept()[0]:
        peer.backend._process.kill()
        peer.heard(RST)
    peer.seq = 5000
    before = len(peer.frames)
    peer.say(SYN)
    assert Segment.of(Ip.of(peer.count(before + 1)[-1])).flags & RST
    assert ("the gate has ended: nothing gets out", {}) in slot.said


def test_a_gate_that_does_not_start(slot: Slot, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate that cannot be started is one line."""
    monkeypatch.setattr(net.sys, "executable", "/bin/false")
    with pytest.raises(HostError, match="the gate cannot be started"):
        open_egress(slot, Egress(["a.org"]))


def test_wrong_options(slot: Slot) -> None:
    """A wrong entry is a line that names it, and no gate is started."""
    with pytest.raises(ConfigError, match='net egress: allow: "a b"'):
        open_egress(slot, Egress(["a b"]))


def test_own_addresses() -> None:
    """The host's own addresses are known as such."""
    assert is_own(IPv4Address("127.0.0.1"))
    assert not is_own(IPv4Address("192.0.2.77"))
