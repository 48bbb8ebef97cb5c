"""Console device with any number of ports (virtio 1.2, section 5.3), each on a char back end."""

from __future__ import annotations

import struct
from collections import deque
from typing import TYPE_CHECKING, Any, ClassVar

from attrs import field
from attrs.validators import ge, le, max_len
from cardcage.values import define, frozen

from cardcage_virtio.queue.request import RingError

if TYPE_CHECKING:
    from cardcage.backends import CharBackend
    from cardcage.device import Slot

    from cardcage_virtio.queue.request import Request
    from cardcage_virtio.virtio import Virtio

__all__ = ["Console", "ConsoleOptions", "ConsoleState", "PortOptions"]

F_SIZE, F_MULTIPORT, F_EMERGENCY = 0, 1, 2
READY, ADD, REMOVE, PORT_READY, IS_CONSOLE, RESIZE, OPEN, NAME = range(8)
MESSAGE = struct.Struct("<IHH")
HELD_MAX = 1 << 20
"""Bytes kept for a port whose reader in the guest is slow; what comes beyond is dropped."""
PIECE = 1 << 18
"""Bytes that a back end is given at once."""
OUTPUT_MAX = 1 << 20
"""Bytes that one buffer of the driver may bring: they are written under the machine's lock."""
MESSAGES_MAX = 1024


@frozen
class PortOptions:
    """One more port.

    Attributes:
        char: back end of kind ``char``.
        name: what the guest sees in ``/dev/virtio-ports``, up to 255 bytes.
        console: a console (``hvcN``) instead of a serial port.
    """

    char: str | dict[str, Any]
    name: str = field(default="", validator=max_len(255))
    console: bool = False


@frozen
class ConsoleOptions:
    """Options of ``virtio-console``.

    Attributes:
        char: back end of kind ``char`` behind port 0, the console ``hvc0``.
        ports: further ports, up to 30.
        columns, rows: size that the guest is told, 0 for none.
    """

    char: str | dict[str, Any]
    ports: tuple[PortOptions, ...] = field(default=(), validator=max_len(30))
    columns: int = field(default=0, validator=[ge(0), le(65535)])
    rows: int = field(default=0, validator=[ge(0), le(65535)])


@define
class ConsoleState:
    """Saved state: the ports open in the guest, and messages not yet taken."""

    version: ClassVar[int] = 1
    open: list[bool] = field(factory=list)
    messages: list[bytes] = field(factory=list)


class Port:
    """A port: its options and what waits for the guest."""

    def __init__(self, index: int, options: PortOptions) -> None:
        self.index, self.options = index, options
        self.receive, self.transmit = (0, 1) if index == 0 else (2 * index + 2, 2 * index + 3)
        self.held, self.open = bytearray(), index == 0
        self.char: CharBackend


