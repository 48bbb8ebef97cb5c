"""What docs/networks.md says and no other test shows: the table, and sentences about each type."""

from __future__ import annotations

import os
import re
import shutil
import socket
import stat
import struct
import subprocess
import sys
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest
from cardcage.host import Host
from cardcage.registry import BackendOffer
from cardcage.units import Duration
from cardcage_egress.net import Egress
from cardcage_net.framing import BACKLOG
from cardcage_net.halfclosed import damages
from cardcage_net.null import Null, open_null
from cardcage_net.sockets import Dgram, Stream, open_dgram, open_stream
from cardcage_net.switch import ADDRESSES, WAITING, Port, SwitchPort, open_switch
from cardcage_net.tap import Tap
from cardcage_net.user import User, UserNet, open_user
from net_lab import Guest, Slot, frame, outside_world
from test_net_halfclosed import ones

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = (Path(__file__).parents[2] / "docs" / "networks.md").read_text()
OPTIONS = {
    "egress": Egress,
    "user": User,
    "tap": Tap,
    "switch": SwitchPort,
    "stream": Stream,
    "dgram": Dgram,
    "null": Null,
}
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces and tap interfaces need root")
needs_passt = pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


@pytest.fixture
def slot(stack: ExitStack) -> Slot:
    return stack.enter_context(closing(Slot()))


def written(value: Any) -> str | None:
    """A default as the table has it."""
    if value is None or value == 0 or value == [] or value == "":
        return None
    if isinstance(value, Duration):
        return f"{value:g}s"
    return str(value).lower() if isinstance(value, bool) else str(value)


def test_the_table_has_each_type_and_key() -> None:
    """The table's types, keys and defaults are those of the options; `dump` is said of all of them."""
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", PAGE, re.MULTILINE))
    assert sorted(rows) == sorted(OPTIONS)
    assert set(OPTIONS) == {name.partition(":")[2] for name in Host().registry.names(BackendOffer) if "net:" in name}
    for kind, row in rows.items():
        told = {}
        for names, default in re.findall(r"`([\w ]+)`(?: \(`([^`]+)`\))?", row):
            told.update(dict.fromkeys(names.split()))
            told[names.split()[-1]] = default or None
        made = OPTIONS[kind]("x") if kind == "dgram" else OPTIONS[kind]()
        assert told == {
            one.name: None if getattr(made, one.name) == "x" else written(getattr(made, one.name))
            for one in attrs.fields(OPTIONS[kind])
            if one.name != "dump"
        }, kind
        assert "dump" in attrs.fields_dict(OPTIONS[kind])


@needs_root
@needs_passt
@pytest.mark.parametrize("kind", ["null", "switch", "stream", "dgram", "user"])
def test_each_type_dumps(stack: ExitStack, slot: Slot, tmp_path: Path, kind: str) -> None:
    """A frame that the guest sends is in the dump, whatever it goes to (a tap's is looked at where it is tested)."""
    dump = str(tmp_path / "n.pcap")
    open_it = {
        "null": lambda: open_null(slot, Null(dump=dump)),
        "switch": lambda: open_switch(slot, SwitchPort(dump=dump)),
        "stream": lambda: open_stream(slot, Stream(listen=f"unix:{tmp_path}/s", dump=dump)),
        "dgram": lambda: open_dgram(slot, Dgram(f"unix:{tmp_path}/a", f"unix:{tmp_path}/b", dump=dump)),
        "user": lambda: open_user(slot, User(dump=dump)),
    }[kind]
    guest = Guest(slot, stack.enter_context(closing(outside_world())).run(open_it))
    guest.send(frame(7))
    guest.close()
    assert frame(7) in Path(dump).read_bytes()


@needs_root
@needs_passt
@pytest.mark.parametrize(("address", "open_to_all"), [("", True), ("127.0.0.1", False)])
def test_a_forward_without_an_address_is_open_to_all(
    stack: ExitStack, slot: Slot, address: str, open_to_all: bool
) -> None:
    """A port is listened at on all of the host's addresses, or on the one that hostfwd names."""
    outside = stack.enter_context(closing(outside_world()))
    backend = outside.run(lambda: UserNet(slot, User(hostfwd=[f"tcp:{address}:2222-:22"])))
    stack.callback(backend.close)
    outside.run(lambda: socket.create_connection(("127.0.0.1", 2222), 20)).close()
    if open_to_all:
        outside.run(lambda: socket.create_connection(("192.0.2.2", 2222), 20)).close()
    else:
        with pytest.raises(ConnectionRefusedError):
            outside.run(lambda: socket.create_connection(("192.0.2.2", 2222), 20))


