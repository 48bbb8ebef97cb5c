"""The phases of a machine's life, carried to cards by pluggy's caller, with a fault traced to its card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cardcage.errors import CardcageError, CardError, in_words

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pluggy

    from cardcage._host.cards import CardInfo
    from cardcage._host.log import Log


class Phases:
    """Calls hooks of the cards that take a machine.

    Args:
        manager: has all cards. own: a manager with one card alone, by its name.
    """

    def __init__(
        self, manager: pluggy.PluginManager, own: dict[str, pluggy.PluginManager], cards: list[CardInfo]
    ) -> None:
        self._manager, self._own, self._cards = manager, own, cards

    def call(self, phase: str, machine: Any) -> list[Any]:
        """Call ``cardcage_`` *phase*; return the results that are not None.

        Raises the first refusal, or CardError for any other exception of a card.
        """
        try:
            found: list[Any] = getattr(self._manager.hook, f"cardcage_{phase}")(machine=machine)
            return found
        except CardcageError:
            raise
        except Exception as error:  # a stranger's code: whatever it raises is the card's fault, and named so
            card = card_of(error, self._cards)
            who = f"card {card.name} ({card.distribution}): " if card is not None else ""
            raise CardError(f"{who}cardcage_{phase}: {in_words(error)}") from error

    def each(self, phase: str, machine: Any, log: Log) -> None:
        """Call ``cardcage_`` *phase* of each card on its own; what one raises is logged, and the others are called."""
        name = f"cardcage_{phase}"
        impls = reversed(getattr(self._manager.hook, name).get_hookimpls())
        for card in dict.fromkeys(one.plugin_name for one in impls):
            try:
                getattr(self._own[card].hook, name)(machine=machine)
            except Exception as error:  # one card's fault must not keep the others from giving back what they hold
                log.error("a card's hook failed", hook=name, card=card, error=repr(error))


def card_of(error: BaseException, cards: Iterable[CardInfo]) -> CardInfo | None:
    """The card that *error* came from: the innermost, but a stranger's before one of ours that it called."""
    frame, packages = error.__traceback__, {package_of(one.module): one for one in cards}
    named: CardInfo | None = None
    while frame is not None:
        card = packages.get(str(frame.tb_frame.f_globals.get("__name__")).partition(".")[0])
        if card is not None and (named is None or not card.ours or named.ours):
            named = card
        frame = frame.tb_next
    return named


def package_of(module: Any) -> str:
    """The top-level package of a card's module, or of the class of an object with hooks."""
    return str(getattr(module, "__name__", type(module).__module__)).partition(".")[0]
