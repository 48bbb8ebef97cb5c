"""Entries of a way out: names and addresses that may be reached.

It is read by the machine's process and by the gate, and imports nothing but the standard library.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv4Network
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["INSIDE", "OPENED", "READY", "Policy", "is_name", "is_special"]

READY, OPENED = b"ready\n", b"\0"
"""The gate's words: it has read its policy; a connection may begin."""

MOST = 256
"""Entries."""
INSIDE = IPv4Network("198.18.0.0/15")
"""Addresses of the guest's side (RFC 2544, for tests of networks: no server is there). Each name that the guest asks
for gets one, and no name's real address is told."""
NOWHERE = tuple(map(IPv4Network, ("0.0.0.0/8", "224.0.0.0/4", "240.0.0.0/4")))
LOOPBACK = IPv4Network("127.0.0.0/8")
SPECIAL = (
    *NOWHERE,
    LOOPBACK,
    INSIDE,
    *map(
        IPv4Network,
        "10.0.0.0/8 100.64.0.0/10 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 192.88.99.0/24 "
        "192.168.0.0/16 198.51.100.0/24 203.0.113.0/24".split(),
    ),
)
"""Not of the public network (IANA's registry of special-purpose addresses): a name does not lead there by itself."""
KINDS = ("tls", "http", "tcp")
USUAL = {443: "tls", 80: "http"}
"""Ports of a name that stands without one."""
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)", re.ASCII)
_PORT = re.compile(r"[0-9]{1,5}", re.ASCII)


def is_name(text: str) -> bool:
    """True for a name of the DNS in lower case, of at most 253 characters; an address is none."""
    labels = text.split(".")
    return len(text) <= 253 and all(map(_LABEL.fullmatch, labels)) and not labels[-1].isdigit()


def is_special(address: IPv4Address) -> bool:
    """True for an address that is not of the public network."""
    return any(address in one for one in SPECIAL)


class Named(NamedTuple):
    """An entry of a name: ``*.`` is any name below, whatever its depth. ports: port to kind."""

    name: str
    below: bool
    ports: dict[int, str]


class Addressed(NamedTuple):
    """An entry of addresses. port: the one that is open, 0 for all."""

    network: IPv4Network
    port: int


class Policy:
    """A list of names, with TLS on port 443 and HTTP on port 80 unless an entry says otherwise, and of addresses.

    Args:
        entries: at most 256, each one of

            - ``pypi.org``, ``*.pythonhosted.org``: TLS on 443 and HTTP on 80, for that name.
            - ``NAME:8443``, ``NAME:8080/http``, ``NAME:22/tcp``: one port; what is on it is TLS unless said otherwise,
              and ``tcp`` is not read along.
            - ``203.0.113.7``, ``10.1.0.0/16``, ``10.1.0.0/16:5432``: TCP to addresses, whatever is said.

    Raises ValueError, in words that name the entry.
    """

    def __init__(self, entries: Iterable[str]) -> None:
        self.entries = tuple(entries)
        if len(self.entries) > MOST:
            raise ValueError(f"{len(self.entries)} entries: expected {MOST} at most")
        self.names: list[Named] = []
        self.addresses: list[Addressed] = []
        for text in self.entries:
            if not isinstance(text, str):
                raise ValueError(f"{text!r:.80}: expected a name such as pypi.org, or a CIDR such as 10.1.0.0/16")
            self._add(text)

    def _add(self, text: str) -> None:
        where, colon, rest = text.lower().partition(":")
        if ":" in rest or where.startswith("["):
            raise ValueError(f'"{text:.80}": IPv6 is not let out: expected a name, or a CIDR such as 10.1.0.0/16')
        port, slash, kind = rest.partition("/")
        if (colon and not (_PORT.fullmatch(port) and 0 < int(port) < 65536)) or (slash and kind not in KINDS):
            raise ValueError(f'"{text:.80}": expected a port from 1 to 65535, and tls, http or tcp behind a slash')
        number = int(port or 0)
        name = where.removeprefix("*.")
        if is_name(name) and (name == where or "." in name):
            self.names.append(Named(name, name != where, {number: kind or "tls"} if number else USUAL))
            return
        try:
            network = IPv4Network(where)
        except ValueError as error:
            raise ValueError(
                f'"{text:.80}": expected a name such as pypi.org or *.pythonhosted.org, or a CIDR such as 10.1.0.0/16'
            ) from error
        if slash and kind != "tcp":
            raise ValueError(f'"{text:.80}": what is said to addresses is not read along: expected {where}:{port}')
        if any(network.subnet_of(one) for one in (*NOWHERE, INSIDE)):
            raise ValueError(f'"{text:.80}": no server has such an address')
        if network.subnet_of(LOOPBACK) and network.prefixlen < 32:
            raise ValueError(f'"{text:.80}": expected each of the host\'s own addresses by itself')
        self.addresses.append(Addressed(network, number))

    def ports_of(self, name: str) -> dict[int, str]:
        """The open ports of *name*, in lower case, and what is on each; empty for a name that is not open."""
        found: dict[int, str] = {}
        for one in self.names:
            if name.endswith(f".{one.name}") if one.below else name == one.name:
                for port, kind in one.ports.items():
                    found.setdefault(port, kind)
        return found

    def opens(self, address: IPv4Address, port: int) -> bool:
        """True where an entry of addresses opens *address*; a special one is only opened by an entry of such."""
        special = is_special(address)
        return any(
            address in one.network
            and one.port in (0, port)
            and (not special or any(one.network.subnet_of(other) for other in SPECIAL))
            for one in self.addresses
        )

    def names_host(self, address: IPv4Address, port: int) -> bool:
        """True where an entry opens *address* alone, as one of the host's own has to be."""
        return any(
            one.network.prefixlen == 32 and address in one.network and one.port in (0, port) for one in self.addresses
        )