def solicitation() -> bytes:
    """An ICMPv6 router solicitation."""
    own, all_routers = socket.inet_pton(socket.AF_INET6, "fe80::2"), socket.inet_pton(socket.AF_INET6, "ff02::2")
    body = struct.pack(">BBHI", 133, 0, 0, 0)
    words = struct.unpack(">22H", own + all_routers + struct.pack(">II", len(body), 58) + body[:4])
    total = sum(words)
    total = (total & 0xFFFF) + (total >> 16)
    body = body[:2] + struct.pack(">H", 0xFFFF ^ ((total & 0xFFFF) + (total >> 16))) + body[4:]
    head = struct.pack(">IHBB", 6 << 28, len(body), 58, 255) + own + all_routers
    return b"\x33\x33\0\0\0\2" + b"\x02\0\0\0\0\1" + b"\x86\xdd" + head + body


def asks_for_gateway() -> bytes:
    """An ARP request."""
    mac = b"\x02\0\0\0\0\1"
    body = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1) + mac + socket.inet_aton("10.0.2.15") + bytes(6)
    return b"\xff" * 6 + mac + b"\x08\x06" + body + socket.inet_aton("10.0.2.2") + bytes(18)


@needs_root
@needs_passt
@pytest.mark.parametrize("ipv6", [True, False])
def test_ipv6_is_offered_where_the_host_has_it(stack: ExitStack, slot: Slot, ipv6: bool) -> None:
    """A guest that asks for a router is told the host's network, or nothing with `ipv6 = false`."""
    outside = stack.enter_context(closing(outside_world()))
    outside.shell("ip addr add 2001:db8::2/64 dev out0 nodad", "ip -6 route add default via 2001:db8::1")
    backend = outside.run(lambda: UserNet(slot, User(ipv6=ipv6)))
    guest = stack.enter_context(closing(Guest(slot, backend)))

    def advertised(one: bytes) -> bool:
        return one[12:14] == b"\x86\xdd" and one[20] == 58 and one[54] == 134

    guest.send(solicitation())
    if ipv6:
        assert socket.inet_pton(socket.AF_INET6, "2001:db8::")[:8] in guest.expect(advertised)
    else:
        for count in (1, 2):  # answered in their order
            guest.send(asks_for_gateway())
            guest.count(count)
        assert not any(map(advertised, guest.frames))


@needs_root
@needs_passt
def test_a_forwarded_connection_is_complete(stack: ExitStack, slot: Slot) -> None:
    """A guest that accepts is told so at once, or by Debian 12's passt with the caller's first data."""
    outside = stack.enter_context(closing(outside_world()))
    backend = outside.run(lambda: UserNet(slot, User(hostfwd=["tcp:127.0.0.1:2222-:22"])))
    guest = stack.enter_context(closing(Guest(slot, backend)))

    def flags(one: bytes) -> int:
        return one[47] if one[12:14] == b"\x08\0" and one[23] == 6 else 0

    def round_trip() -> None:
        before = len(guest.frames)
        guest.send(asks_for_gateway())
        guest.count(before + 1)

    round_trip()  # only now does passt know the guest's address
    caller = stack.enter_context(outside.run(lambda: socket.create_connection(("127.0.0.1", 2222), 20)))
    asked = guest.expect(lambda one: flags(one) == 2)
    wanted = struct.pack(">I", int.from_bytes(asked[38:42], "big") + 1 & 0xFFFFFFFF)
    body = asked[36:38] + asked[34:36] + bytes(4) + wanted + struct.pack(">BBHHH", 5 << 4, 0x12, 0xFFFF, 0, 0)
    addresses = asked[30:34] + asked[26:30]
    body = body[:16] + struct.pack(">H", 0xFFFF ^ ones(addresses + struct.pack(">HH", 6, 20) + body)) + body[18:]
    head = struct.pack(">BBHHHBBH", 0x45, 0, 40, 0, 0x4000, 64, 6, 0)
    head = head[:10] + struct.pack(">H", 0xFFFF ^ ones(head + addresses)) + addresses
    guest.send(asked[6:12] + b"\x02\0\0\0\0\1" + asked[12:14] + head + body)
    round_trip()
    round_trip()  # what the first overtook is here with the second
    complete = any(flags(one) & 0x12 == 0x10 for one in guest.frames)
    assert complete or damages("passt")
    caller.sendall(b"first")
    guest.expect(lambda one: flags(one) & 0x12 == 0x10 and one.endswith(b"first"))


