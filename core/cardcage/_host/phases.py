"""The phases of a machine's life, carried to cards by pluggy's caller, with a fault traced to its card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cardcage._host.owners import CardInfo, card_of
from cardcage.errors import FAULTS, CardcageError, CardError, UsageError, in_words

if TYPE_CHECKING:
    import pluggy

    from cardcage._host.log import Log


class Phases:
    """Calls hooks of the cards that take a machine.

    Args:
        manager: has all cards.
    """

    def __init__(self, manager: pluggy.PluginManager, cards: list[CardInfo]) -> None:
        self._manager, self._cards = manager, cards

    def call(self, phase: str, machine: Any) -> list[Any]:
        """Call ``cardcage_`` *phase*; return the results that are not None.

        Raises the first refusal, or CardError for any other exception of a card.
        """
        try:
            found: list[Any] = getattr(self._manager.hook, f"cardcage_{phase}")(machine=machine)
            return found
        except FAULTS as error:  # a stranger's code: whatever it raises is the card's fault, and named so
            if isinstance(error, CardcageError) and not isinstance(error, UsageError):
                raise
            card = card_of(error, self._cards)
            who = f"card {card.name} ({card.distribution}): " if card is not None else ""
            raise CardError(f"{who}cardcage_{phase}: {in_words(error)}") from error

    def each(self, phase: str, machine: Any, log: Log) -> None:
        """Call ``cardcage_`` *phase* of each card on its own; what one raises is logged, and the others are called."""
        name = f"cardcage_{phase}"
        impls = reversed(getattr(self._manager.hook, name).get_hookimpls())
        having = {one.plugin_name: one.plugin for one in impls}
        for card, plugin in having.items():
            try:
                others = [one for one in having.values() if one is not plugin]
                self._manager.subset_hook_caller(name, others)(machine=machine)
            except FAULTS as error:  # one card's fault must not keep the others from giving back what they hold
                log.error("a card's hook failed", hook=name, card=card, error=in_words(error))
