"""Networks as text: ``user,hostfwd=tcp::2222-:22`` on the command line, ``user:hostfwd=...`` where a spec is text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attrs import fields, frozen
from cardcage.errors import NotOffered, near
from cardcage.pairs import join_pairs, parse_repeated, split_pairs, typed_pairs
from cardcage.registry import BackendOffer, resolve

if TYPE_CHECKING:
    from cardcage.host import Host

__all__ = [
    "parse_dgram",
    "parse_net_flag",
    "parse_null",
    "parse_stream",
    "parse_switch",
    "parse_tap",
    "parse_user",
]


@frozen
class _Card:
    """Keys of the network card; all others are the back end's."""

    id: str = ""
    mac: str = ""
    queues: int = 1


def _parse(text: str, options: str, first: str = "") -> dict[str, Any]:
    return typed_pairs(parse_repeated(text, first), resolve(f"cardcage_net.{options}")) if text else {}


def parse_null(text: str) -> dict[str, Any]:
    """Options of ``net:null``. Raises :exc:`ValueError`, as all of these."""
    return _parse(text, "null:Null")


def parse_tap(text: str) -> dict[str, Any]:
    """Options of ``net:tap``: ``tap0,bridge=br0``."""
    return _parse(text, "tap:Tap", "ifname")


def parse_user(text: str) -> dict[str, Any]:
    """Options of ``net:user``: ``hostfwd=tcp::2222-:22,hostfwd=udp::53-:53``."""
    return _parse(text, "user:User")


def parse_switch(text: str) -> dict[str, Any]:
    """Options of ``net:switch``: ``lan,listen=/run/lan.sock``."""
    return _parse(text, "switch:SwitchPort", "name")


def parse_stream(text: str) -> dict[str, Any]:
    """Options of ``net:stream``: ``unix:/run/lan.sock`` or ``listen=:4000``."""
    return _parse(text, "sockets:Stream", "connect")


def parse_dgram(text: str) -> dict[str, Any]:
    """Options of ``net:dgram``: ``127.0.0.1:4000,local=127.0.0.1:4001``."""
    return _parse(text, "sockets:Dgram", "remote")


def parse_net_flag(text: str, host: Host) -> dict[str, Any]:
    """``--net user,hostfwd=tcp::2222-:22`` as a ``virtio-net`` device.

    The first word is a back end of whichever card, which has its own words for the rest (its shorthand, or the keys of
    its options); ``id``, ``mac`` and ``queues`` are the device's. Raises :exc:`ValueError`, or NotOffered.
    """
    kind, _, rest = text.partition(",")
    known = [one.name.removeprefix("net:") for one in host.registry.offers(BackendOffer) if one.name.startswith("net:")]
    if kind in ("none", "nic") and kind not in known:
        raise ValueError(f'"{kind}" is not a network; leave --net out for none')
    if kind not in known:
        raise NotOffered(f'no network "{kind}".{near(kind, known) or " Known: " + ", ".join(sorted(known))}')
    offer = host.registry.get(BackendOffer, f"net:{kind}")
    takes_queues = any(one.name == "queues" for one in getattr(offer.load_options(), "__attrs_attrs__", ()))
    device: dict[str, Any] = {"type": "virtio-net"}
    own = []
    for part in split_pairs(rest) if rest else ():
        key, equals, value = part.partition("=")
        mine = bool(equals) and key in {one.name for one in fields(_Card)}
        if mine:
            device |= typed_pairs([(key, value)], _Card)
        if not mine or (key == "queues" and takes_queues):
            own.append(part)
    return {"device": [{**device, "net": {"type": kind, **host.expand(offer, join_pairs(own))}}]}
