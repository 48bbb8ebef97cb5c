"""Tap interfaces and user mode against the host's own network stack, in namespaces that the test makes."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import sys
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

import pytest
from cardcage.errors import ConfigError, HostError
from cardcage.host import Host
from cardcage_net.parse import parse_net_flag, parse_stream, parse_tap, parse_user
from cardcage_net.sockets import Stream, open_stream
from cardcage_net.tap import Tap, TapNet, open_tap
from cardcage_net.user import User, UserNet, check_passt, forward, open_user
from net_lab import Cable, Guest, Namespace, Slot

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces and tap interfaces need root")
needs_passt = pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed")
PING_TYPE = b"\x08\x06"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


@pytest.fixture
def slot(stack: ExitStack) -> Slot:
    return stack.enter_context(closing(Slot()))


@pytest.fixture
def outside(stack: ExitStack) -> Namespace:
    """A namespace with an interface that has an address and a default route, which lead to nothing."""
    made = stack.enter_context(closing(Namespace()))
    made.shell(
        "ip link add out0 type veth peer name nowhere",
        "ip addr add 192.0.2.2/24 dev out0",
        "ip link set out0 up",
        "ip link set nowhere up",
        "ip route add default via 192.0.2.1",
    )
    return made


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def arp_request(mac: bytes, own: str, wanted: str) -> bytes:
    body = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1) + mac + socket.inet_aton(own) + bytes(6) + socket.inet_aton(wanted)
    return b"\xff" * 6 + mac + b"\x08\x06" + body + bytes(18)


MAC = b"\x52\x54\0\xaa\xbb\xcc"


@needs_root
@pytest.mark.parametrize("vnet", [False, True])
def test_tap_talks_to_the_host(stack: ExitStack, slot: Slot, outside: Namespace, tmp_path: Path, vnet: bool) -> None:
    """The host answers what the guest sends on a tap, with and without a virtio-net header, and the dump shows it."""
    dump = tmp_path / "t.pcap"
    options = Tap("tap7", vnet_header=vnet, mtu=1400, dump=str(dump))
    backend = outside.run(lambda: open_tap(slot, options))
    outside.shell("ip addr add 10.9.0.1/24 dev tap7")
    assert "mtu 1400" in outside.shell("ip link show tap7")
    guest = stack.enter_context(closing(Guest(slot, backend)))
    header = bytes(12) if vnet else b""
    assert backend.features.vnet_header == len(header)
    assert ("csum" in backend.features.offloads) == vnet
    guest.send(header, arp_request(MAC, "10.9.0.2", "10.9.0.1"))
    reply = guest.expect(lambda one: one[len(header) :][12:14] == b"\x08\x06" and one[len(header) :][20:22] == b"\0\2")
    reply = reply[len(header) :]
    assert reply[:6] == MAC
    assert reply[28:32] == socket.inet_aton("10.9.0.1")
    with slot.lock:  # a frame is dumped once the guest has taken it
        assert reply[:42] in dump.read_bytes()
    guest.close()
    assert "tap7" not in outside.shell("ip link")


@needs_root
def test_tap_offloads_follow_the_guest(stack: ExitStack, slot: Slot, outside: Namespace) -> None:
    """The host sends large unfinished segments only once the guest has said that it takes them."""
    backend = outside.run(lambda: TapNet(slot, Tap("tap7")))
    stack.callback(backend.close)
    assert {"csum", "tso4", "tso6"} <= backend.features.offloads

    def features() -> str:
        return outside.shell("ethtool -k tap7") if shutil.which("ethtool") else ""

    before = features()
    backend.set_offloads(frozenset({"csum", "tso4"}), 12)
    after = features()
    if before:
        assert "tcp-segmentation-offload: off" in before
        assert "tx-tcp-segmentation: on" in after
    backend.set_offloads(frozenset({"tso4"}), 12)
    assert features() == before
    assert not slot.said


@needs_root
def test_tap_joins_a_bridge(stack: ExitStack, slot: Slot, outside: Namespace) -> None:
    """Two guests on one bridge reach each other; a bridge that does not exist is named."""
    outside.shell("ip link add br7 type bridge forward_delay 0 mcast_snooping 0", "ip link set br7 up")
    guests = []
    for name in ("tap1", "tap2"):
        backend = outside.run(lambda name=name: TapNet(slot, Tap(name, bridge="br7", vnet_header=False)))
        guests.append(stack.enter_context(closing(Guest(slot, backend))))
    assert outside.shell("ip -o link show master br7").count("tap") == 2
    wanted = arp_request(MAC, "10.9.0.2", "10.9.0.3")
    guests[0].send(wanted)
    guests[1].expect(lambda one: one == wanted)
    with pytest.raises(HostError, match="cannot join bridge nobridge: no such interface"):
        outside.run(lambda: TapNet(slot, Tap("tap3", bridge="nobridge")))
    with pytest.raises(HostError, match="not a bridge"):
        outside.run(lambda: TapNet(slot, Tap("tap3", bridge="out0")))


@needs_root
def test_tap_queues(stack: ExitStack, slot: Slot, outside: Namespace) -> None:
    """Several queues are one interface, and frames come back on some of them."""
    backend = outside.run(lambda: TapNet(slot, Tap("tap7", queues=4, vnet_header=False)))
    outside.shell("ip addr add 10.9.0.1/24 dev tap7")
    assert backend.features.queues == 4
    guest = stack.enter_context(closing(Guest(slot, backend)))
    for queue in range(5):  # one that does not exist is not the end of the world
        with slot.lock:
            backend.send(queue, [arp_request(MAC, "10.9.0.2", "10.9.0.1")])
    guest.expect(lambda one: one[12:14] == b"\x08\x06" and one[20:22] == b"\0\2")
    with pytest.raises(HostError, match=r"that many queues|in use"):
        outside.run(lambda: TapNet(slot, Tap("tap7")))


@needs_root
def test_tap_errors(slot: Slot, outside: Namespace) -> None:
    """What the host refuses is said in one line."""
    with pytest.raises(HostError, match="is not a tap interface"):
        outside.run(lambda: TapNet(slot, Tap("lo")))
    with pytest.raises(ConfigError, match="15 bytes"):
        TapNet(slot, Tap("much-too-long-a-name"))


@needs_root
def test_tap_without_privilege(outside: Namespace, tmp_path: Path) -> None:
    """Without the privilege the error says how the administrator can make the interface."""
    code = (
        "import os; from net_lab import Slot; from cardcage_net.tap import Tap, TapNet\n"
        "slot = Slot()\nos.setuid(65534)\n"
        "try: TapNet(slot, Tap('tap9'))\nexcept Exception as error: print(error)\nslot.close()"
    )
    process = outside.popen(sys.executable, "-c", code, stdout=subprocess.PIPE, cwd=os.path.dirname(__file__))
    said, _ = process.communicate()
    assert "ip tuntap add dev tap9 mode tap user" in said or "/dev/net/tun" in said


@needs_root
@needs_passt
def test_user_mode_end_to_end(stack: ExitStack, slot: Slot, outside: Namespace) -> None:
    """A real network stack behind user mode reaches a server outside, and is reached by hostfwd."""
    options = User(hostfwd=["tcp:127.0.0.1:2222-:22", "udp::2223-:23"])
    user = outside.run(lambda: open_user(slot, options))
    inside = stack.enter_context(closing(Namespace()))
    tap = inside.run(lambda: TapNet(slot, Tap("eth0", vnet_header=False)))
    stack.enter_context(closing(Cable(slot, user, tap)))
    inside.shell("ip addr add 10.0.2.15/24 dev eth0", "ip route add default via 10.0.2.2")

    def serve(kind: socket.SocketKind, where: tuple[str, int]) -> socket.socket:
        made = stack.enter_context(socket.socket(socket.AF_INET, kind))
        made.settimeout(30)
        made.bind(where)
        if kind == socket.SOCK_STREAM:
            made.listen()
        return made

    def call(where: tuple[str, int]) -> socket.socket:
        return stack.enter_context(socket.create_connection(where, 30))

    server = outside.run(lambda: serve(socket.SOCK_STREAM, ("192.0.2.2", 8080)))
    client = inside.run(lambda: call(("192.0.2.2", 8080)))
    served, _ = server.accept()
    stack.callback(served.close)
    served.settimeout(30)
    blob = os.urandom(3 << 20)
    inside.run(lambda: send_all(stack, client, blob))
    assert receive(served, len(blob)) == blob
    send_all(stack, served, blob)
    assert receive(client, len(blob)) == blob

    shell = inside.run(lambda: serve(socket.SOCK_STREAM, ("10.0.2.15", 22)))
    visitor = outside.run(lambda: call(("127.0.0.1", 2222)))
    visitor.sendall(b"hello")  # Debian 12's passt ends the handshake only with data
    accepted, source = shell.accept()
    stack.callback(accepted.close)
    assert source[0] == "10.0.2.2"
    assert receive(accepted, 5) == b"hello"

    listener = inside.run(lambda: serve(socket.SOCK_DGRAM, ("10.0.2.15", 23)))
    sender = outside.run(lambda: stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)))
    sender.sendto(b"datagram", ("192.0.2.2", 2223))
    assert listener.recv(100) == b"datagram"


def send_all(stack: ExitStack, connection: socket.socket, data: bytes) -> None:
    import threading

    thread = threading.Thread(target=connection.sendall, args=(data,))
    thread.start()
    stack.callback(thread.join)


def receive(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        piece = connection.recv(length - len(data))
        assert piece
        data += piece
    return data


def discover(mac: bytes) -> bytes:
    """A DHCPDISCOVER."""
    bootp = struct.pack(">BBBBIHH", 1, 1, 6, 0, 0x1234, 0, 0x8000) + bytes(16) + mac + bytes(10 + 64 + 128)
    bootp += b"\x63\x82\x53\x63\x35\x01\x01\xff"
    udp = struct.pack(">HHHH", 68, 67, 8 + len(bootp), 0) + bootp
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0, bytes(4), b"\xff" * 4)
    ip = ip[:10] + struct.pack(">H", checksum(ip)) + ip[12:]
    return b"\xff" * 6 + mac + b"\x08\0" + ip + udp


@needs_root
@needs_passt
def test_user_mode_dhcp(stack: ExitStack, slot: Slot, outside: Namespace) -> None:
    """DHCP offers what the options say."""
    options = User(address="10.5.0.9/16", gateway="10.5.0.1", dns="192.0.2.53", mtu=9000)
    guest = stack.enter_context(closing(Guest(slot, outside.run(lambda: open_user(slot, options)))))
    guest.send(discover(MAC))
    offer = guest.expect(lambda one: one[12:14] == b"\x08\0" and one[23] == 17 and one[36:38] == b"\0D")
    assert offer[58:62] == socket.inet_aton("10.5.0.9")
    told = offer[282:]
    for option, value in ((1, b"\xff\xff\0\0"), (3, socket.inet_aton("10.5.0.1")), (6, socket.inet_aton("192.0.2.53"))):
        assert bytes([option, 4]) + value in told
    assert struct.pack(">BBH", 26, 2, 9000) in told


@needs_root
@needs_passt
def test_user_mode_starts_the_engine_again(stack: ExitStack, outside: Namespace) -> None:
    """When the engine dies the guest's network comes back with a new one; closing ends it."""
    slot = stack.enter_context(closing(outside.run(Slot)))
    backend = outside.run(lambda: UserNet(slot, User()))
    guest = stack.enter_context(closing(Guest(slot, backend)))
    guest.send(arp_request(MAC, "10.0.2.15", "10.0.2.2"))
    guest.count(1)
    first = backend._process
    assert first is not None
    with slot.lock:
        backend._retry = 1
    first.kill()
    while len(guest.frames) < 2:  # frames are lost until the new engine is there
        guest.send(arp_request(MAC, "10.0.2.15", "10.0.2.2"))
    now = backend._process
    assert now is not None
    assert now is not first
    assert [text for text, _ in slot.said] == ["user networking ended, restarting it"]
    guest.close()
    assert now.poll() is not None
    assert backend._process is None


