"""Card ``stripe``: the block back end ``striped``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.hookspecs import hookimpl

if TYPE_CHECKING:
    from cardcage.registry import Registry


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer the back end."""
    registry.backend(
        "block",
        "striped",
        "stripe_card.striped:open_striped",
        options="stripe_card.striped:StripedOptions",
        shorthand="stripe_card.striped:parse_striped",
        help="a disk whose stripes lie in turn in several files",
    )
