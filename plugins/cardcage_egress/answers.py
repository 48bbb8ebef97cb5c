"""Answers to the guest's questions: its address by DHCP (RFC 2131), and those of open names by DNS (RFC 1035)."""

from __future__ import annotations

from collections import OrderedDict
from ipaddress import IPv4Address
from struct import pack, unpack_from
from typing import NamedTuple

from cardcage_egress.packets import Malformed
from cardcage_egress.policy import INSIDE, is_name

__all__ = ["GATEWAY", "GUEST", "MTU", "Names", "Question", "lease"]

GATEWAY, GUEST, MASK = INSIDE[1].packed, INSIDE[2].packed, IPv4Address("255.255.255.252").packed
MTU = 65520
LEASE = 86400
TTL = 60
KEPT = 4096
"""Names that have an address at once."""
FIRST = 256
COOKIE = b"\x63\x82\x53\x63"
DISCOVER, OFFER, REQUEST, ACK = 1, 2, 3, 5
A, IN = 1, 1
NO_SUCH_NAME = 3


def lease(message: bytes) -> bytes | None:
    """The answer to a DHCP message; None for one that needs none. Raises Malformed."""
    if len(message) < 240 or message[0] != 1 or message[1:3] != b"\1\6" or message[236:240] != COOKIE:
        raise Malformed("DHCP: no request")
    at, asked = 240, 0
    while at < len(message) and message[at] != 255:
        if message[at] == 0:
            at += 1
            continue
        if at + 1 >= len(message) or at + 2 + message[at + 1] > len(message):
            raise Malformed("DHCP: wrong options")
        if message[at] == 53 and message[at + 1] == 1:
            asked = message[at + 2]
        at += 2 + message[at + 1]
    answer = {DISCOVER: OFFER, REQUEST: ACK}.get(asked)
    if answer is None:
        return None
    head = b"\2\1\6\0" + message[4:8] + bytes(8) + GUEST + GATEWAY + bytes(4) + message[28:44] + bytes(192) + COOKIE
    options = {
        53: bytes((answer,)),
        54: GATEWAY,
        51: pack(">I", LEASE),
        1: MASK,
        3: GATEWAY,
        6: GATEWAY,
        26: pack(">H", MTU),
    }
    return head + b"".join(bytes((code, len(value))) + value for code, value in options.items()) + b"\xff"


class Question(NamedTuple):
    """A question for a name. name: in lower case. raw: as it was asked."""

    id: int
    flags: int
    name: str
    type: int
    raw: bytes

    @classmethod
    def of(cls, message: bytes) -> Question:
        """The one question of *message*. Raises Malformed."""
        if not 17 <= len(message) <= 1232:
            raise Malformed("DNS: wrong length")
        id, flags, questions, answers, _, _ = unpack_from(">6H", message)
        if flags & 0xF800 or questions != 1 or answers:
            raise Malformed("DNS: expected a question")
        at, labels = 12, list[str]()
        while (size := message[at]) != 0:
            if size > 63 or at + 1 + size >= len(message):
                raise Malformed("DNS: wrong name")
            labels.append(message[at + 1 : at + 1 + size].decode("latin-1").lower())
            at += 1 + size
        if at + 5 > len(message):
            raise Malformed("DNS: too short")
        kind, class_ = unpack_from(">2H", message, at + 1)
        if class_ != IN:
            raise Malformed("DNS: not of the Internet")
        return cls(id, flags, ".".join(labels), kind, message[12 : at + 5])

    def answered(self, address: bytes | None) -> bytes:
        """The message with *address*; with None, there is no such name; of other types than A, there is none."""
        flags = 0x8480 | self.flags & 0x0100 | (NO_SUCH_NAME if address is None else 0)
        found = address is not None and self.type == A
        answer = pack(">HHHIH", 0xC00C, A, IN, TTL, 4) + address if found and address is not None else b""
        return pack(">6H", self.id, flags, 1, 1 if found else 0, 0, 0) + self.raw + answer


class Names:
    """Addresses of :data:`~cardcage_egress.policy.INSIDE` for names; beyond :data:`KEPT` the oldest name loses its."""

    def __init__(self) -> None:
        self._addresses: OrderedDict[str, int] = OrderedDict()
        self._names: dict[int, str] = {}
        self._next = FIRST

    def address(self, name: str) -> bytes:
        """The address of *name*, which is one."""
        assert is_name(name)
        found = self._addresses.get(name)
        if found is None:
            found = self._next
            self._next = FIRST + (found + 1 - FIRST) % KEPT
            if (old := self._names.pop(found, None)) is not None:
                del self._addresses[old]
            self._addresses[name], self._names[found] = found, name
        return INSIDE[found].packed

    def name(self, address: bytes) -> str | None:
        """The name that has *address*; None for none."""
        return self._names.get(int(IPv4Address(address)) - int(INSIDE[0]))
