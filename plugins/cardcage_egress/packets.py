"""Packets of the guest, taken apart and made: Ethernet, ARP, IPv4, UDP and TCP (RFC 826, 791, 768, 9293).

Each length and checksum of the guest is checked; what does not fit raises :exc:`Malformed`. Nothing is kept.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

__all__ = ["ACK", "FIN", "PSH", "RST", "SYN", "Arp", "Datagram", "Ip", "Malformed", "Segment"]

FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
UDP, TCP = 17, 6
_ETHERNET = Struct(">6s6sH")
_ARP = Struct(">HHBBH6s4s6s4s")
_IP = Struct(">BBHHHBBH4s4s")
_UDP = Struct(">HHHH")
_TCP = Struct(">HHIIBBHHH")


class Malformed(Exception):
    """A packet that is none; the message says in few words why."""


def total(data: bytes) -> int:
    """The ones' complement sum of the 16-bit words of *data* (RFC 1071), as a number modulo 65535."""
    return int.from_bytes(data if len(data) % 2 == 0 else data + b"\0", "big") % 65535


class Arp(NamedTuple):
    """A question for an address."""

    by: bytes
    sender: bytes
    target: bytes

    @classmethod
    def of(cls, frame: bytes) -> Arp | None:
        """The question in *frame*; None for what is no question."""
        if len(frame) < 14 + _ARP.size:
            raise Malformed("ARP: too short")
        hard, proto, hlen, plen, act, mac, sender, _, target = _ARP.unpack_from(frame, 14)
        if (hard, proto, hlen, plen, act) != (1, 0x0800, 6, 4, 1):
            return None
        return cls(mac, sender, target)

    def answered(self, mac: bytes) -> bytes:
        """The frame that answers it."""
        head = _ETHERNET.pack(self.by, mac, 0x0806)
        return (head + _ARP.pack(1, 0x0800, 6, 4, 2, mac, self.target, self.by, self.sender)).ljust(60, b"\0")


class Ip(NamedTuple):
    """An IPv4 packet that is whole."""

    source: bytes
    target: bytes
    protocol: int
    payload: bytes

    @classmethod
    def of(cls, frame: bytes) -> Ip:
        """The packet in *frame*. Raises Malformed, for fragments and options too."""
        if len(frame) < 34:
            raise Malformed("IPv4: too short")
        first, _, length, _, part, _, protocol, _, source, target = _IP.unpack_from(frame, 14)
        if first != 0x45:
            raise Malformed("IPv4 with options")
        if not 20 <= length <= len(frame) - 14:
            raise Malformed("IPv4: wrong length")
        if part & 0x3FFF:  # more to come, or not the first
            raise Malformed("a fragment")
        if part & 0x8000 or total(frame[14:34]):
            raise Malformed("IPv4: wrong header")
        return cls(source, target, protocol, frame[34 : 14 + length])

    def pseudo(self) -> int:
        """The part of the checksum of UDP and TCP that is of this layer."""
        return total(self.source + self.target) + self.protocol + len(self.payload)

    def framed(self, to: bytes, by: bytes) -> bytes:
        """The frame that carries it from *by* to *to*."""
        length = 20 + len(self.payload)
        head = _IP.pack(0x45, 0, length, 0, 0x4000, 64, self.protocol, 0, self.source, self.target)
        head = head[:10] + (-total(head) % 65535).to_bytes(2, "big") + head[12:]
        return _ETHERNET.pack(to, by, 0x0800) + head + self.payload


class Datagram(NamedTuple):
    """A UDP datagram."""

    source: int
    target: int
    data: bytes

    @classmethod
    def of(cls, ip: Ip) -> Datagram:
        """The datagram in *ip*. Raises Malformed."""
        if len(ip.payload) < 8:
            raise Malformed("UDP: too short")
        source, target, length, checksum = _UDP.unpack_from(ip.payload)
        if length != len(ip.payload):
            raise Malformed("UDP: wrong length")
        if checksum and (ip.pseudo() + total(ip.payload)) % 65535:
            raise Malformed("UDP: wrong checksum")
        return cls(source, target, ip.payload[8:])

    def packed(self, source: bytes, target: bytes) -> Ip:
        """The packet that carries it."""
        length = 8 + len(self.data)
        ip = Ip(source, target, UDP, _UDP.pack(self.source, self.target, length, 0) + self.data)
        checksum = (-(ip.pseudo() + total(ip.payload)) % 65535) or 65535
        return ip._replace(payload=ip.payload[:6] + checksum.to_bytes(2, "big") + self.data)


class Segment(NamedTuple):
    """A TCP segment. mss: 0 where it is not told. scale: of windows, -1 where it is not told."""

    source: int
    target: int
    seq: int
    ack: int
    flags: int
    window: int
    data: bytes = b""
    mss: int = 0
    scale: int = -1

    @classmethod
    def of(cls, ip: Ip) -> Segment:
        """The segment in *ip*. Raises Malformed."""
        payload = ip.payload
        if len(payload) < 20:
            raise Malformed("TCP: too short")
        source, target, seq, ack, words, flags, window, _, _ = _TCP.unpack_from(payload)
        length = (words >> 4) * 4
        if not 20 <= length <= len(payload):
            raise Malformed("TCP: wrong length")
        if (ip.pseudo() + total(payload)) % 65535:
            raise Malformed("TCP: wrong checksum")
        mss, scale = _options(payload[20:length]) if flags & SYN else (0, -1)
        return cls(source, target, seq, ack, flags & 0x1F, window, payload[length:], mss, scale)

    def packed(self, source: bytes, target: bytes) -> Ip:
        """The packet that carries it."""
        options = b""
        if self.mss:
            options += b"\2\4" + self.mss.to_bytes(2, "big")
        if self.scale >= 0:
            options += b"\1\3\3" + bytes((self.scale,))
        head = _TCP.pack(
            self.source, self.target, self.seq, self.ack, (5 + len(options) // 4) << 4, self.flags, self.window, 0, 0
        )
        ip = Ip(source, target, TCP, head + options + self.data)
        checksum = -(ip.pseudo() + total(ip.payload)) % 65535
        return ip._replace(payload=head[:16] + checksum.to_bytes(2, "big") + head[18:] + options + self.data)


def _options(data: bytes) -> tuple[int, int]:
    """The maximum segment size, and the scale of windows."""
    mss, scale, at = 0, -1, 0
    while at < len(data) and data[at] != 0:
        if data[at] == 1:
            at += 1
            continue
        if at + 1 >= len(data) or not 2 <= data[at + 1] <= len(data) - at:
            raise Malformed("TCP: wrong options")
        value = data[at + 2 : at + data[at + 1]]
        if data[at] == 2 and len(value) == 2:
            mss = int.from_bytes(value, "big")
        elif data[at] == 3 and len(value) == 1:
            scale = min(value[0], 14)
        at += data[at + 1]
    return mss, scale