@needs_root
@needs_passt
def test_user_mode_errors(stack: ExitStack, slot: Slot, outside: Namespace) -> None:
    """What keeps the engine from starting is said in its words; a missing engine says what to install."""
    with pytest.raises(HostError, match="passt ended: Invalid interface name absent0"):
        outside.run(lambda: UserNet(slot, User(interface="absent0")))
    with pytest.raises(HostError, match="apt install passt"):
        UserNet(slot, User(engine="no-such-engine"))
    for options, words in (
        (User(gateway="10.9.9.9"), "gateway"),
        (User(address="nonsense"), "nonsense"),
        (User(hostfwd=["tcp::2222-10.0.2.99:22"]), "10.0.2.15"),
    ):
        with pytest.raises(ConfigError, match=words):
            UserNet(slot, options)
    assert "passt at" in check_passt()[1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tcp::2222-:22", ("-t", "2222:22")),
        ("udp:127.0.0.1:53-:5353", ("-u", "127.0.0.1/53:5353")),
        (":80-10.0.2.15:8080", ("-t", "80:8080")),
        ("tcp:[::1]:80-:8080", ("-t", "::1/80:8080")),
    ],
)
def test_forwards(text: str, words: tuple[str, str]) -> None:
    """hostfwd is QEMU's word, told to passt in its own."""
    assert forward(text) == words


