"""Cards that were loaded, and which of them an exception came from, by its frames."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cardcage.values import frozen

if TYPE_CHECKING:
    from collections.abc import Iterable

GROUP = "cardcage"


@frozen
class CardInfo:
    """A card that was loaded: its name, its distribution (``name version``) and its module."""

    name: str
    distribution: str
    module: Any

    @property
    def ours(self) -> bool:
        """True for a card that comes with cardcage itself."""
        return self.distribution.partition(" ")[0] == GROUP


def card_of(error: BaseException, cards: Iterable[CardInfo]) -> CardInfo | None:
    """The card that *error* came from: the innermost, but a stranger's before one of ours that it called."""
    named: CardInfo | None = None
    for owner in owners_of(error, cards):
        if not isinstance(owner, str) and (named is None or not owner.ours or named.ours):
            named = owner
    return named


def owners_of(error: BaseException, cards: Iterable[CardInfo]) -> list[CardInfo | str]:
    """Whose code *error* went through, from the outermost frame to where it was raised.

    A card, or ``cardcage`` for the kernel and ``cardcage_cli`` for the command line; libraries are left out.
    """
    frame, parts = error.__traceback__, [(module_of(one.module).split("."), one) for one in cards]
    found: list[CardInfo | str] = []
    while frame is not None:
        name = str(frame.tb_frame.f_globals.get("__name__")).split(".")
        shared, card = max(((_shared(name, own), one) for own, one in parts), key=lambda one: one[0], default=(0, None))
        if card is not None and shared:
            found.append(card)
        elif name[0] in ("cardcage", "cardcage_cli"):
            found.append(name[0])
        frame = frame.tb_next
    return found


def _shared(name: list[str], other: list[str]) -> int:
    """Return how many packages two modules have in common: cards of one package may live side by side in it."""
    return next(
        (at for at, (one, two) in enumerate(zip(name, other, strict=False)) if one != two), min(len(name), len(other))
    )


def module_of(card: Any) -> str:
    """The name of a card's module, or of the one with the class of an object with hooks."""
    return str(getattr(card, "__name__", type(card).__module__))


def package_of(card: Any) -> str:
    """The top-level package of a card's module."""
    return module_of(card).partition(".")[0]
