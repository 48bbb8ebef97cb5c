"""Virtio devices that are saved with full queues: all that was in flight is served once, in the other machine."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from cardcage_block.drive import Drive, open_image
from cardcage_snapshot.testing import saved_and_loaded
from cardcage_virtio.devices.blk import Blk, BlkOptions
from cardcage_virtio.devices.console import Console, ConsoleOptions
from cardcage_virtio.devices.net import Net, NetOptions
from cardcage_virtio.devices.rng import Rng
from cardcage_virtio.testing import Bench

sys.path.append(str(Path(__file__).parents[1] / "devices"))
from test_virtio_console import SINGLE, Line
from test_virtio_net import Wire

FORMS = [
    {"packed": packed, "event_index": event_index}
    for packed, event_index in ((False, True), (False, False), (True, False))
]
form = pytest.mark.parametrize("form", FORMS, ids=["split", "split-flags", "packed"])
SMALL = {"memory": 1 << 20, "size": 16}


def fill(bench: Bench, queue: int, *requests: tuple[list[bytes], list[int]]) -> list[int]:
    """Requests that a paused device has not seen, and the notification that it has not heeded."""
    bench.virtio.pause()
    tokens = [bench.driver(queue).add(*one) for one in requests]
    bench.kick(queue)
    bench.slot.loop.poll()
    assert not bench.driver(queue).used()
    return tokens


@form
def test_a_full_transmit_queue_of_a_console(form: dict[str, Any]) -> None:
    """What the guest wrote and the device had not taken goes out once; input goes to the buffers that waited."""
    lines = [Line(), Line()]
    bench = Bench(Console(ConsoleOptions(char="x")), features=SINGLE, backends={"char": lines[0]}, **SMALL, **form)
    waiting = bench.driver(0).add([], [64])
    bench.kick(0)
    bench.call([b"before"], queue=1)
    tokens = fill(bench, 1, *(([f"line {at} ".encode()], []) for at in range(16)))
    other = bench.moved(Console(ConsoleOptions(char="x")), backends={"char": lines[1]}, through=saved_and_loaded)
    assert list(other.wait(1, 16)) == tokens
    assert lines[0].sent == b"before"
    assert lines[1].sent == b"".join(f"line {at} ".encode() for at in range(16))
    assert other.interrupts
    lines[1].received(b"typed later")
    assert other.wait(0) == {waiting: b"typed later"}
    assert other.call([b"more"], queue=1) == b""
    other.close()
    bench.close()


@form
def test_full_queues_of_a_network_card(form: dict[str, Any]) -> None:
    """Frames that the guest had queued go out once, and frames come in to the buffers that it had given."""
    wires = [Wire(), Wire()]
    bench = Bench(Net(NetOptions(net="x")), backends={"net": wires[0]}, **SMALL, **form)
    given = [bench.driver(0).add([], [1600]) for _ in range(4)]
    bench.kick(0)
    frames = [bytes([at]) * 60 for at in range(16)]
    fill(bench, 1, *(([bytes(12) + one], []) for one in frames))
    other = bench.moved(Net(NetOptions(net="x")), backends={"net": wires[1]}, through=saved_and_loaded)
    other.until(lambda: len(wires[1].sent) == 16)
    assert (wires[0].sent, [frame for _, frame in wires[1].sent]) == ([], frames)
    for at in range(4):
        assert wires[1].received(0, bytes([0x40 + at]) * 60)
    assert not wires[1].received(0, bytes(60))  # the guest has no buffer: the back end waits
    assert sorted(other.wait(0, 4)) == sorted(given)
    other.driver(0).add([], [1600])
    other.kick(0)
    assert wires[1].resumed
    assert wires[1].agreed == wires[0].agreed
    other.close()
    bench.close()


@form
def test_requests_of_a_disk_in_flight(form: dict[str, Any], tmp_path: Path) -> None:
    """Writes that were queued, with a flush behind them, are done once and are there afterwards."""
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(1 << 20))

    def disk() -> Any:
        return open_image(Drive(str(path), format="raw", locking="off"), warn=print)

    bench = Bench(Blk(BlkOptions(drive="x")), backends={"block": disk()}, **{**SMALL, "size": 64}, **form)

    def header(kind: int, sector: int) -> bytes:
        return struct.pack("<I4xQ", kind, sector)

    assert bench.call([header(1, 0), b"first".ljust(512)], [1]) == b"\0"
    writes = [([header(1, at), bytes([at]) * 512], [1]) for at in range(1, 9)]
    tokens = fill(bench, 0, *writes, ([header(4, 0)], [1]))
    other = bench.moved(Blk(BlkOptions(drive="x")), backends={"block": disk()}, through=saved_and_loaded)
    assert other.wait(0, 9) == dict.fromkeys(tokens, b"\0")
    assert path.read_bytes()[: 9 * 512] == b"first".ljust(512) + b"".join(bytes([at]) * 512 for at in range(1, 9))
    assert other.call([header(0, 3)], [512, 1]) == b"\3" * 512 + b"\0"
    other.close()
    bench.close()


@form
def test_the_example_card_and_the_generator(form: dict[str, Any]) -> None:
    """The disk of examples/virtio-card, which keeps nothing itself, and virtio-rng serve what was queued."""
    card = pytest.importorskip("virtio_card.device")
    bench = Bench(card.NumberDisk(card.Options()), **SMALL, **form)
    tokens = fill(bench, 0, *(([struct.pack("<I4xQ", 0, at)], [512, 1]) for at in range(5)))
    other = bench.moved(card.NumberDisk(card.Options()), through=saved_and_loaded)
    found = other.wait(0, 5)
    assert [found[one].split(b"\n")[0] for one in tokens] == [f"sector {at}".encode() for at in range(5)]
    other.close()
    bench.close()
    bench = Bench(Rng(), **SMALL, **form)
    fill(bench, 0, *(([], [16]) for _ in range(16)))
    other = bench.moved(Rng(), through=saved_and_loaded)
    assert len(set(other.wait(0, 16).values())) == 16
    other.close()
    bench.close()
