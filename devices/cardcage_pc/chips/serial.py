"""16550A UART (National Semiconductor PC16550D data sheet), as the PC's COM ports: QEMU's ``isa-serial``.

Bytes leave at once. What the receive FIFO cannot hold waits outside until the guest reads, up to 1 MiB of it. The
interrupt output is not gated by OUT2, as in QEMU.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, ClassVar

from attrs import field
from cardcage.device import Resource
from cardcage.values import define, frozen

from cardcage_pc.chips.bytewise import read_bytes, write_bytes
from cardcage_pc.chips.copying import copied

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.device import Slot

__all__ = ["Serial", "SerialOptions", "SerialState"]

# interrupt enable register
IER_RECEIVE, IER_TRANSMIT, IER_LINE, IER_MODEM = 1, 2, 4, 8
# interrupt identification register
IIR_NONE, IIR_MODEM, IIR_TRANSMIT, IIR_RECEIVE, IIR_LINE, IIR_TIMEOUT, IIR_FIFO = 1, 0, 2, 4, 6, 12, 0xC0
# FIFO control register
FCR_ENABLE, FCR_CLEAR_RECEIVE, FCR_CLEAR_TRANSMIT = 1, 2, 4
TRIGGER = (1, 4, 8, 14)
FIFO_SIZE = 16
# line control, modem control, line status, modem status
LCR_DLAB = 0x80
MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2, MCR_LOOP = 1, 2, 4, 8, 16
LSR_DATA, LSR_OVERRUN, LSR_BREAK, LSR_THRE, LSR_TEMT = 1, 2, 0x10, 0x20, 0x40
LSR_ERRORS = 0x1E
MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD, MSR_TERI = 0x10, 0x20, 0x40, 0x80, 0x04

WAITING = 1 << 20
"""Bytes that wait outside for a guest that does not read."""

STANDARD_IRQ = {0x3F8: 4, 0x2F8: 3, 0x3E8: 4, 0x2E8: 3}
BAUD_BASE = 1_843_200 // 16


@frozen
class SerialOptions:
    """Options of ``isa-serial``.

    Attributes:
        char: the character back end at the other end of the cable.
    """

    char: str | dict[str, object] = "null"


@define
class SerialState:
    """Registers and FIFO."""

    version: ClassVar[int] = 1
    ier: int = 0
    fcr: int = 0
    lcr: int = 0
    mcr: int = MCR_OUT2
    scratch: int = 0
    divisor: int = 12
    errors: int = 0
    """Error bits of the line status register, until it is read."""
    msr: int = MSR_DCD | MSR_DSR | MSR_CTS
    fifo: list[int] = field(factory=list)
    thre_pending: bool = False
    timeout_pending: bool = False
    timeout: int | None = None
    """Clock at which the character timeout comes."""
    waiting: bytes = b""
    """Bytes that came from outside and have no room in the FIFO yet: as saved."""


class Serial:
    """One COM port: eight ports, one interrupt, one back end."""

    def __init__(self, options: SerialOptions) -> None:
        self.options = options
        self.state = SerialState()
        self.waiting: deque[int] = deque()
        self._last: int | None = None
        self._listeners: tuple[Callable[[bytes], None], ...] = ()

    def plug(self, slot: Slot, /) -> None:
        """Take interrupt (4 or 3 at the standard ports, else the ``irq`` key) and back end."""
        base = slot.ranges.mappings[0].address
        irq = STANDARD_IRQ.get(base or 0) if slot.interrupts.number is None else slot.interrupts.number
        self._irq = slot.interrupts.line(irq)
        self._log = slot.log
        self._clock, self._timer = slot.clock, slot.clock.timer(self._timeout)
        self._back: Any = slot.host.open("char", self.options.char)
        slot.ranges.announce(Resource(hid="PNP0501", name="COM", irqs=() if irq is None else (irq,)))
        self._back.start(self.received)

    def reset(self) -> None:
        """As after master reset; bytes that wait outside stay."""
        self.state = SerialState()
        self._timer.cancel()
        self._update()

    def save(self) -> SerialState:
        state = copied(self.state)
        state.waiting = bytes(self.waiting)
        return state

    def unchanged(self, state: SerialState, /) -> bool:
        """True where :meth:`load` would change nothing."""
        return not self.waiting and self.state == state

    def load(self, state: SerialState, /) -> None:
        self.waiting = deque(state.waiting[:WAITING])
        self.state = copied(state)
        self.state.waiting = b""
        self._last = None
        if state.timeout is not None and state.fifo:
            self._timer.arm(state.timeout)
        else:
            self._timer.cancel()
            self.state.timeout = None
        self._update()

    def read(self, offset: int, size: int, /) -> int:
        return self._get(offset) if size == 1 else read_bytes(self._get, offset, size)

    def write(self, offset: int, size: int, value: int, /) -> None:
        write_bytes(self._put, offset, size, value)

    def add_output_listener(self, listener: Callable[[bytes], None], /) -> None:
        """Call *listener* with what the guest writes, after the back end got it."""
        self._listeners += (listener,)

    # the back end's side

    def received(self, data: bytes) -> None:
        """Bytes for the guest."""
        room = WAITING - len(self.waiting)
        if len(data) > room:
            self._log.warning("the guest does not read its serial port: input is dropped", bytes=len(data) - room)
        self.waiting += data[:room]
        self._fill()

    def _fill(self) -> None:
        """Move what waits outside into the FIFO, as far as there is room."""
        s = self.state
        if s.mcr & MCR_LOOP or not self.waiting:
            return
        room = (FIFO_SIZE if s.fcr & FCR_ENABLE else 1) - len(s.fifo)
        for _ in range(min(room, len(self.waiting))):
            s.fifo.append(self.waiting.popleft())
        self._touched()

    def _touched(self) -> None:
        """The receive FIFO changed or was read: the character timeout starts anew."""
        s = self.state
        s.timeout_pending = False
        if s.fifo and s.fcr & FCR_ENABLE and len(s.fifo) < TRIGGER[s.fcr >> 6]:
            # four characters of start, five to eight data, parity and stop bits
            bits = 7 + (s.lcr & 3) + (s.lcr >> 2 & 1) + (s.lcr >> 3 & 1)
            s.timeout = self._clock.now() + 4 * bits * max(s.divisor, 1) * 1_000_000_000 // BAUD_BASE
            self._timer.arm(s.timeout)
        elif s.timeout is not None:
            s.timeout = None
            self._timer.cancel()
        self._update()

    def _timeout(self) -> None:
        self.state.timeout = None
        if self.state.fifo:
            self.state.timeout_pending = True
            self._update()

    # the guest's side

    def _cause(self) -> int:
        s = self.state
        if s.ier & IER_LINE and s.errors:
            return IIR_LINE
        if s.ier & IER_RECEIVE and s.fifo:
            if not s.fcr & FCR_ENABLE or len(s.fifo) >= TRIGGER[s.fcr >> 6]:
                return IIR_RECEIVE
            if s.timeout_pending:
                return IIR_TIMEOUT
        if s.ier & IER_TRANSMIT and s.thre_pending:
            return IIR_TRANSMIT
        if s.ier & IER_MODEM and s.msr & 0x0F:
            return IIR_MODEM
        return IIR_NONE

    def _update(self) -> None:
        level = self._cause() != IIR_NONE
        if level != self._last:
            self._last = level
            self._irq.set(level)

    def _get(self, offset: int) -> int:
        s = self.state
        match offset:
            case 0 if s.lcr & LCR_DLAB:
                return s.divisor & 0xFF
            case 0:
                value = s.fifo.pop(0) if s.fifo else 0
                self._fill()
                self._touched()
                return value
            case 1 if s.lcr & LCR_DLAB:
                return s.divisor >> 8
            case 1:
                return s.ier
            case 2:
                cause = self._cause()
                if cause == IIR_TRANSMIT:
                    s.thre_pending = False
                    self._update()
                return cause | (IIR_FIFO if s.fcr & FCR_ENABLE else 0)
            case 3:
                return s.lcr
            case 4:
                return s.mcr
            case 5:
                value = s.errors | LSR_THRE | LSR_TEMT | (LSR_DATA if s.fifo else 0)
                s.errors = 0
                self._update()
                return value
            case 6 if s.mcr & MCR_LOOP:
                value = s.msr & 0x0F | self._looped(s.mcr)
            case 6:
                value = s.msr
            case _:
                return s.scratch
        s.msr &= 0xF0
        self._update()
        return value

    def _put(self, offset: int, value: int) -> None:
        s = self.state
        match offset:
            case 0 if s.lcr & LCR_DLAB:
                s.divisor = s.divisor & 0xFF00 | value
            case 0:
                self._transmit(value)
            case 1 if s.lcr & LCR_DLAB:
                s.divisor = s.divisor & 0x00FF | value << 8
            case 1:
                # the transmitter is always empty: enabling its interrupt raises it
                if value & ~s.ier & IER_TRANSMIT:
                    s.thre_pending = True
                s.ier = value & 0x0F
                self._update()
            case 2:
                self._control_fifo(value)
            case 3:
                s.lcr = value
            case 4:
                self._control_modem(value & 0x1F)
            case 7:
                s.scratch = value
            case _:
                pass  # line and modem status: writing is for factory tests

    def _transmit(self, value: int) -> None:
        s = self.state
        if not s.ier & IER_TRANSMIT and not s.mcr & MCR_LOOP:  # the console's common case: the line cannot change
            s.thre_pending = True
            self._send(value)
            return
        s.thre_pending = False
        self._update()
        if s.mcr & MCR_LOOP:
            if len(s.fifo) >= (FIFO_SIZE if s.fcr & FCR_ENABLE else 1):
                s.errors |= LSR_OVERRUN
                if not s.fcr & FCR_ENABLE:
                    s.fifo[:] = [value]
            else:
                s.fifo.append(value)
            self._touched()
        else:
            self._send(value)
        s.thre_pending = True
        self._update()

    def _send(self, value: int) -> None:
        data = bytes((value,))
        self._back.write(data)
        for listener in self._listeners:
            listener(data)

    def _control_fifo(self, value: int) -> None:
        s = self.state
        if (value ^ s.fcr) & FCR_ENABLE:  # changing modes empties both
            value |= FCR_CLEAR_RECEIVE | FCR_CLEAR_TRANSMIT
        if value & FCR_CLEAR_RECEIVE:
            s.fifo.clear()
        if value & FCR_CLEAR_TRANSMIT:
            s.thre_pending = True
        s.fcr = value & 0xC9 if value & FCR_ENABLE else 0
        self._fill()
        self._touched()

    def _control_modem(self, value: int) -> None:
        s = self.state
        before = self._looped(s.mcr) if s.mcr & MCR_LOOP else s.msr & 0xF0
        s.mcr = value
        after = self._looped(value) if value & MCR_LOOP else s.msr & 0xF0
        if value & MCR_LOOP:
            changed = (before ^ after) >> 4
            s.msr |= changed & 0x0B | (MSR_TERI if before & ~after & MSR_RI else 0)
        self._fill()
        self._update()

    @staticmethod
    def _looped(mcr: int) -> int:
        """Modem inputs in loopback: DTR to DSR, RTS to CTS, OUT1 to RI, OUT2 to DCD."""
        return (
            (MSR_DSR if mcr & MCR_DTR else 0)
            | (MSR_CTS if mcr & MCR_RTS else 0)
            | (MSR_RI if mcr & MCR_OUT1 else 0)
            | (MSR_DCD if mcr & MCR_OUT2 else 0)
        )
