"""Networks as text: ``user,hostfwd=tcp::2222-:22`` on the command line, ``user:hostfwd=...`` where a spec is text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cardcage.errors import near
from cardcage.pairs import parse_repeated

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "parse_dgram",
    "parse_net_flag",
    "parse_null",
    "parse_stream",
    "parse_switch",
    "parse_tap",
    "parse_user",
]

_BOOL = {"on": True, "off": False, "yes": True, "no": False, "true": True, "false": False}


def _bool(text: str) -> bool:
    if text not in _BOOL:
        raise ValueError(f'expected on or off, got "{text}"')
    return _BOOL[text]


def _int(text: str) -> int:
    if not text.isascii() or not text.isdecimal():
        raise ValueError(f'expected a whole number, got "{text}"')
    return int(text)


_TYPES: dict[str, tuple[str, dict[str, Callable[[str], Any]]]] = {
    "null": ("", {}),
    "tap": ("ifname", {"ifname": str, "bridge": str, "queues": _int, "vnet_header": _bool, "up": _bool, "mtu": _int}),
    "user": (
        "",
        {"address": str, "gateway": str, "dns": str, "interface": str, "mtu": _int, "ipv6": _bool, "engine": str},
    ),
    "switch": ("name", {"name": str, "listen": str}),
    "stream": ("connect", {"connect": str, "listen": str, "reconnect": str}),
    "dgram": ("remote", {"remote": str, "local": str}),
}
"""By type: the key that a first word without a key stands for, and what turns each key's text into a value."""
_DEVICE: dict[str, Callable[[str], Any]] = {"id": str, "mac": str, "queues": _int}


def _options(kind: str, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    known: dict[str, Callable[[str], Any]] = {**_TYPES[kind][1], "dump": str}
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key == "hostfwd" and kind == "user":
            found.setdefault(key, []).append(value)
            continue
        if key not in known:
            names = [*known, *(["hostfwd"] if kind == "user" else [])]
            raise ValueError(f'no key "{key}".{near(key, names) or " Known: " + ", ".join(sorted(names))}')
        if key in found:
            raise ValueError(f'"{key}" is given twice')
        try:
            found[key] = known[key](value)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
    return found


def _parse(kind: str, text: str) -> dict[str, Any]:
    return _options(kind, parse_repeated(text, _TYPES[kind][0])) if text else {}


def parse_null(text: str) -> dict[str, Any]:
    """Options of ``net:null``. Raises :exc:`ValueError`, as all of these."""
    return _parse("null", text)


def parse_tap(text: str) -> dict[str, Any]:
    """Options of ``net:tap``: ``tap0,bridge=br0``."""
    return _parse("tap", text)


def parse_user(text: str) -> dict[str, Any]:
    """Options of ``net:user``: ``hostfwd=tcp::2222-:22,hostfwd=udp::53-:53``."""
    return _parse("user", text)


def parse_switch(text: str) -> dict[str, Any]:
    """Options of ``net:switch``: ``lan,listen=/run/lan.sock``."""
    return _parse("switch", text)


def parse_stream(text: str) -> dict[str, Any]:
    """Options of ``net:stream``: ``unix:/run/lan.sock`` or ``listen=:4000``."""
    return _parse("stream", text)


def parse_dgram(text: str) -> dict[str, Any]:
    """Options of ``net:dgram``: ``127.0.0.1:4000,local=127.0.0.1:4001``."""
    return _parse("dgram", text)


def parse_net_flag(text: str) -> dict[str, Any]:
    """``--net user,hostfwd=tcp::2222-:22`` as a ``virtio-net`` device.

    The first word is the type; ``id``, ``mac`` and ``queues`` are the device's. Raises :exc:`ValueError`.
    """
    kind, comma, rest = text.partition(",")
    if kind in ("none", "nic"):
        raise ValueError(f'"{kind}" is not a network; leave --net out for none')
    if kind not in _TYPES:
        raise ValueError(f'no network "{kind}".{near(kind, _TYPES) or " Known: " + ", ".join(sorted(_TYPES))}')
    pairs = parse_repeated(rest, _TYPES[kind][0]) if comma else []
    device: dict[str, Any] = {"type": "virtio-net"}
    for key, value in pairs:
        if key in _DEVICE:
            device[key] = _DEVICE[key](value)
    own = [(key, value) for key, value in pairs if key not in _DEVICE or (key == "queues" and kind == "tap")]
    return {"device": [{**device, "net": {"type": kind, **_options(kind, own)}}]}
