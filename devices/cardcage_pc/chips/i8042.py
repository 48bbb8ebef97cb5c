"""i8042 keyboard controller (IBM PS/2 technical reference) with a PS/2 keyboard and mouse behind it, and port 0x92.

Pulsing output bit 0 low (command 0xFE) and port 0x92 bit 0 reset the machine. The A20 gate can be set and read back,
but addresses are never masked: no guest of today relies on the wrap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from attrs import field
from cardcage.device import Resource
from cardcage.values import define

from cardcage_pc.chips.copying import copied

if TYPE_CHECKING:
    from cardcage.device import Slot

__all__ = ["I8042", "I8042State", "Ps2State"]

OUTPUT_FULL, SYSTEM, COMMAND, UNLOCKED, AUX_FULL = 0x01, 0x04, 0x08, 0x10, 0x20
MODE_KEYBOARD_IRQ, MODE_AUX_IRQ, MODE_SYSTEM, MODE_NO_KEYBOARD, MODE_NO_AUX, MODE_TRANSLATE = 1, 2, 4, 16, 32, 64
OUT_RESET, OUT_A20 = 1, 2
ACK, RESEND, PASSED = 0xFA, 0xFE, 0xAA
QUEUE = 256
"""Bytes kept for a guest that does not read; later bytes are lost, as from a real keyboard."""


@define
class Ps2State:
    """A keyboard's or a mouse's side: bytes to send, the command that waits for its argument, settings."""

    version: ClassVar[int] = 1
    queue: list[int] = field(factory=list)
    pending: int = 0
    enabled: bool = False
    leds: int = 0
    scan_set: int = 2
    rate: int = 100
    resolution: int = 2
    scaling: bool = False
    remote: bool = False


@define
class I8042State:
    """Controller registers and both devices."""

    version: ClassVar[int] = 1
    mode: int = MODE_KEYBOARD_IRQ | MODE_SYSTEM | MODE_TRANSLATE
    """After reset as firmware leaves it, since Linux takes the keyboard as it finds it."""
    output_port: int = OUT_RESET | OUT_A20 | 0xC0
    pending: int = 0
    command: bool = False
    output: int = 0
    full: int = 0
    """0, OUTPUT_FULL, or OUTPUT_FULL | AUX_FULL."""
    replies: list[tuple[int, bool]] = field(factory=list)
    """Bytes of the controller itself, each with whether it comes as from the mouse."""
    keyboard: Ps2State = field(factory=Ps2State)
    mouse: Ps2State = field(factory=Ps2State)


class I8042:
    """Data at port 0x60, status and command at 0x64; interrupts 1 and 12."""

    def __init__(self) -> None:
        self.state = I8042State()

    def plug(self, slot: Slot, /) -> None:
        self._power, self._log = slot.power, slot.log
        self._irq, self._aux_irq = slot.interrupts.line(1), slot.interrupts.line(12)
        slot.ranges.announce(Resource(hid="PNP0303", name="KBD", irqs=(1,)))
        slot.ranges.announce(Resource(hid="PNP0F13", name="MOU", irqs=(12,)))

    def reset(self) -> None:
        self.state = I8042State()
        self._irq.set(False)
        self._aux_irq.set(False)

    def save(self) -> I8042State:
        return copied(self.state)

    def unchanged(self, state: I8042State, /) -> bool:
        """True where :meth:`load` would change nothing."""
        return self.state == state

    def load(self, state: I8042State, /) -> None:
        self.state = copied(state)
        self._interrupt()

    def press(self, codes: bytes) -> None:
        """Scan codes of the set that the guest sees (set 1 under translation, else the keyboard's own), as typed."""
        if self.state.keyboard.enabled:
            self._queue(self.state.keyboard, *codes)

    # bytes towards the guest

    def _queue(self, device: Ps2State, *codes: int) -> None:
        device.queue += codes[: max(QUEUE - len(device.queue), 0)]
        self._advance()

    def _reply(self, byte: int, *, aux: bool = False) -> None:
        if len(self.state.replies) < QUEUE:
            self.state.replies.append((byte, aux))
        self._advance()

    def _advance(self) -> None:
        """Move the next byte that waits into the output buffer, when it is empty."""
        state = self.state
        if not state.full:
            if state.replies:
                state.output, aux = state.replies.pop(0)
            elif state.keyboard.queue and not state.mode & MODE_NO_KEYBOARD:
                state.output, aux = state.keyboard.queue.pop(0), False
            elif state.mouse.queue and not state.mode & MODE_NO_AUX:
                state.output, aux = state.mouse.queue.pop(0), True
            else:
                return
            state.full = OUTPUT_FULL | (AUX_FULL if aux else 0)
        self._interrupt()

    def _interrupt(self) -> None:
        state = self.state
        self._irq.set(state.full == OUTPUT_FULL and bool(state.mode & MODE_KEYBOARD_IRQ))
        self._aux_irq.set(bool(state.full & AUX_FULL) and bool(state.mode & MODE_AUX_IRQ))

    # ports 0x60 and 0x64

    def read_data(self, offset: int, size: int, /) -> int:
        state = self.state
        state.full = 0
        self._interrupt()  # low before the next byte raises it: the inputs are edge-triggered
        value = state.output
        self._advance()
        return value

    def read_status(self, offset: int, size: int, /) -> int:
        state = self.state
        system = SYSTEM if state.mode & MODE_SYSTEM else 0
        return state.full | system | (COMMAND if state.command else 0) | UNLOCKED

    def write_data(self, offset: int, size: int, value: int, /) -> None:
        state = self.state
        value &= 0xFF
        state.command, pending, state.pending = False, state.pending, 0
        match pending:
            case 0x60:
                state.mode = value
                self._advance()
                self._interrupt()
            case 0xD1:
                self._output(value)
            case 0xD2:
                self._reply(value)
            case 0xD3:
                self._reply(value, aux=True)
            case 0xD4:
                state.mode &= ~MODE_NO_AUX
                self._queue(state.mouse, *self._to_mouse(state.mouse, value))
            case _:
                state.mode &= ~MODE_NO_KEYBOARD
                self._queue(state.keyboard, *self._to_keyboard(state.keyboard, value))

    def write_command(self, offset: int, size: int, value: int, /) -> None:
        state = self.state
        value &= 0xFF
        state.command, state.pending = True, 0
        match value:
            case 0x20:
                self._reply(state.mode)
            case 0x60 | 0xD1 | 0xD2 | 0xD3 | 0xD4:
                state.pending = value
            case 0xA7 | 0xAD:
                state.mode |= MODE_NO_AUX if value == 0xA7 else MODE_NO_KEYBOARD
            case 0xA8 | 0xAE:
                state.mode &= ~(MODE_NO_AUX if value == 0xA8 else MODE_NO_KEYBOARD)
                self._advance()
            case 0xA9 | 0xAB:
                self._reply(0x00)
            case 0xAA:
                state.mode |= MODE_SYSTEM
                self._reply(0x55)
            case 0xC0:
                self._reply(0x80)
            case 0xD0:
                full = (state.full == OUTPUT_FULL) << 4 | bool(state.full & AUX_FULL) << 5
                self._reply(state.output_port | full)
            case 0xDD:
                state.output_port &= ~OUT_A20
            case 0xDF:
                state.output_port |= OUT_A20
            case _ if value >= 0xF0 and not value & 1:
                self._power.reset("keyboard controller")
            case _:
                pass  # pulses of the other output bits, and commands that only real controllers' firmware has

    def _output(self, value: int) -> None:
        self.state.output_port = value
        if not value & OUT_RESET:
            self._power.reset("keyboard controller")

    # port 0x92

    def read_fast(self, offset: int, size: int, /) -> int:
        return self.state.output_port & OUT_A20

    def write_fast(self, offset: int, size: int, value: int, /) -> None:
        self.state.output_port = self.state.output_port & ~OUT_A20 | value & OUT_A20
        if value & 1:
            self._power.reset("port 0x92")

    # the devices

    def _to_keyboard(self, device: Ps2State, value: int) -> tuple[int, ...]:
        pending, device.pending = device.pending, 0
        match pending, value:
            case 0xED, _:
                device.leds = value & 7
                return (ACK,)
            case 0xF3, _:
                return (ACK,)
            case 0xF0, 0:
                translated = {1: 0x43, 2: 0x41, 3: 0x3F}
                seen = translated[device.scan_set] if self.state.mode & MODE_TRANSLATE else device.scan_set
                return ACK, seen
            case 0xF0, 1 | 2 | 3:
                device.scan_set = value
                return (ACK,)
            case 0, 0xED | 0xF0 | 0xF3:
                device.pending = value
                return (ACK,)
            case 0, 0xEE:
                return (0xEE,)
            case 0, 0xF2:
                return (ACK, 0xAB, 0x41) if self.state.mode & MODE_TRANSLATE else (ACK, 0xAB, 0x83)
            case 0, 0xF4 | 0xF5 | 0xF6:
                device.queue.clear()
                device.enabled = value != 0xF5
                return (ACK,)
            case 0, 0xFF:
                self.state.keyboard = device = Ps2State(enabled=True)
                device.queue += (ACK, PASSED)
                return ()
        return (RESEND,)

    def _to_mouse(self, device: Ps2State, value: int) -> tuple[int, ...]:
        pending, device.pending = device.pending, 0
        match pending, value:
            case 0xE8, _:
                device.resolution = value & 3
                return (ACK,)
            case 0xF3, _:
                device.rate = value
                return (ACK,)
            case _, 0xE6 | 0xE7:
                device.scaling = value == 0xE7
                return (ACK,)
            case _, 0xE8 | 0xF3:
                device.pending = value
                return (ACK,)
            case _, 0xE9:
                flags = device.remote << 6 | device.enabled << 5 | device.scaling << 4
                return ACK, flags, device.resolution, device.rate
            case _, 0xEA | 0xF0:
                device.remote = value == 0xF0
                return (ACK,)
            case _, 0xEB:
                return ACK, 0x08, 0, 0  # no motion
            case _, 0xF2:
                return ACK, 0x00
            case _, 0xF4 | 0xF5:
                device.enabled = value == 0xF4
                return (ACK,)
            case _, 0xF6 | 0xFF:
                self.state.mouse = device = Ps2State()
                device.queue += (ACK,) if value == 0xF6 else (ACK, PASSED, 0x00)
                return ()
        return (RESEND,)
