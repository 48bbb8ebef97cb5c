"""What comes in is anybody's: it is refused in the project's words, and takes no more memory than it may."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from cardcage.errors import CardcageError
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage.ram import RamBlock
from cardcage_migrate.incoming import Arrival
from cardcage_migrate.pages import bodies, joined, put, runs_of_bitmap
from cardcage_migrate.passport import Passport, Stamp, structured
from cardcage_migrate.wire import HEAD, LARGEST, PIECE, RUN, BrokenStream, Channel, Frame, Kind, LinkLost
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from migrate_kit import Coming, over
from snapshot_kit import counting, counts_on

SIZE = 64 * 4096
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("ab\0é", max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=3), inner, max_size=3),
    max_leaves=5,
)


class Bytes:
    """A connection on which these come, in pieces."""

    def __init__(self, data: bytes) -> None:
        self._data, self.most = memoryview(data), 0

    def recv_into(self, buffer: memoryview, /) -> int:
        """Some of them."""
        self.most = max(self.most, len(buffer))
        size = min(len(buffer), 1000, len(self._data))
        buffer[:size], self._data = self._data[:size], self._data[size:]
        return size

    def sendall(self, data: Any, /) -> None:
        """Nowhere."""

    def settimeout(self, seconds: float | None, /) -> None:
        """None."""

    def close(self) -> None:
        """Nothing."""


class Record(Bytes):
    """A connection that keeps what is sent."""

    def __init__(self) -> None:
        super().__init__(b"")
        self.sent = bytearray()

    def sendall(self, data: Any, /) -> None:
        """Keep it."""
        self.sent += data


def stream(*frames: tuple[Kind, int, bytes]) -> bytes:
    """What a source sends."""
    kept = Record()
    channel = Channel(kept)
    channel.begin()
    for kind, argument, body in frames:
        channel.send(kind, body, argument=argument)
    return bytes(kept.sent)


def heard(channel: Channel, *kinds: Kind) -> None:
    """Hear the beginning of a stream, and frames of these kinds."""
    channel.meet()
    for one in kinds:
        channel.receive(one)


@given(st.binary(max_size=200), st.sampled_from(Kind))
def test_noise_is_no_stream(data: bytes, kind: Kind) -> None:
    """Bytes that are no stream raise, whatever they are, and no buffer is made that a body could not need."""
    for begin in (b"", stream(), stream((kind, 5, b""))):
        peer = Bytes(begin + data)
        channel = Channel(peer)
        with pytest.raises((BrokenStream, LinkLost)):
            heard(channel, kind, kind)
        assert peer.most <= max(LARGEST.values())


@given(st.data())
def test_a_changed_byte_is_found(data: st.DataObject) -> None:
    """One byte of a stream that is another, one frame that is missing or comes twice: the frame is refused."""
    frames = [(Kind.PAGES, 1, RUN.pack(0, 4096) + bytes(4096)), (Kind.PING, 0, b""), (Kind.END, 0, b"")]
    whole = bytearray(stream(*frames))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    channel = Channel(Bytes(bytes(whole)))
    with pytest.raises((BrokenStream, LinkLost)):
        heard(channel, *(kind for kind, _, _ in frames))
    begin, frame = stream(), HEAD.size + 4
    ping, end = (stream(*frames[1:])[len(begin) :][at : at + frame] for at in (0, frame))
    for wrong, kinds in ((end, [Kind.END]), (ping + ping, [Kind.PING, Kind.PING])):
        with pytest.raises(BrokenStream, match="damaged, or another's"):
            heard(Channel(Bytes(begin + wrong)), *kinds)


@given(
    st.lists(st.tuples(st.integers(0, 1 << 63), st.integers(0, 1 << 31)), max_size=3),
    st.integers(0, 5),
    st.binary(max_size=9000),
)
def test_runs_lie_in_ram(runs: list[tuple[int, int]], number: int, data: bytes) -> None:
    """Runs that do not lie in RAM, page by page, or without their bytes, are refused, and nothing is written."""
    block = RamBlock(SIZE)
    try:
        body = b"".join(RUN.pack(*one) for one in runs) + data
        with suppress(BrokenStream):
            put(block, Frame(Kind.PAGES, number, memoryview(body)))
            return
        assert not any(block.view)
    finally:
        block.close()


@given(st.lists(st.booleans(), max_size=64), st.booleans())
def test_ram_goes_over(pages: list[bool], zeros: bool) -> None:
    """Runs of a bitmap are those of its bits, and what they hold is what arrives; without zeros only what is not."""
    here, there = RamBlock(SIZE), RamBlock(SIZE)
    try:
        bitmap = sum(bit << at for at, bit in enumerate(pages)).to_bytes(8, "little")
        runs = list(runs_of_bitmap(bitmap))
        assert runs == joined(runs) == joined((at * 4096, 4096) for at, bit in enumerate(pages) if bit)
        for at in range(0, 64, 3):
            here.view[at * 4096 : at * 4096 + 3] = b"abc"
        size = 0
        for number, body in bodies(here, runs, piece=8192, zeros=zeros):
            assert len(body) <= 8192 + number * RUN.size <= LARGEST[Kind.PAGES]
            put(there, Frame(Kind.PAGES, number, memoryview(body)))
            size += len(body) - number * RUN.size
        for at in range(64):
            page = slice(at * 4096, at * 4096 + 4096)
            assert there.view[page] == (here.view[page] if at < len(pages) and pages[at] else bytes(4096))
        assert size == 4096 * sum(bit and (zeros or at % 3 == 0) for at, bit in enumerate(pages))
        assert PIECE // 4096 * RUN.size + PIECE == LARGEST[Kind.PAGES]
    finally:
        here.close()
        there.close()


@given(st.dictionaries(st.sampled_from([one.name for one in Passport.__attrs_attrs__]), VALUES))
def test_a_passport_is_typed(table: dict[str, Any]) -> None:
    """JSON that is no passport, or no stamps, is refused."""
    for kind in (Passport, list[Stamp]):
        with pytest.raises(BrokenStream):
            structured(json.dumps(table).encode(), kind)
    with pytest.raises(BrokenStream, match=r"nested deeper|not JSON"):
        structured(b"[" * 100000, Passport)


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """A host with the installed cards."""
    with Host() as made:
        yield made


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, host: Host) -> list[tuple[Kind, int, bytes]]:
    """What a source sent."""
    folder, kept = tmp_path_factory.mktemp("guest"), Record()
    with counting(folder, host) as vm, Coming(host, trust=True) as there:
        vm.start()
        counts_on(vm, 10)
        link, send = there.link, there.link.sendall

        class Both(Bytes):
            def recv_into(self, buffer: memoryview, /) -> int:
                return link.recv_into(buffer)

            def sendall(self, data: Any, /) -> None:
                kept.sendall(data)
                send(data)

        over(vm, Both(b""))
        there.done()
    found, channel = [], Channel(Bytes(bytes(kept.sent)))
    channel.meet()
    with suppress(LinkLost):
        while True:
            frame = channel.receive(*Kind)
            found.append((frame.kind, frame.argument, bytes(frame.body)))
    return found


def taken(data: bytes, host: Host) -> Machine | None:
    """The machine that comes of a stream; raises the project's errors."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender = threading.Thread(target=send_all, args=(theirs, data))
        sender.start()
        arrival: Arrival[Machine] = Arrival(Machine, f"fd:{ours.fileno()}", host=host, trust=True)
        try:
            arrival.wait()
            return arrival.machine()
        except CardcageError as error:
            if (left := getattr(error, "machine", None)) is not None:
                left.dismantle()
            raise
        finally:
            ours.shutdown(socket.SHUT_RDWR)
            sender.join()