@pytest.mark.parametrize(
    "text", ["tcp::0-:22", "tcp::70000-:22", "icmp::1-:1", "2222", "tcp:300.1.1.1:1-:2", "tcp:::1-:2"]
)
def test_bad_forwards(text: str) -> None:
    """A hostfwd that is not one is refused."""
    with pytest.raises(ConfigError, match="hostfwd"):
        forward(text)


@pytest.mark.parametrize(
    ("text", "net", "device"),
    [
        ("user", {"type": "user"}, {}),
        (
            "user,hostfwd=tcp::2222-:22,hostfwd=udp::53-:53,mac=52:54:00:00:00:01",
            {"type": "user", "hostfwd": ["tcp::2222-:22", "udp::53-:53"]},
            {"mac": "52:54:00:00:00:01"},
        ),
        ("tap,tap0,queues=2,up=off", {"type": "tap", "ifname": "tap0", "queues": 2, "up": False}, {"queues": 2}),
        ("switch,name=lan,id=net1", {"type": "switch", "name": "lan"}, {"id": "net1"}),
        ("stream,unix:/run/s,dump=a.pcap", {"type": "stream", "connect": "unix:/run/s", "dump": "a.pcap"}, {}),
    ],
)
def test_net_flag(text: str, net: dict[str, Any], device: dict[str, Any]) -> None:
    """--net writes a virtio-net table."""
    assert parse_net_flag(text, Host()) == {"device": [{"type": "virtio-net", **device, "net": net}]}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("uesr", 'Did you mean "user"'),
        ("none", "leave --net out"),
        ("user,hostfw=x", 'Did you mean "hostfwd"'),
        ("tap,up=perhaps", "up: expected on or off"),
        ("tap,queues=many", "whole number"),
        ("switch,lan,name=b", "twice"),
        ("user,x", "key=value"),
    ],
)
def test_bad_net_flag(text: str, problem: str) -> None:
    """A --net that does not fit is refused with what was expected."""
    with pytest.raises((ValueError, ConfigError), match=problem):
        parse_net_flag(text, Host())


