"""The network device against a back end that records."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from cardcage.backends import NetFeatures
from cardcage_virtio.devices.net import Net, NetOptions
from cardcage_virtio.testing import Bench
from hypothesis import given, settings
from hypothesis import strategies as st

OFFLOADS = frozenset({"csum", "tso4", "tso6", "ecn"})
EVERYTHING = (1 << 64) - 1


class Wire:
    """A network back end whose frames the test sees."""

    def __init__(self, **features: Any) -> None:
        self.features = NetFeatures(**features)
        self.sent: list[tuple[int, bytes]] = []
        self.resumed: list[int] = []
        self.agreed: tuple[frozenset[str], int] | None = None

    def start(self, received: Any) -> None:
        self.received = received

    def send(self, queue: int, parts: Any) -> None:
        self.sent.append((queue, b"".join(parts)))

    def resume(self, queue: int) -> None:
        self.resumed.append(queue)

    def set_offloads(self, offloads: frozenset[str], vnet_header: int) -> None:
        self.agreed = offloads, vnet_header

    def close(self) -> None: ...


def make(wire: Wire | None = None, form: dict[str, Any] | None = None, **options: Any) -> tuple[Bench, Wire]:
    wire = wire or Wire()
    return Bench(Net(NetOptions(net="x", **options)), backends={"net": wire}, **(form or {})), wire


HEADER = bytes(12)
FRAME = bytes(range(60))


@pytest.mark.parametrize("cut", [12, 5, 40, 72])
def test_frames_go_out_without_their_header(cut: int) -> None:
    """However the driver cuts the buffer, the back end gets exactly the frame."""
    bench, wire = make()
    blob = HEADER + FRAME
    bench.driver(1).add([part for part in (blob[:cut], blob[cut:]) if part])
    bench.kick(1)
    bench.slot.loop.poll()
    assert wire.sent == [(0, FRAME)]
    assert len(bench.driver(1).used()) == 1
    bench.close()


def test_a_back_end_with_vnet_header_gets_it() -> None:
    """Where the back end takes offloads, the header goes with the frame both ways and the features are offered."""
    bench, wire = make(Wire(vnet_header=12, offloads=OFFLOADS))
    assert wire.agreed == (OFFLOADS, 12)
    assert bench.virtio.features >> 11 & 1
    header = struct.pack("<BBHHHHH", 1, 1, 54, 1448, 34, 16, 0)
    bench.driver(1).add([header, FRAME * 100])
    bench.kick(1)
    bench.slot.loop.poll()
    assert wire.sent == [(0, header + FRAME * 100)]
    bench.driver(0).add([], [70000])
    assert wire.received(0, header + FRAME * 1000)
    ((_, data),) = bench.driver(0).used()
    assert data == header[:10] + b"\1\0" + FRAME * 1000
    bench.close()


def test_frames_come_in_with_a_header() -> None:
    """A received frame lands behind a header that says one buffer."""
    bench, wire = make()
    bench.driver(0).add([], [1526])
    assert wire.received(0, FRAME)
    assert [data for _, data in bench.driver(0).used()] == [bytes(10) + b"\1\0" + FRAME]
    assert bench.interrupts == [0]
    bench.close()


@pytest.mark.parametrize("packed", [False, True])
def test_a_large_frame_is_spread_over_merged_buffers(packed: bool) -> None:
    """With mergeable buffers a frame takes as many as it needs, and the first says how many."""
    bench, wire = make(form={"packed": packed})
    for _ in range(6):
        bench.driver(0).add([], [20, 20])
    assert wire.received(0, FRAME + FRAME)
    found = bench.driver(0).used()
    assert len(found) == 4
    assert b"".join(data for _, data in found) == bytes(10) + b"\4\0" + FRAME + FRAME
    assert not wire.received(0, FRAME + FRAME)
    for _ in range(2):
        bench.driver(0).add([], [20, 20])
    bench.kick(0)
    assert 0 in wire.resumed
    assert wire.received(0, FRAME + FRAME)
    assert b"".join(data for _, data in bench.driver(0).used())[12:] == FRAME + FRAME
    bench.close()


def test_a_starved_queue_asks_to_wait() -> None:
    """Without buffers the back end is told to wait, and to go on once there are some."""
    bench, wire = make()
    wire.resumed.clear()
    assert not wire.received(0, FRAME)
    assert bench.driver(0).wants_kick() or True
    bench.driver(0).add([], [100])
    bench.kick(0)
    assert wire.resumed == [0]
    assert wire.received(0, FRAME)
    bench.close()


def test_a_frame_too_large_for_unmerged_buffers_is_lost() -> None:
    """Without mergeable buffers an oversized frame costs its buffer, nothing else."""
    bench, wire = make(form={"features": EVERYTHING & ~(1 << 15)})
    bench.driver(0).add([], [40])
    assert wire.received(0, FRAME)
    assert [data for _, data in bench.driver(0).used()] == [b""]
    bench.close()


def test_runts_and_giants_are_dropped() -> None:
    """Frames that no Ethernet has are dropped, their buffers given back."""
    bench, wire = make()
    for size in (0, 5, 12, 13, 25, 66000):
        bench.driver(1).add([bytes(size)] if size else [b""])
    bench.kick(1)
    bench.slot.loop.poll()
    assert wire.sent == []
    assert len(bench.driver(1).used()) == 6
    bench.close()


def test_a_stream_of_frames_is_gathered() -> None:
    """Frames that follow at once are sent together by the loop thread, with one interrupt; none is lost by a reset."""
    bench, wire = make(form={"size": 64})
    for _ in range(20):
        bench.driver(1).add([HEADER, FRAME])
        bench.kick(1)
    bench.slot.loop.poll()
    assert len(wire.sent) == 20
    assert bench.interrupts.count(1) <= 2
    for _ in range(2):
        bench.driver(1).add([HEADER, FRAME])
        bench.kick(1)
    bench.start()
    wire.sent.clear()
    for _ in range(2):
        bench.driver(1).add([HEADER, FRAME])
        bench.kick(1)
    bench.slot.loop.poll()
    assert len(wire.sent) == 2
    bench.close()


def test_a_pause_holds_frames() -> None:
    """A frame that comes while the machine is paused is not lost: the back end is told to wait, and to go on."""
    bench, wire = make()
    bench.driver(0).add([], [100])
    bench.virtio.pause()
    assert not wire.received(0, FRAME)
    wire.resumed.clear()
    bench.virtio.resume()
    assert wire.resumed == [0]
    assert wire.received(0, FRAME)
    bench.close()


def control(bench: Bench, group: int, command: int, data: bytes) -> bytes:
    return bench.call([bytes((group, command)), data], [1], queue=2 * bench.device.options.queues)


def test_control_queue() -> None:
    """MAC, queue pairs, offloads and announcements are set by command; what cannot be is refused."""
    bench, wire = make(Wire(vnet_header=12, offloads=OFFLOADS), queues=2)
    assert control(bench, 1, 1, b"\x02abcde") == b"\0"
    assert bench.device.config()[:6] == b"\x02abcde"
    assert control(bench, 4, 0, b"\2\0") == b"\0"
    bench.driver(2).add([], [100])
    assert wire.received(1, HEADER + FRAME)
    assert len(bench.driver(2).used()) == 1
    assert control(bench, 4, 0, b"\3\0") == b"\1"
    assert control(bench, 5, 0, struct.pack("<Q", 2)) == b"\0"
    assert wire.agreed == (frozenset({"csum"}), 12)
    assert control(bench, 5, 0, struct.pack("<Q", 1 << 40)) == b"\1"
    assert control(bench, 99, 0, b"") == b"\1"
    bench.close()


def test_link_status() -> None:
    """Pulling the cable tells the guest, and no frame passes until it is back."""
    bench, wire = make()
    bench.device.set_link(False)
    assert bench.config_interrupts == 1
    assert bench.device.config()[6] == 0
    bench.driver(1).add([HEADER + FRAME])
    bench.driver(0).add([], [100])
    bench.kick(1)
    bench.slot.loop.poll()
    assert wire.sent == []
    assert wire.received(0, FRAME)
    bench.device.set_link(True)
    assert wire.received(0, FRAME)
    assert len(bench.driver(0).used()) == 1
    bench.close()


def test_default_addresses_are_stable_and_local() -> None:
    """Without a MAC the device makes one of QEMU's range, the same each time."""
    bench, _ = make()
    other, _ = make()
    assert bench.device.mac == other.device.mac
    assert bench.device.mac[:3] == b"\x52\x54\x00"
    bench.close()
    other.close()