def send_all(peer: socket.socket, data: bytes) -> None:
    """As far as somebody takes it."""
    with suppress(OSError):
        peer.sendall(data)
        peer.shutdown(socket.SHUT_WR)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_frames_in_any_order(recorded: list[tuple[Kind, int, bytes]], host: Host, data: st.DataObject) -> None:
    """Frames of a real stream that are left out, repeated, cut short or changed, with sums that are right: a machine
    comes of it, or one of the project's errors, and no machine is left."""
    frames = list(recorded)
    for _ in range(data.draw(st.integers(1, 2))):
        at = data.draw(st.integers(0, len(frames) - 1))
        kind, argument, body = frames[at]
        match data.draw(st.sampled_from(["drop", "twice", "cut", "change", "argument"])):
            case "drop":
                del frames[at]
            case "twice":
                frames.insert(at, frames[at])
            case "cut":
                frames[at] = kind, argument, body[: len(body) // 2]
            case "change" if body:
                place = data.draw(st.integers(0, len(body) - 1))
                frames[at] = (
                    kind,
                    argument,
                    body[:place] + data.draw(st.binary(min_size=1, max_size=3)) + body[place + 1 :],
                )
            case _:
                frames[at] = kind, data.draw(st.integers(0, (1 << 64) - 1)), body
    before = len(host.machines)
    try:
        made = taken(stream(*frames), host)
    except CardcageError:
        pass
    else:
        assert made is not None
        made.dismantle()
    assert len(host.machines) == before