class Console:
    """A console, and named serial ports."""

    device_id = 3

    def __init__(self, options: ConsoleOptions) -> None:
        self.options = options
        first = PortOptions(options.char, console=True)
        self.ports = [Port(at, one) for at, one in enumerate((first, *options.ports))]
        self.queue_sizes = (128,) * (2 * len(self.ports) + 2)
        self.columns, self.rows = options.columns, options.rows
        self.features = 1 << F_MULTIPORT | 1 << F_EMERGENCY | (1 << F_SIZE if self.columns else 0)
        self._messages: deque[bytes] = deque()
        self._io: Virtio

    def plug(self, slot: Slot) -> None:
        self._slot = slot
        for port in self.ports:
            port.char = slot.host.open("char", port.options.char)

    def plug_virtio(self, io: Virtio) -> None:
        self._io = io
        for port in self.ports:
            # a default argument binds this turn's port; mypy cannot infer such a lambda
            port.char.start(lambda data, port=port: self._arrived(port, data))  # type: ignore[misc]

    def config(self) -> bytes:
        return struct.pack("<HHII", self.columns, self.rows, len(self.ports), 0)

    def config_written(self, offset: int, data: bytes) -> None:
        if offset == 8:  # emergency write: one character, before any queue is up
            self.ports[0].char.write(data[:1])

    def resize(self, columns: int, rows: int) -> None:
        """The terminal behind port 0 has another size now."""
        self.columns, self.rows = columns, rows
        if self._io.has(F_MULTIPORT):
            self._io.guarded(lambda: self._send(0, RESIZE, 0, struct.pack("<HH", columns, rows)))
        self._io.config_changed()

    def stop(self) -> None:
        self._messages.clear()
        for port in self.ports:
            port.open = port.index == 0
            port.held.clear()

    def notified(self, index: int) -> None:
        if index == 2:
            self._flush_messages()
        elif index == 3:
            self._drain(index, self._control)
        else:
            port = self.ports[max(index // 2 - 1, 0)]
            if index == port.receive:
                self._feed(port)
            else:
                self._drain(index, lambda request: self._transmit(port, request))

    def _drain(self, index: int, handle: Any) -> None:
        ring = self._io.rings[index]
        if ring is None:
            return
        ring.batching = True
        try:
            for _ in range(4 * ring.size):
                request = ring.pop()
                if request is not None:
                    handle(request)
                elif not ring.rearm():
                    return
            self._slot.loop.call_soon(lambda: self._io.kick(index))  # others get their turn
        finally:
            ring.batching = False
            ring.signal()

    # data

    def _transmit(self, port: Port, request: Request) -> None:
        if request.readable_size > OUTPUT_MAX:
            raise RingError(f"output of {request.readable_size} bytes at once")
        for part in request.readable:
            for at in range(0, len(part), PIECE):
                port.char.write(bytes(part[at : at + PIECE]))
        request.done()

    def _arrived(self, port: Port, data: bytes) -> None:
        room = HELD_MAX - len(port.held)
        if len(data) > room:
            self._io.warn("console input dropped", port=port.index, bytes=len(data) - room)
        port.held += data[:room]
        self._io.guarded(lambda: self._feed(port))

    def _feed(self, port: Port) -> None:
        ring = self._io.rings[port.receive]
        if ring is None or not self._io.live or not port.open:
            return
        ring.batching = True  # an interrupt for all of it
        try:
            for _ in range(4 * ring.size):
                if not port.held:
                    return
                request = ring.pop()
                if request is not None:
                    written = request.write(port.held)
                    del port.held[:written]
                    request.done(written)
                elif not ring.rearm():
                    return
        finally:
            ring.batching = False
            ring.signal()
        self._slot.loop.call_soon(lambda: self._io.kick(port.receive))  # buffers without room, more and more of them

    # control

    def _send(self, port: int, event: int, value: int, more: bytes = b"") -> None:
        if len(self._messages) >= MESSAGES_MAX:
            raise RingError(f"the driver left {MESSAGES_MAX} control messages unread")
        self._messages.append(MESSAGE.pack(port, event, value) + more)
        self._flush_messages()

    def _flush_messages(self) -> None:
        ring = self._io.rings[2]
        while ring is not None and self._messages:
            request = ring.pop()
            if request is not None:
                request.done(request.write(self._messages.popleft()))
            elif not ring.rearm():
                return

    def _control(self, request: Request) -> None:
        data = bytes(request.read()[: MESSAGE.size]) if request.readable_size <= 4096 else b""
        request.done()
        if len(data) < MESSAGE.size:
            raise RingError(f"a control message of {len(data)} bytes")
        index, event, value = MESSAGE.unpack(data)
        if event == READY:
            if value:
                for port in self.ports:
                    self._send(port.index, ADD, 1)
            return
        if index >= len(self.ports):
            return
        port = self.ports[index]
        if event == PORT_READY and value:
            if port.options.console:
                self._send(index, IS_CONSOLE, 1)
                if self.columns:
                    self._send(index, RESIZE, 0, struct.pack("<HH", self.columns, self.rows))
            if port.options.name:
                self._send(index, NAME, 1, port.options.name.encode()[:255] + b"\0")
            self._send(index, OPEN, 1)
        elif event == OPEN:
            port.open = bool(value) or index == 0
            self._feed(port)

    # state

    def save(self) -> ConsoleState:
        return ConsoleState([port.open for port in self.ports], list(self._messages))

    def unchanged(self, state: ConsoleState) -> bool:
        return not any(port.held for port in self.ports) and self.save() == state

    def load(self, state: ConsoleState) -> None:
        for port, is_open in zip(self.ports, state.open, strict=True):
            port.open = is_open
        self._messages = deque(state.messages)