OPERATION = st.tuples(st.sampled_from(["rx", "tx", "ctrl", "frame"]), st.binary(max_size=90), st.integers(1, 90))


@given(st.lists(OPERATION, max_size=30), st.booleans(), st.booleans())
@settings(deadline=None)
def test_random_traffic_never_hurts(operations: list[tuple[str, bytes, int]], packed: bool, vnet: bool) -> None:
    """Any mix of buffers, frames and commands is served, dropped or refused; a reset brings the device back."""
    bench, wire = make(Wire(vnet_header=12 * vnet, offloads=OFFLOADS), form={"packed": packed, "size": 32})
    for kind, data, size in operations:
        if kind == "frame":
            wire.received(size, (HEADER if vnet else b"") + data.ljust(14, b"\0"))
            continue
        queue = {"rx": 0, "tx": 1, "ctrl": 2}[kind]
        if bench.driver(queue).free > 2:
            bench.driver(queue).add([] if kind == "rx" else [data], [size] * (kind != "tx"))
        bench.kick(queue)
        bench.driver(queue).used()
    bench.start()
    wire.sent.clear()
    bench.driver(1).add([HEADER, FRAME])
    bench.kick(1)
    bench.slot.loop.poll()
    assert wire.sent[0][1].endswith(FRAME)
    bench.close()


@pytest.mark.parametrize("mac", ["zz:00:00:00:00:01", "01:00:5e:00:00:01", "52:54:00:00:01"])
def test_addresses_of_no_station_are_refused(mac: str) -> None:
    """An address is six bytes, and that of one station: a group's cannot be a sender's."""
    with pytest.raises(ValueError, match="mac"):
        NetOptions(net="null", mac=mac)
