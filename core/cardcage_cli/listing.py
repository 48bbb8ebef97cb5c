"""``cardcage cards``: what is installed, from which distribution, usable here or why not."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from cardcage import registry
from cardcage._machine.abilities import abilities_of, near_misses_of
from cardcage._machine.building import probe_of
from cardcage.errors import FAULTS, CardcageError, in_words
from cardcage.registry import AcceleratorOffer, DeviceOffer, Offer

if TYPE_CHECKING:
    from cardcage.host import Host

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
    for kind in kinds(host):
        offers = [offer for offer in host.registry.offers(kind) if offer.card == card]
        if kind is AcceleratorOffer:
            accelerators = host.registry.offers(AcceleratorOffer)
            parts += [f"accelerator {one.name} ({usable(one)})" for one in accelerators if one.card == card]
        elif offers:
            parts.append(f"{kind.kind} {', '.join(offer.name + missing(offer) for offer in offers)}")
    return "; ".join(parts) or "offers nothing by name"


def kinds(host: Host) -> list[type[Offer]]:
    """The kinds of offers: the kernel's, then those of cards."""
    found = {type(offer) for offer in host.registry}
    known = [one for one in vars(registry).values() if isinstance(one, type) and one in found]
    return [*known, *sorted(found - set(known), key=lambda one: one.kind)]


def missing(offer: Offer) -> str:
    """Return the extra that an offer still needs here, in brackets; empty when it has all."""
    if offer.needs:
        try:
            offer.load()
        except CardcageError as error:
            return f" ({str(error).removeprefix(f'{offer.name}: ')})"
    return ""


def usable(offer: AcceleratorOffer) -> str:
    """Return the result of an accelerator's probe."""
    _, probe = probe_of(offer)
    state = f"usable, {probe.speed}" if probe.usable else "not usable"
    return f"{state}: {probe.reason}" if probe.reason else state


def details(offer: Offer) -> list[str]:
    """Lines about one offer: what it is, whether it loads, its options and what the device can do."""
    lines = [f"{offer.kind} {offer.name}{': ' + offer.help if offer.help else ''}"]
    try:
        made = offer.load()
        options = offer.load_options()
    except CardcageError as error:
        return [*lines, f"  not usable here: {error}"]
    try:
        misses = [f"  {line}" for line in near_misses_of(offer, made)]
    except FAULTS as error:  # a stranger's factory: whatever it raises is no reason to list nothing else
        misses = [f"  not usable here: {in_words(error)}"]
    if isinstance(offer, DeviceOffer) and inspect.isclass(made):
        try:
            found = sorted(abilities_of(made, offer.name))
        except CardcageError as error:
            return [*lines, f"  broken: {error}", *misses]
        where = [
            f"{type(one).__name__.lower()} {one.size}" + (f" at {one.base:#x}" if one.base is not None else "")
            for one in offer.regions
        ]
        lines.append(
            f"  on {offer.bus}; {', '.join(where) or 'no fixed regions'}; can: {', '.join(found) or 'read, write'}"
        )
    lines += misses
    fields = getattr(options, "__attrs_attrs__", ())
    if fields:
        lines.append(f"  options: {', '.join(one.name for one in fields)}")
    return lines
