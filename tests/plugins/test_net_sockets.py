"""Switches and sockets: frames arrive whole and in order, hostile and dying peers do no harm."""

from __future__ import annotations

import random
import shutil
import socket
import struct
import subprocess
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

import pytest
from cardcage.errors import ConfigError, HostError
from cardcage.host import Host
from cardcage.units import Duration
from cardcage_net.null import Null, open_null
from cardcage_net.sockets import Dgram, Stream, address, open_dgram, open_stream
from cardcage_net.switch import ADDRESSES, Port, Switch, SwitchPort, open_switch
from net_lab import Guest, Slot, frame

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def slot() -> Iterator[Slot]:
    with closing(Slot()) as made:
        yield made


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def guest(stack: ExitStack, slot: Slot, backend: Any) -> Guest:
    return stack.enter_context(closing(Guest(slot, backend)))


def pair(stack: ExitStack, slot: Slot, kind: str, folder: Path) -> tuple[Guest, Guest]:
    """Two joined back ends."""
    unix = f"unix:{folder}"
    if kind == "switch":
        options = SwitchPort()
        return guest(stack, slot, open_switch(slot, options)), guest(stack, slot, open_switch(slot, options))
    if kind.startswith("stream"):
        where = f"{unix}/s" if kind == "stream-unix" else "127.0.0.1:45671"
        server = guest(stack, slot, open_stream(slot, Stream(listen=where)))
        return server, guest(stack, slot, open_stream(slot, Stream(connect=where)))
    ends = {
        "dgram-unix": (Dgram(f"{unix}/b", f"{unix}/a"), Dgram(f"{unix}/a", f"{unix}/b")),
        "dgram-udp": (Dgram("127.0.0.1:45672", "127.0.0.1:45673"), Dgram("127.0.0.1:45673", "127.0.0.1:45672")),
        "dgram-group": (Dgram("239.1.2.3:45674", "127.0.0.1:0"), Dgram("239.1.2.3:45674", "127.0.0.1:0")),
    }[kind]
    first, second = (guest(stack, slot, open_dgram(slot, one)) for one in ends)
    return first, second


KINDS = ["switch", "stream-unix", "stream-tcp", "dgram-unix", "dgram-udp", "dgram-group"]


@pytest.mark.parametrize("kind", KINDS)
def test_frames_both_ways(slot: Slot, stack: ExitStack, tmp_path: Path, kind: str) -> None:
    """Frames of all sizes cross in order, given in any number of parts."""
    left, right = pair(stack, slot, kind, tmp_path)
    right.send(frame(1))
    left.expect(lambda one: one == frame(1))  # now both are there
    choose = random.Random(kind)
    sent = [frame(number, choose.choice([14, 60, 1514, 9000])) for number in range(60)]
    for number, one in enumerate(sent):
        right.count(number - 10)  # more than a few on their way would be for datagrams to lose
        cut = choose.randrange(len(one))
        left.send(one[:cut], one[cut:])
    assert right.count(60)[:60] == sent
    right.send(frame(2))
    left.expect(lambda one: one == frame(2))


@pytest.mark.parametrize("kind", KINDS)
def test_guest_without_buffers(slot: Slot, stack: ExitStack, tmp_path: Path, kind: str) -> None:
    """Frames wait while the guest has no buffers, and come in order once it has, none twice."""
    left, right = pair(stack, slot, kind, tmp_path)
    right.send(frame(1000))
    left.expect(lambda one: one == frame(1000))
    right.room = 3
    for number in range(40):
        left.send(frame(number, 1000))
    right.count(3)
    right.give_room(10)
    right.count(10)
    right.give_room(1000)
    assert right.count(40) == [frame(number, 1000) for number in range(40)]


def raw_peer(stack: ExitStack, path: Path) -> socket.socket:
    peer = stack.enter_context(socket.socket(socket.AF_UNIX))
    peer.settimeout(20)
    peer.connect(str(path))
    return peer


def cut_off(peer: socket.socket) -> bool:
    try:
        return peer.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("length", [0, 13, 65551, 1 << 31])