def test_specs_as_text() -> None:
    """A spec may be text: the type, a colon, and what the flag says behind its type."""
    assert parse_user("") == {}
    assert parse_tap("tap0,bridge=br0") == {"ifname": "tap0", "bridge": "br0"}
    assert parse_stream("listen=:4000,reconnect=5s") == {"listen": ":4000", "reconnect": "5s"}


def dhcp_answer(request: bytes, kind: int) -> bytes:
    """An offer (2) or acknowledgement (5) for a DHCP request."""
    own, given = socket.inet_aton("10.7.0.1"), socket.inet_aton("10.7.0.2")
    bootp = (
        b"\2\1\6\0" + request[46:50] + request[50:54] + bytes(4) + given + own + bytes(4) + request[70:86] + bytes(192)
    )
    options = b"\x63\x82\x53\x63\x35\1" + bytes([kind]) + b"\x36\4" + own + b"\x33\4\0\0\xff\xff\1\4\xff\xff\xff\0\xff"
    udp = bootp + options
    udp = struct.pack(">HHHH", 67, 68, 8 + len(udp), 0) + udp
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0, own, b"\xff" * 4)
    ip = ip[:10] + struct.pack(">H", checksum(ip)) + ip[12:]
    return b"\xff" * 6 + b"\x02\0\0\0\0\1" + b"\x08\0" + ip + udp


@pytest.mark.once
@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="qemu is not installed")
@pytest.mark.parametrize("ours", ["listen", "connect"])
def test_qemu_at_the_other_end(stack: ExitStack, slot: Slot, tmp_path: Path, ours: str) -> None:
    """QEMU's -netdev stream speaks with ours, either one listening: its iPXE asks for an address and takes ours."""
    path = tmp_path / "s"
    server = "off" if ours == "listen" else "on"
    words = ["qemu-system-x86_64", "-accel", "tcg", "-m", "64", "-display", "none", "-nodefaults", "-boot", "n"]
    words += ["-netdev", f"stream,id=n,server={server},addr.type=unix,addr.path={path}"]
    words += ["-device", "virtio-net-pci,netdev=n,mac=52:54:00:aa:bb:cc,bootindex=0"]

    def qemu() -> None:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL)
        stack.callback(process.wait)
        stack.callback(process.kill)

    if ours == "listen":
        guest = stack.enter_context(closing(Guest(slot, open_stream(slot, Stream(listen=f"unix:{path}")))))
        qemu()
    else:
        qemu()
        guest = stack.enter_context(closing(Guest(slot, open_stream(slot, Stream(connect=f"unix:{path}")))))

    def dhcp(kind: int) -> Any:
        return lambda one: one[12:14] == b"\x08\0" and one[36:38] == b"\0C" and bytes([0x35, 1, kind]) in one

    asked = guest.expect(dhcp(1), 60)
    assert asked[6:12] == MAC
    guest.send(dhcp_answer(asked, 2))
    requested = guest.expect(dhcp(3), 60)
    assert socket.inet_aton("10.7.0.2") in requested
