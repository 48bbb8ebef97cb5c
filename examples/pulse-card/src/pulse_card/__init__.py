"""A card of one conversation: the pulse of a running machine."""

from cardcage.hookspecs import hookimpl
from cardcage.registry import Registry
from cardcage_fleet import SessionOffer


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer the command, and what a machine does at it."""
    registry.command(
        "pulse", "pulse_card.pulse:run", configure="pulse_card.pulse:configure", help="feel a machine's pulse"
    )
    registry.add(SessionOffer("pulse", "pulse_card.pulse:beat", help="a line for each beat"))
