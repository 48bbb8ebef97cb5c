"""What cards do wrong and a machine goes on from: each fault is said once, with the device, the card and the line.

A guest chooses the addresses that devices look at, and where they answer. What a card lets out of that is a guest's
mistake that the card did not see to, and must not end the machine.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from cardcage._host.owners import card_of, package_of
from cardcage._machine.bus import TakenError
from cardcage.errors import Denied
from cardcage.memory import GuestMemoryError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from threading import RLock, Thread
    from types import TracebackType

    from cardcage._host.log import Log
    from cardcage._host.owners import CardInfo
    from cardcage._machine.bus import Claim

MISTAKES = (GuestMemoryError, TakenError)  # what a guest can make a card raise that does not see to it
SPARED = (Denied, *MISTAKES)  # what the guest goes on without
HELD = 1.0
"""Seconds for which a callback may hold the machine's lock without a word."""
LOCKED = ("locked", "deliver", "do_pause", "do_reset", "do_resume")
"""Functions of the kernel inside of which a card's code has the lock (:mod:`cardcage._machine.ops` and ``life``)."""


class Faults:
    """Tells a machine's log. Thread-safe.

    Args:
        cards: those that may be to blame.
    """

    def __init__(self, log: Log, cards: Sequence[CardInfo]) -> None:
        self.log, self._cards = log, cards
        self._told: set[tuple[str, str, str]] = set()  # as many as there are devices and lines of code

    def spare(self, error: Denied | GuestMemoryError | TakenError, device: str | None = "") -> None:
        """Say what *device* let out, which the guest goes on without."""
        if isinstance(error, Denied):
            self.log.warning("denied", why=str(error))
            return
        card = card_of(error, self._cards)
        at = line_of(error.__traceback__, package_of(card.module) if card else None)
        kind = "GuestMemoryError" if isinstance(error, GuestMemoryError) else "ConfigError"
        self._tell(f"card let a {kind} out", device, card, at, why=str(error))

    def misread(self, claim: Claim, offset: int, size: int, value: int) -> None:
        """Say that a read gave *value*, of which the guest sees only the lowest bytes."""
        card, at = self._code(claim.read)
        gave = hex(value) if (bits := value.bit_length()) <= 128 else f"{bits} bits"
        what = f"read({offset:#x}, {size}) gave {gave}, expected 0 to {(1 << 8 * size) - 1:#x}"
        self._tell("card's read gave what does not fit", claim.name, card, at, why=what)

    def held(self, callback: Callable[[], None], seconds: float) -> None:
        """Say that *callback* took long. The kernel's own, of which ``device`` is None, run others: each is told."""
        device = getattr(callback, "device", "")
        if device is not None:
            card, at = self._code(getattr(callback, "callback", callback))
            self._tell("card holds the machine's lock", device, card, at, seconds=round(seconds, 1))

    def stuck(self, lock: RLock, threads: Iterable[Thread]) -> None:
        """Say who of *threads* stays in a card's code while *lock* cannot be had: that one may never come back."""
        before = self._inside(threads)
        if lock.acquire(timeout=HELD):
            lock.release()
            return
        for thread, found in self._inside(threads).items():
            if before.get(thread) == found:
                self._tell("card holds the machine's lock", "", *found, thread=thread.name)

    def _inside(self, threads: Iterable[Thread]) -> dict[Thread, tuple[CardInfo, str]]:
        """The threads that are in a card's code under the lock: whose, and the innermost line."""
        frames, packages = sys._current_frames(), {package_of(one.module): one for one in self._cards}
        found: dict[Thread, tuple[CardInfo, str]] = {}
        for thread in threads:
            frame, inner = frames.get(thread.ident or 0), None
            while frame is not None and frame.f_code.co_name not in LOCKED:
                card = packages.get(str(frame.f_globals.get("__name__")).partition(".")[0])
                if inner is None and card is not None:
                    inner = card, f"{frame.f_code.co_filename}:{frame.f_lineno}"
                frame = frame.f_back
            if frame is not None and inner is not None:
                found[thread] = inner
        return found

    def _code(self, act: Any) -> tuple[CardInfo | None, str]:
        """The card that a callable is of, and where it begins."""
        while isinstance(act, partial):
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
            self.log.warning(event, **{name: one for name, one in named.items() if one}, **values)


def line_of(trace: TracebackType | None, package: str | None) -> str:
    """The innermost line of *package* in a traceback, or else the innermost outside of the kernel."""
    found = ""
    while trace is not None:
        top = str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0]
        if top == package or (package is None and top != "cardcage"):
            found = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found