@pytest.mark.parametrize("user", [0, 65534])
@needs_root
@needs_passt
def test_the_room_of_sockets_is_said(user: int) -> None:
    """Root has sockets of 4 MiB; a user what `net.core.wmem_max` allows, and a line of doctor where that is less."""
    code = (
        "import os, socket; from cardcage_net.framing import enlarge; from cardcage_net.user import check_passt\n"
        f"one, other = socket.socketpair(); os.setuid({user}); enlarge(one)\n"
        "print(one.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2, check_passt()[1:])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    most = int(Path("/proc/sys/net/core/wmem_max").read_text())
    room = int(done.split()[0])
    assert room == (BACKLOG if user == 0 else min(most, BACKLOG))
    assert ("slow towards the guest" in done) == (room < BACKLOG)
    assert f"sysctl -w net.core.wmem_max={BACKLOG}" in PAGE
    assert (f"sysctl -w net.core.wmem_max={BACKLOG}" in done) == (room < BACKLOG)


@needs_root
@pytest.mark.parametrize("mode", ["666", "600"])
def test_a_user_has_a_tap_that_root_made(stack: ExitStack, tmp_path: Path, mode: str) -> None:
    """After the page's two commands a user without any privilege reaches the host, where `/dev/net/tun` opens."""
    outside = stack.enter_context(closing(outside_world()))
    commands = re.findall(r"`(ip [^`]* tap0 [^`]*)`", PAGE)
    assert len(commands) == 2
    outside.shell(
        "ip link add br0 type bridge forward_delay 0", "ip addr add 10.0.2.2/24 dev br0", "ip link set br0 up"
    )
    outside.shell(*(one.replace("NAME", "nobody") for one in commands))
    code = (
        "import os; from net_lab import Guest, Slot; from cardcage_net.tap import Tap, TapNet\n"
        "from test_net_docs import asks_for_gateway\n"
        "slot = Slot(); os.setuid(65534)\n"
        "try: net = TapNet(slot, Tap('tap0', bridge='br0', vnet_header=False))\n"
        "except Exception as error: slot.close(); raise SystemExit(str(error))\n"
        "guest = Guest(slot, net)\n"
        "def answers(): return [one for one in guest.frames if one[12:14] == b'\\x08\\6' and one[20:22] == b'\\0\\2']\n"
        "while not answers(): guest.send(asks_for_gateway())  # the bridge learns late that the port is up\n"
        "print(answers()[0][28:32].hex())\n"
        "guest.close(); slot.close()"
    )
    node = tmp_path / "tun"
    os.mknod(node, 0o600 | stat.S_IFCHR, os.makedev(10, 200))
    prepare = f'mount -t sysfs sysfs /sys && chmod {mode} {node} && mount --bind {node} /dev/net/tun && exec "$@"'
    words = ["unshare", "-m", "sh", "-c", prepare, "sh", sys.executable, "-c", code]
    process = outside.popen(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parent)
    output, errors = process.communicate()
    if mode == "666":
        assert output == "0a000202\n", errors
    else:
        assert errors == "tap: /dev/net/tun: Permission denied: sudo chmod 666 /dev/net/tun, or use net user\n"


@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="qemu is not installed")
def test_qemu_joins_a_switch(stack: ExitStack, slot: Slot, tmp_path: Path) -> None:
    """The page's `-netdev` joins QEMU to a switch that listens: its iPXE asks a machine of ours for an address."""
    path = tmp_path / "lan.sock"
    guest = Guest(slot, open_switch(slot, SwitchPort(listen=str(path))))
    stack.callback(guest.close)
    found = re.search(r"`-netdev ([^`]*)/run/lan\.sock`", PAGE)
    assert found is not None
    words = ["qemu-system-x86_64", "-accel", "tcg", "-m", "64", "-display", "none", "-nodefaults", "-boot", "n"]
    words += ["-netdev", f"{found[1]}{path}", "-device", "virtio-net-pci,netdev=n,mac=52:54:00:aa:bb:cc,bootindex=0"]
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL)
    stack.callback(process.wait)
    stack.callback(process.kill)
    asked = guest.expect(lambda one: one[12:14] == b"\x08\0" and one[36:38] == b"\0C", 60)
    assert asked[6:12] == bytes.fromhex("525400aabbcc")


def test_a_stream_listens_for_one_peer_at_a_time(stack: ExitStack, slot: Slot, tmp_path: Path) -> None:
    """A second caller waits, and is served once the first has gone."""
    server = Guest(slot, open_stream(slot, Stream(listen=f"unix:{tmp_path}/s")))
    stack.callback(server.close)
    callers = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(2)]
    for number, one in enumerate(callers):
        one.connect(str(tmp_path / "s"))
        one.sendall(struct.pack(">I", 64) + frame(number))
    server.count(1)
    server.send(frame(8))
    assert callers[0].recv(4 + 64, socket.MSG_WAITALL)[4:] == frame(8)
    assert server.frames == [frame(0)]
    callers[0].close()
    assert server.count(2) == [frame(0), frame(1)]


def test_frames_for_a_slow_port_are_dropped() -> None:
    """Beyond what the page says to wait, frames are dropped; the others come once the port takes them."""
    assert f"at most {ADDRESSES} a port" in PAGE
    assert f"dropped beyond {WAITING}" in PAGE
    later: list[Any] = []
    taken: list[bytes] = []

    def take(one: bytes) -> bool:
        taken.append(one)
        return True

    port = Port(later.append, take)
    for number in range(WAITING + 5):
        port.put(frame(number))
    assert port.dropped == 5
    while later:
        later.pop(0)()
    assert taken == [frame(number) for number in range(WAITING)]
