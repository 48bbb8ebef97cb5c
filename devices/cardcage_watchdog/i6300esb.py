"""The watchdog timer of Intel's 6300ESB I/O controller hub (datasheet, chapter 16), as Linux's ``i6300esb`` drives it.

A PCI function with 16 bytes of memory and two registers in configuration space:

- configuration 0x60 (16 bits): bits 0 and 1, what the end of the first stage raises; bit 2, the divider of the clock
  of 33 MHz (0: 2**15, 1: 2**5); bit 5, the second stage's end changes nothing.
- configuration 0x68 (8 bits): bit 0, this register is locked until a reset; bit 1, the timer runs; bit 2, it starts
  again by itself.
- memory 0 and 4 (32 bits): ticks of the first and second stage, 20 bits.
- memory 0xC (16 bits): bit 8 written starts the first stage anew; bit 9 says that the timer expired before the last
  reset, until it is written. Linux looks for that at bit 12, so it is told there too.

Each write to memory has to come behind two to 0xC, of 0x80 and 0x86. The first stage's interrupt is not there: Linux
switches it off.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from cardcage.errors import UsageError
from cardcage.values import define, frozen

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.device import Slot

__all__ = ["ACTIONS", "Action", "I6300esb", "I6300esbOptions", "I6300esbState"]

Action = Literal["reset", "shutdown", "poweroff", "pause", "debug", "none"]
ACTIONS: tuple[str, ...] = get_args(Action)
CONFIG, LOCK = 0x60, 0x68
INTERRUPT, FAST, SILENT = 3, 1 << 2, 1 << 5
LOCKED, RUNS, AGAIN = 1, 2, 4
TIMERS, RELOAD = (0, 4), 0xC
FEED, EXPIRED, LINUX = 1 << 8, 1 << 9, 1 << 12
HERTZ, SECOND = 33_000_000, 1_000_000_000


@frozen
class I6300esbOptions:
    """Options of ``i6300esb``.

    Attributes:
        action: what happens when the guest has not fed the timer for both stages: ``reset`` the machine, or end it
            where ``machine.on_reset`` says so; ``shutdown`` presses the power button; ``poweroff`` ends the machine;
            ``pause`` pauses it until its operator resumes it; ``debug`` and ``none`` only say so in the log, or not.
    """

    action: Action = "reset"


@define
class I6300esbState:
    """Saved state: the timers' ticks, the two registers, how far the key is (0 to 2), and the stage that runs.

    ``stage`` is 0 for a timer that stands; ``until`` is the guest's time, in nanoseconds, at which the stage ends.
    """

    version: ClassVar[int] = 1
    ticks: tuple[int, int] = (0xFFFFF, 0xFFFFF)
    config: int = 0
    lock: int = 0
    key: int = 0
    stage: int = 0
    until: int = 0
    expired: bool = False


class I6300esb:
    """The device; it is the machine's service ``watchdog``.

    Attributes:
        action: as of the options; :meth:`set_action` changes it.
        listeners: called with the action before it is taken, under the machine's lock.
    """

    pci: ClassVar[dict[str, Any]] = {
        "vendor": 0x8086,
        "device": 0x25AB,
        "class_code": 0x088000,
        "bars": [{"index": 0, "size": 16, "name": "watchdog"}],
        "writable": {CONFIG: bytes((INTERRUPT | FAST | SILENT, 0)), LOCK: bytes((LOCKED | RUNS | AGAIN,))},
    }

    def __init__(self, options: I6300esbOptions) -> None:
        self.options = options
        self.action: str = options.action
        self.listeners: list[Callable[[str], object]] = []
        self.state = I6300esbState()

    def plug(self, slot: Slot, /) -> None:
        self._slot = slot
        self._timer = slot.clock.timer(self._ended)
        slot.host.provide("watchdog", self)

    def unplug(self) -> None:
        self._timer.cancel()

    def set_action(self, action: str) -> None:
        """Change the action. Raises UsageError."""
        if action not in ACTIONS:
            raise UsageError(f'action "{action:.40}": expected one of {", ".join(ACTIONS)}')
        self.action = action

    def reset(self) -> None:
        """The timer stands; that it had expired stays known."""
        self.state = I6300esbState(expired=self.state.expired)
        self._timer.cancel()

    def save(self) -> I6300esbState:
        return deepcopy(self.state)

    def load(self, state: I6300esbState, /) -> None:
        first, second = state.ticks
        self.state = I6300esbState(
            (first & 0xFFFFF, second & 0xFFFFF),
            state.config & (INTERRUPT | FAST | SILENT),
            state.lock & (LOCKED | RUNS | AGAIN),
            min(max(state.key, 0), 2),
            state.stage if state.stage in (1, 2) else 0,
            state.until,
            state.expired,
        )
        if self.state.stage:
            self._timer.arm(self.state.until)
        else:
            self._timer.cancel()

    # configuration space

    def config_written(self, offset: int, size: int, /) -> None:
        """Act on what was written to the two registers."""
        state, config = self.state, self._function.config
        if offset < CONFIG + 2 and offset + size > CONFIG:
            state.config = int.from_bytes(config[CONFIG : CONFIG + 2], "little")
        if not offset <= LOCK < offset + size:
            return
        if state.lock & LOCKED:
            config[LOCK] = state.lock
            return
        before, state.lock = state.lock, config[LOCK]
        if not state.lock & RUNS:
            state.stage = 0
            self._timer.cancel()
        elif not before & RUNS:
            self._begin(1)

    def plug_pci(self, function: Any, /) -> None:
        self._function = function

    # memory

    def read(self, offset: int, size: int, /) -> int:
        if offset == RELOAD and size == 2:
            return EXPIRED | LINUX if self.state.expired else 0
        return 0

    def write(self, offset: int, size: int, value: int, /) -> None:
        state = self.state
        if offset == RELOAD and value in (0x80, 0x86):
            state.key = 1 if value == 0x80 else 2 if state.key == 1 else 0
            return
        opened, state.key = state.key == 2, 0
        if not opened:
            return
        if offset == RELOAD and size == 2:
            if value & FEED:
                self._begin(1)
            if value & (EXPIRED | LINUX):
                state.expired = False
        elif offset in TIMERS and size == 4:
            ticks = list(state.ticks)
            ticks[TIMERS.index(offset)] = value & 0xFFFFF
            state.ticks = ticks[0], ticks[1]

    # time

    def _begin(self, stage: int) -> None:
        state = self.state
        if state.lock & RUNS:
            ticks = state.ticks[stage - 1] << (5 if state.config & FAST else 15)
            # a timer that ends at once, for ever, would leave the machine no time
            state.stage, state.until = stage, self._slot.clock.now() + max(ticks * SECOND // HERTZ, SECOND // 1000)
            self._timer.arm(state.until)

    def _ended(self) -> None:
        state = self.state
        if state.stage == 1:
            self._begin(2)
            return
        state.stage = 0
        if not state.config & SILENT:
            state.expired = True
            self._act()
        if state.lock & AGAIN:
            self._begin(1)

    def _act(self) -> None:
        action, slot = self.action, self._slot
        if action != "none":
            slot.log.warning("the guest did not feed its watchdog", action=action)
        for one in list(self.listeners):
            one(action)
        if action == "reset":
            slot.power.reset("its watchdog expired")
        elif action == "poweroff":
            slot.power.stop("its watchdog expired")
        elif action == "pause":
            slot.power.pause("its watchdog expired")
        elif action == "shutdown":
            for plugged in slot.board.devices.values():
                if callable(press := getattr(plugged.device, "power_button", None)):
                    press()
                    return
            slot.log.warning("no device has a power button to press")
