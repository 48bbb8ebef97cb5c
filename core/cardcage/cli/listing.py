"""``cardcage cards``: what is installed, from which distribution, usable here or why not."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from cardcage.abilities import abilities_of
from cardcage.assembly import probe_of
from cardcage.errors import CardcageError
from cardcage.registry import KINDS

if TYPE_CHECKING:
    from cardcage.host import Host
    from cardcage.registry import Offer

__all__ = ["list_cards"]


def list_cards(host: Host, *, verbose: bool) -> int:
    """Print the list. Returns 0, also when a card is broken: the list says so."""
    rows = [(card.name, card.distribution, summary(host, card.name)) for card in host.cards]
    rows += [(card.name, card.distribution, f"broken: {card.reason}") for card in host.broken]
    rows.sort()
    wide, wider = (max((len(row[at]) for row in rows), default=0) for at in (0, 1))
    for name, distribution, text in rows:
        print(f"{name:{wide}}  {distribution:{wider}}  {text}".rstrip())
        if verbose:
            for offer in host.registry:
                if offer.card == name:
                    for line in details(offer):
                        print(f"    {line}")
    return 0


def summary(host: Host, card: str) -> str:
    """The names that *card* offers, by kind."""
    parts = []
    for kind in KINDS:
        offers = [offer for offer in host.registry if offer.card == card and offer.kind == kind]
        if kind == "accelerator":
            parts += [f"accelerator {offer.name} ({usable(offer)})" for offer in offers]
        elif offers:
            parts.append(f"{kind} {', '.join(offer.name + missing(offer) for offer in offers)}")
    return "; ".join(parts) or "offers nothing yet"


def missing(offer: Offer) -> str:
    """What an offer with an extra still needs here, in brackets; empty when it has all."""
    if offer.needs:
        try:
            offer.load()
        except CardcageError as error:
            return f" ({str(error).removeprefix(f'{offer.name}: ')})"
    return ""


def usable(offer: Offer) -> str:
    """What an accelerator's probe says."""
    _, probe = probe_of(offer)
    state = f"usable, {probe.speed}" if probe.usable else "not usable"
    return f"{state}: {probe.reason}" if probe.reason else state


def details(offer: Offer) -> list[str]:
    """Lines about one offer: what it is, whether it loads, its options and what the device can do."""
    lines = [f"{offer.kind} {offer.name}{': ' + offer.help if offer.help else ''}"]
    try:
        made = offer.load()
        options = offer.load_options() if offer.kind != "command" else None
    except CardcageError as error:
        return [*lines, f"  not usable here: {error}"]
    if offer.kind == "device" and inspect.isclass(made):
        try:
            found = sorted(abilities_of(made, offer.name))
        except CardcageError as error:
            return [*lines, f"  broken: {error}"]
        where = [
            f"{type(one).__name__.lower()} {one.size}" + (f" at {one.base:#x}" if one.base is not None else "")
            for one in offer.regions
        ]
        lines.append(
            f"  on {offer.bus}; {', '.join(where) or 'no fixed regions'}; can: {', '.join(found) or 'read, write'}"
        )
    fields = getattr(options, "__attrs_attrs__", ())
    if fields:
        lines.append(f"  options: {', '.join(one.name for one in fields)}")
    return lines