def test_stream_refuses_bad_lengths(slot: Slot, stack: ExitStack, tmp_path: Path, length: int) -> None:
    """A peer that announces a frame of impossible length is cut off, and the next one is served."""
    server = guest(stack, slot, open_stream(slot, Stream(listen=f"unix:{tmp_path}/s")))
    peer = raw_peer(stack, tmp_path / "s")
    peer.sendall(struct.pack(">I", 64) + frame(1) + struct.pack(">I", length) + b"x" * 100)
    server.expect(lambda one: one == frame(1))
    assert cut_off(peer)
    again = raw_peer(stack, tmp_path / "s")
    again.sendall(struct.pack(">I", 64) + frame(2))
    server.expect(lambda one: one == frame(2))
    assert len(server.frames) == 2


def test_stream_in_small_pieces(slot: Slot, stack: ExitStack, tmp_path: Path) -> None:
    """A frame that arrives byte by byte is one frame."""
    server = guest(stack, slot, open_stream(slot, Stream(listen=f"unix:{tmp_path}/s")))
    peer = raw_peer(stack, tmp_path / "s")
    for byte in struct.pack(">I", 64) + frame(1) + struct.pack(">I", 70) + frame(2, 70):
        peer.sendall(bytes([byte]))
    server.count(2)
    assert server.frames == [frame(1), frame(2, 70)]


def test_stream_peer_that_does_not_read(slot: Slot, stack: ExitStack, tmp_path: Path) -> None:
    """A peer that reads late gets whole frames; what was too much in between is dropped, and nothing blocks."""
    server = guest(stack, slot, open_stream(slot, Stream(listen=f"unix:{tmp_path}/s")))
    peer = raw_peer(stack, tmp_path / "s")
    peer.sendall(struct.pack(">I", 64) + frame(1))
    server.count(1)
    for number in range(30000):
        server.send(frame(number, 1400))
    seen = []
    with peer.makefile("rb") as file:
        while True:
            (length,) = struct.unpack(">I", file.read(4))
            data = file.read(length)
            assert data[18:] == b"\x5a" * (length - 18)
            if length == 99:
                break
            seen.append(int.from_bytes(data[14:18], "big"))
            if len(seen) % 300 == 0:
                server.send(frame(0, 99))
    assert seen == sorted(seen)
    assert 300 < len(seen) < 30000


def test_stream_reconnects(slot: Slot, stack: ExitStack, tmp_path: Path) -> None:
    """A client whose peer went away connects again once there is one; before that its frames are dropped."""
    where = f"unix:{tmp_path}/s"
    client = guest(stack, slot, open_stream(slot, Stream(connect=where, reconnect=Duration("1ms"))))
    client.send(frame(0))
    for number in (1, 2):
        server = Guest(slot, open_stream(slot, Stream(listen=where)))
        while not server.frames:
            client.send(frame(number))
            with slot.lock:
                pass
        assert server.frames[0] == frame(number)
        server.close()


def test_stream_without_anybody(slot: Slot, tmp_path: Path) -> None:
    """A client that is not to try again says that nobody is there; wrong options are named."""
    with pytest.raises(HostError, match="No such file"):
        open_stream(slot, Stream(connect=f"unix:{tmp_path}/s", reconnect=Duration(0)))
    with pytest.raises(ConfigError, match="either connect or listen"):
        open_stream(slot, Stream())
    with pytest.raises(ConfigError, match="unix:PATH or HOST:PORT"):
        address("nothing")
    with pytest.raises(ConfigError, match="107"):
        address("unix:" + "x" * 200)
    with pytest.raises(HostError, match="cannot listen"):
        open_stream(slot, Stream(listen=f"unix:{tmp_path}/none/s"))


def test_an_address_that_is_taken_is_said(slot: Slot, stack: ExitStack) -> None:
    """The address is named as it was written, and that somebody else has it."""
    stream = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    where = f"127.0.0.1:{stream.getsockname()[1]}"
    with pytest.raises(HostError) as caught:
        open_stream(slot, Stream(listen=where))
    assert str(caught.value) == f"net stream: cannot listen at {where}: another program or machine has it"
    datagrams = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    datagrams.bind(("127.0.0.1", 0))
    where = f"127.0.0.1:{datagrams.getsockname()[1]}"
    with pytest.raises(HostError) as caught:
        open_dgram(slot, Dgram("127.0.0.1:9", local=where))
    assert str(caught.value) == f"net dgram: {where}: another program or machine has it"


