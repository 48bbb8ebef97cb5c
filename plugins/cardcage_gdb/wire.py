"""Packets of GDB's remote serial protocol (GDB manual, appendix E.1). A peer is hostile: a packet has a bound."""

from __future__ import annotations

import re

__all__ = ["INTERRUPT", "MOST", "Splitter", "TooMuch", "frame", "hexadecimal"]

MOST = 0x4000
"""Bytes of a packet, as ``PacketSize`` tells the peer."""
INTERRUPT = b"\x03"
_SPECIAL = re.compile(rb"[#$}*]")


class TooMuch(Exception):
    """A packet without an end in sight."""


class Splitter:
    """Cuts what arrives into packets' contents; :data:`INTERRUPT` stands for a Ctrl-C between them.

    Attributes:
        acknowledges: packets are answered by ``+`` or ``-``, which :meth:`feed` says.
    """

    def __init__(self) -> None:
        self._held = bytearray()
        self.acknowledges = True

    def feed(self, data: bytes) -> list[tuple[bytes, bytes]]:
        """(content, acknowledgement) of each whole packet; no content where its checksum is wrong, or for the peer's
        ``-``, which asks for the last answer again: then that is the second. Raises TooMuch."""
        held = self._held
        held += data
        found: list[tuple[bytes, bytes]] = []
        while held:
            first = held[0]
            if first != 0x24:
                del held[0]
                if first == 3:
                    found.append((INTERRUPT, b""))
                elif first == 0x2D:
                    found.append((b"", b"-"))
                continue  # `+`, and whatever else stands between packets
            end = held.find(b"#", 1, MOST + 2)
            if end < 0 and len(held) > MOST + 1:
                raise TooMuch(f"a packet of more than {MOST} bytes")
            if end < 0 or len(held) < end + 3:
                break
            body, told = bytes(held[1:end]), bytes(held[end + 1 : end + 3])
            del held[: end + 3]
            if not self.acknowledges:
                found.append((body, b""))
            elif hexadecimal(told) == sum(body) & 0xFF:
                found.append((body, b"+"))
            else:
                found.append((b"", b"!"))
        return found


def unescape(body: bytes) -> bytes:
    """Binary data of a packet."""
    if b"}" not in body:
        return body
    return re.sub(rb"}(.)", lambda one: bytes([one[1][0] ^ 0x20]), body, flags=re.DOTALL)


def frame(content: bytes) -> bytes:
    """*content* as a packet; what has a meaning of its own in one is escaped."""
    body = _SPECIAL.sub(lambda one: bytes([0x7D, one[0][0] ^ 0x20]), content)
    return b"$%b#%02x" % (body, sum(body) & 0xFF)


def hexadecimal(text: bytes) -> int | None:
    """A number of hexadecimal digits, at most 64 bits; None for anything else."""
    if not 0 < len(text) <= 16 or text.strip(b"0123456789abcdefABCDEF"):
        return None
    return int(text, 16)
