"""What cards do wrong and a machine goes on from: each fault is said once, with the device, the card and the line.

A guest chooses the addresses that devices look at: a :exc:`~cardcage.memory.GuestMemoryError` that a card lets out is a
guest's mistake that the card did not see to, and must not end the machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cardcage._host.phases import card_of, package_of
from cardcage.errors import Denied

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from cardcage._host.cards import CardInfo
    from cardcage._host.log import Log
    from cardcage._machine.bus import Claim
    from cardcage.memory import GuestMemoryError

HELD = 1.0
"""Seconds for which a callback may hold the machine's lock without a word."""


class Faults:
    """Tells a machine's log. Thread-safe.

    Args:
        cards: those that may be to blame.
    """

    def __init__(self, log: Log, cards: Sequence[CardInfo]) -> None:
        self._log, self._cards = log, cards
        self._told: set[tuple[str, str, str]] = set()  # as many as there are devices and lines of code

    def spare(self, error: Denied | GuestMemoryError, device: str | None = "") -> None:
        """Say what *device* let out, which the guest goes on without."""
        if isinstance(error, Denied):
            self._log.warning("denied", why=str(error))
            return
        card = card_of(error, self._cards)
        at = line_of(error.__traceback__, package_of(card.module) if card else None)
        self._tell("card let a GuestMemoryError out", device, card, at, why=str(error))

    def misread(self, claim: Claim, offset: int, size: int, value: int) -> None:
        """Say that a read gave *value*, of which the guest sees only the lowest bytes."""
        card, at = self._code(claim.read)
        bits = value.bit_length()
        gave = f"{bits} bits" if bits > 128 else hex(value)
        what = f"read({offset:#x}, {size}) gave {gave}, expected 0 to {(1 << 8 * size) - 1:#x}"
        self._tell("card's read gave what does not fit", claim.name, card, at, why=what)

    def held(self, callback: Callable[[], None], seconds: float) -> None:
        """Say that *callback* took long. The kernel's own, of which ``device`` is None, run others: each is told."""
        device = getattr(callback, "device", "")
        if device is not None:
            card, at = self._code(getattr(callback, "callback", callback))
            self._tell("card held the machine's lock", device, card, at, seconds=round(seconds, 1))

    def _code(self, act: Any) -> tuple[CardInfo | None, str]:
        """The card that a callable is of, and where it begins."""
        while hasattr(act, "func"):  # functools.partial
            act = act.func
        code = getattr(act, "__code__", None) or getattr(type(act).__call__, "__code__", None)
        package = str(getattr(act, "__module__", "")).partition(".")[0]
        card = next((one for one in self._cards if package_of(one.module) == package), None)
        name = getattr(act, "__qualname__", type(act).__qualname__)
        return card, f"{code.co_filename}:{code.co_firstlineno}" if code else name

    def _tell(self, event: str, device: str | None, card: CardInfo | None, at: str, **values: Any) -> None:
        if (key := (event, device or "", at)) not in self._told:
            self._told.add(key)
            named = {"device": device or None, "card": card and f"{card.name} ({card.distribution})", "at": at}
            self._log.warning(event, **{name: one for name, one in named.items() if one}, **values)


def line_of(trace: TracebackType | None, package: str | None) -> str:
    """The innermost line of *package* in a traceback, or else the innermost outside of the kernel."""
    found = ""
    while trace is not None:
        top = str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0]
        if top == package or (package is None and top != "cardcage"):
            found = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found