def test_listening_twice(slot: Slot, stack: ExitStack, tmp_path: Path) -> None:
    """A path where somebody listens is refused; a socket left behind by the dead is taken over, a file is not."""
    where = f"unix:{tmp_path}/s"
    guest(stack, slot, open_stream(slot, Stream(listen=where)))
    with pytest.raises(HostError, match="another process listens"):
        open_stream(slot, Stream(listen=where))
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead"))
    guest(stack, slot, open_stream(slot, Stream(listen=f"unix:{tmp_path}/dead")))
    assert (tmp_path / "dead").stat().st_mode & 0o777 == 0o600
    (tmp_path / "file").write_text("precious")
    with pytest.raises(HostError):
        open_stream(slot, Stream(listen=f"unix:{tmp_path}/file"))
    assert (tmp_path / "file").read_text() == "precious"


def test_dgram_takes_only_its_peer(slot: Slot, stack: ExitStack) -> None:
    """Datagrams of strangers, and such as are no frames, are not delivered."""
    one = guest(stack, slot, open_dgram(slot, Dgram("127.0.0.1:45675", "127.0.0.1:45676")))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer, socket.socket(type=socket.SOCK_DGRAM) as stranger:
        peer.bind(("127.0.0.1", 45675))
        stranger.sendto(frame(9), ("127.0.0.1", 45676))
        peer.sendto(b"short", ("127.0.0.1", 45676))
        peer.sendto(frame(1), ("127.0.0.1", 45676))
        one.count(1)
        one.send(frame(2), b"")
        assert peer.recv(2000) == frame(2)
    assert one.frames == [frame(1)]
    one.send(b"x" * 65550)
    with pytest.raises(ConfigError, match="local is missing"):
        open_dgram(slot, Dgram("127.0.0.1:45675"))


def mac(number: int) -> bytes:
    return b"\x02\0" + number.to_bytes(4, "big")


def test_switch_learns(stack: ExitStack) -> None:
    """Between machines of one process, on loops of their own, frames go only where their address lives."""
    host = Host(installed=False)
    slots = [stack.enter_context(closing(Slot(host))) for _ in range(3)]
    guests = [guest(stack, one, open_switch(one, SwitchPort("lan"))) for one in slots]
    other = guest(stack, slots[0], open_switch(slots[0], SwitchPort("elsewhere")))
    guests[1].send(frame(1, by=mac(1)))
    for one in (guests[0], guests[2]):
        one.count(1)
    guests[0].send(frame(2, to=mac(1), by=mac(0)))
    guests[2].send(frame(3, to=mac(0), by=mac(2)))
    guests[2].send(frame(4, to=mac(1), by=mac(2)))
    guests[1].count(2)
    guests[0].count(2)
    guests[1].send(frame(5, by=mac(1)))
    guests[2].count(2)
    guests[0].count(3)
    assert [int.from_bytes(one[14:18], "big") for one in guests[0].frames] == [1, 3, 5]
    assert [int.from_bytes(one[14:18], "big") for one in guests[1].frames] == [2, 4]
    assert [int.from_bytes(one[14:18], "big") for one in guests[2].frames] == [1, 5]
    assert not other.frames


def test_switch_table_is_bounded() -> None:
    """A port that invents addresses forgets its own; others keep theirs, and a moved address is followed."""
    switch, seen = Switch(), {number: [] for number in range(3)}
    ports = [Port(lambda act: act(), lambda data, at=at: seen[at].append(data) or True) for at in range(3)]
    for port in ports:
        switch.plug(port)
    switch.forward(ports[1], frame(0, by=mac(1)))
    for number in range(5000):
        switch.forward(ports[2], frame(0, to=mac(1), by=mac(1000 + number)))
    assert len(ports[2].learnt) == ADDRESSES
    assert len(switch._table) == ADDRESSES + 1
    seen[0].clear()
    switch.forward(ports[2], frame(7, to=mac(1), by=mac(2)))
    assert not seen[0]
    switch.forward(ports[0], frame(0, by=mac(1)))
    switch.forward(ports[2], frame(8, to=mac(1), by=mac(2)))
    assert seen[0][-1] == frame(8, to=mac(1), by=mac(2))
    switch.forward(ports[0], frame(0, by=b"\xff" * 6))
    switch.forward(ports[0], b"short")
    assert b"\xff" * 6 not in switch._table
    switch.unplug(ports[2])
    assert len(switch._table) == 1


