"""The console device: data, ports and the control queue."""

from __future__ import annotations

import struct
from typing import Any

from cardcage_virtio.devices.console import MESSAGE, Console, ConsoleOptions, PortOptions
from cardcage_virtio.testing import Bench
from hypothesis import given, settings
from hypothesis import strategies as st

MULTI, SINGLE = (1 << 64) - 1, ~2 & (1 << 64) - 1


class Line:
    """A char back end whose bytes the test sees."""

    def __init__(self) -> None:
        self.sent = b""

    def start(self, received: Any) -> None:
        self.received = received

    def write(self, data: bytes) -> None:
        self.sent += data

    def close(self) -> None: ...


class Lines(dict[str, Any]):
    """Gives each port a line of its own."""

    def __init__(self) -> None:
        self.all: list[Line] = []

    def __getitem__(self, kind: str) -> Line:
        self.all.append(Line())
        return self.all[-1]

    def __bool__(self) -> bool:
        return True


def make(*ports: PortOptions, features: int = MULTI, packed: bool = False, **options: Any) -> tuple[Bench, list[Line]]:
    lines = Lines()
    console = Console(ConsoleOptions(char="x", ports=tuple(ports), **options))
    return Bench(console, features=features, packed=packed, backends=lines), lines.all


def messages(bench: Bench) -> list[tuple[int, int, int, bytes]]:
    return [(*MESSAGE.unpack(data[:8]), data[8:]) for _, data in bench.driver(2).used()]


def tell(bench: Bench, port: int, event: int, value: int) -> None:
    bench.driver(3).add([MESSAGE.pack(port, event, value)])
    bench.kick(3)


def test_a_plain_console_passes_bytes_both_ways() -> None:
    """Without MULTIPORT port 0 is a console at once."""
    bench, (line,) = make(features=SINGLE)
    bench.driver(1).add([b"hel", b"lo"])
    bench.kick(1)
    assert line.sent == b"hello"
    line.received(b"early")
    bench.driver(0).add([], [3])
    bench.driver(0).add([], [30])
    bench.kick(0)
    assert [data for _, data in bench.driver(0).used()] == [b"ear", b"ly"]
    bench.close()


def test_ports_are_announced_named_and_opened() -> None:
    """The control queue adds each port, says which is a console and what the others are called."""
    bench, lines = make(PortOptions("y", name="org.agent"), columns=80, rows=25)
    for _ in range(20):
        bench.driver(2).add([], [64])
    bench.kick(2)
    tell(bench, 0, 0, 1)
    assert messages(bench) == [(0, 1, 1, b""), (1, 1, 1, b"")]
    tell(bench, 0, 3, 1)
    assert messages(bench) == [(0, 4, 1, b""), (0, 5, 0, struct.pack("<HH", 80, 25)), (0, 6, 1, b"")]
    tell(bench, 1, 3, 1)
    assert messages(bench) == [(1, 7, 1, b"org.agent\0"), (1, 6, 1, b"")]
    lines[1].received(b"before open")
    bench.driver(4).add([], [64])
    bench.kick(4)
    assert bench.driver(4).used() == []
    tell(bench, 1, 6, 1)
    assert [data for _, data in bench.driver(4).used()] == [b"before open"]
    bench.driver(5).add([b"answer"])
    bench.kick(5)
    assert lines[1].sent == b"answer"
    bench.device.resize(100, 30)
    assert messages(bench) == [(0, 5, 0, struct.pack("<HH", 100, 30))]
    assert bench.device.config()[:4] == struct.pack("<HH", 100, 30)
    bench.close()


def test_input_that_nobody_takes_is_bounded() -> None:
    """A guest that does not read costs the host no more than a fixed amount."""
    bench, (line,) = make(features=SINGLE)
    for _ in range(300):
        line.received(bytes(4096))
    assert len(bench.device.ports[0].held) == 1 << 20
    assert bench.slot.log.entries
    bench.close()


def test_unread_control_messages_are_bounded() -> None:
    """A driver that asks without reading the answers breaks its device, not the host."""
    bench, _ = make()
    while not bench.virtio.status & 64:
        tell(bench, 0, 3, 1)
        bench.driver(3).used()
    assert len(bench.device._messages) == 1024
    assert len(bench.slot.log.entries) == 1
    bench.close()


def test_emergency_write_needs_no_queue() -> None:
    """A byte written to the configuration space reaches the back end."""
    bench, (line,) = make()
    bench.virtio.config_write(8, 4, ord("!"))
    assert line.sent == b"!"
    bench.close()


@given(
    st.lists(st.tuples(st.integers(0, 5), st.binary(max_size=30), st.integers(0, 40)), max_size=30),
    st.booleans(),
)
@settings(deadline=None)
def test_random_buffers_never_hurt(buffers: list[tuple[int, bytes, int]], packed: bool) -> None:
    """Any buffers in any queue are served or refused; a reset brings the console back."""
    bench, lines = make(PortOptions("y"), packed=packed)
    for queue, data, size in buffers:
        bench.driver(queue).add([data], [size])
        bench.kick(queue)
        lines[0].received(data)
    bench.start()
    lines[0].sent = b""
    bench.driver(1).add([b"fine"])
    bench.kick(1)
    assert lines[0].sent == b"fine"
    bench.close()
