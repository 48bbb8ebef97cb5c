"""Small ports by which a guest reports: pvpanic, port 0x80, ISA debug exit, debug console."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from attrs import field
from attrs.validators import ge, le, optional
from cardcage.device import Pio, Resource
from cardcage.values import define, frozen

if TYPE_CHECKING:
    from cardcage.device import Slot

__all__ = ["DebugCon", "DebugConOptions", "IsaDebugExit", "Port80", "Port80State", "PvPanic"]

PANICKED, CRASH_LOADED = 1, 2


class PvPanic:
    """Panic notification (QEMU ``docs/specs/pvpanic.rst``): port 0x505 takes events, reading returns those known."""

    def plug(self, slot: Slot, /) -> None:
        self._power, self._log = slot.power, slot.log
        slot.ranges.announce(Resource(hid="QEMU0001", name="PEVT"))

    def read(self, offset: int, size: int, /) -> int:
        return PANICKED | CRASH_LOADED

    def write(self, offset: int, size: int, value: int, /) -> None:
        if value & PANICKED:
            self._power.panic("the guest reported a panic (pvpanic)")
        elif value & CRASH_LOADED:
            self._log.warning("the guest panicked and goes on in its crash kernel")


@define
class Port80State:
    """The last code."""

    version: ClassVar[int] = 1
    code: int = 0


class Port80:
    """POST codes: the last one written can be read back, and each is logged (level debug)."""

    def __init__(self) -> None:
        self.code = 0

    def plug(self, slot: Slot, /) -> None:
        self._log = slot.log

    def save(self) -> Port80State:
        return Port80State(self.code)

    def unchanged(self, state: Port80State, /) -> bool:
        """True where :meth:`load` would change nothing."""
        return self.code == state.code

    def load(self, state: Port80State, /) -> None:
        self.code = state.code & 0xFF

    def read(self, offset: int, size: int, /) -> int:
        return self.code

    def write(self, offset: int, size: int, value: int, /) -> None:
        # Linux writes here just to wait, always the same value
        if value & 0xFF != self.code:
            self.code = value & 0xFF
            self._log.debug("POST code", code=self.code)


@frozen
class IsaDebugExitOptions:
    """Options of ``isa-debug-exit``.

    Attributes:
        iobase: first port, as QEMU calls it; the machine key ``port`` may stand in its place.
        iosize: number of ports, 1 to 4.
    """

    iobase: int | None = field(default=None, validator=optional([ge(0), le(0xFFFF)]))
    iosize: int = field(default=4, validator=[ge(1), le(4)])


class IsaDebugExit:
    """A write ends the machine with the value written; the process's exit status is ``value * 2 + 1``."""

    def __init__(self, options: IsaDebugExitOptions) -> None:
        self.options = options

    def plug(self, slot: Slot, /) -> None:
        self._power = slot.power
        declared, wanted = slot.ranges.mappings[0], self.options
        if wanted.iobase is not None or wanted.iosize != 4:
            base = declared.address if wanted.iobase is None else wanted.iobase
            declared.move(None)
            slot.ranges.pio(Pio(wanted.iosize), base, self)

    def read(self, offset: int, size: int, /) -> int:
        return 0

    def write(self, offset: int, size: int, value: int, /) -> None:
        self._power.exit(value & 0xFF)


@frozen
class DebugConOptions:
    """Options of ``debugcon``.

    Attributes:
        char: the character back end that gets the bytes.
        readback: what reading the port gives; 0xE9 tells the guest that it is there.
    """

    char: str | dict[str, object] = "stdio"
    readback: int = 0xE9


class DebugCon:
    """Bytes written to port 0xE9 go to a character back end (Bochs' and QEMU's debug console)."""

    def __init__(self, options: DebugConOptions) -> None:
        self.options = options

    def plug(self, slot: Slot, /) -> None:
        self._back: Any = slot.host.open("char", self.options.char)
        self._back.start(_ignore)

    def read(self, offset: int, size: int, /) -> int:
        return self.options.readback

    def write(self, offset: int, size: int, value: int, /) -> None:
        self._back.write(bytes((value & 0xFF,)))


def _ignore(data: bytes) -> None:
    """There is no way in for what is typed at a debug console."""