def test_switch_between_processes(stack: ExitStack, tmp_path: Path) -> None:
    """Machines of other processes join by the switch's socket; it is gone with its last machine."""
    here, there = (stack.enter_context(closing(Slot())) for _ in range(2))
    path = tmp_path / "lan"
    left = Guest(here, open_switch(here, SwitchPort("lan", listen=str(path))))
    client = Stream(connect=f"unix:{path}", reconnect=Duration(0))
    others = [guest(stack, there, open_stream(there, client)) for _ in range(2)]
    others[0].send(frame(1, by=mac(1)))
    left.count(1)
    others[1].count(1)
    left.send(frame(2, to=mac(1), by=mac(0)))
    others[0].count(1)
    left.send(frame(3, by=mac(0)))
    others[1].count(2)
    assert [int.from_bytes(one[14:18], "big") for one in others[1].frames] == [1, 3]
    hostile = raw_peer(stack, path)
    hostile.sendall(b"\xff" * 8)
    assert cut_off(hostile)
    others[1].send(frame(4, to=mac(0), by=mac(2)))
    left.count(2)
    left.close()
    assert not path.exists()


def test_null_drops(slot: Slot, stack: ExitStack, tmp_path: Path) -> None:
    """The null network takes frames and gives none; its dump holds what the guest sent."""
    dump = tmp_path / "n.pcap"
    one = guest(stack, slot, open_null(slot, Null(dump=str(dump))))
    one.send(frame(1)[:20], frame(1)[20:])
    assert dump.read_bytes()[40:] == frame(1)
    with pytest.raises(ConfigError, match="dump"):
        open_null(slot, Null(dump=str(tmp_path / "no" / "n.pcap")))


def test_dump_is_read_by_tshark(slot: Slot, stack: ExitStack, tmp_path: Path) -> None:
    """tshark reads a dump: both directions, in order, with the right lengths."""
    if shutil.which("tshark") is None:
        pytest.skip("tshark is not installed")
    dump = tmp_path / "s.pcap"
    left = guest(stack, slot, open_switch(slot, SwitchPort("d", dump=str(dump))))
    right = guest(stack, slot, open_switch(slot, SwitchPort("d")))
    left.send(frame(1, 100))
    right.count(1)
    right.send(frame(2, 200))
    left.count(1)
    left.close()
    words = ["tshark", "-r", str(dump), "-T", "fields", "-e", "frame.len", "-e", "eth.type", "-e", "frame.protocols"]
    lines = subprocess.run(words, check=True, capture_output=True, text=True).stdout.split("\n")
    assert [line.split("\t")[:2] for line in lines if line] == [["100", "0x88b5"], ["200", "0x88b5"]]


def test_a_switch_whose_port_cannot_be_made_leaves_no_socket(slot: Slot, tmp_path: Path) -> None:
    """What fails beside `listen` leaves nobody listening, and the path free for the next."""
    path = tmp_path / "lan"
    with pytest.raises(ConfigError, match="dump cannot be written"):
        open_switch(slot, SwitchPort("lan", listen=str(path), dump=str(tmp_path / "none" / "x.pcap")))
    assert not path.exists()
    (tmp_path / "lan").write_text("a file")
    with pytest.raises(HostError, match="cannot listen"):
        open_switch(slot, SwitchPort("lan", listen=str(path)))
    path.unlink()
    open_switch(slot, SwitchPort("lan", listen=str(path))).close()


def test_a_listener_that_lets_nobody_in_is_alive(slot: Slot, tmp_path: Path) -> None:
    """A socket whose queue is full belongs to somebody: it is refused at once, and not waited for."""
    path = f"{tmp_path}/full"
    with socket.socket(socket.AF_UNIX) as listener, ExitStack() as waiting:
        listener.bind(path)
        listener.listen(0)
        while True:
            one = waiting.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
            if one.connect_ex(path):
                break
        with pytest.raises(HostError, match="another process listens there"):
            open_stream(slot, Stream(listen=f"unix:{path}"))


@pytest.mark.parametrize("text", ["a..b:1", f"{'x' * 70}.example:1", f"127.0.0.1:{'9' * 5000}"])
def test_hosts_that_cannot_be_are_refused(text: str) -> None:
    """What is no name or port at all is a mistake in the configuration."""
    with pytest.raises(ConfigError, match=r"name of a host|expected unix:PATH"):
        address(text)
