"""What is read along in TLS and HTTP: what is meant for the server goes on, and nothing else, in whatever dress."""

from __future__ import annotations

import ssl
from contextlib import suppress
from typing import Any

import pytest
from cardcage_egress.reading import HELLO, HttpReader, Refused, TlsReader
from egress_lab import extension, hello, named, record
from hypothesis import example, given
from hypothesis import strategies as st

pytestmark = pytest.mark.once
BYTES = st.binary(max_size=200)
REQUEST = b"GET / HTTP/1.1\r\nHost: good.test\r\n"


def client_hello(name: str) -> bytes:
    """What Python's own client says first."""
    into, out = ssl.MemoryBIO(), ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        ssl.create_default_context().wrap_bio(into, out, server_hostname=name).do_handshake()
    return out.read()


def fed(reader: Any, data: bytes, size: int = 1 << 20, passed: list[bytes] | None = None) -> bytes:
    """What goes on of *data*, said in pieces of *size*; up to a refusal it is in *passed*."""
    found = [] if passed is None else passed
    for at in range(0, len(data), size):
        found.append(reader.feed(data[at : at + size]))
    return b"".join(found)


@pytest.mark.parametrize("size", [1, 3, 7, 1 << 20])
def test_tls_goes_on_as_it_is(size: int) -> None:
    """What a client says to the server of the right name goes on byte by byte, in whatever pieces it comes."""
    said = client_hello("good.test")
    after = record(b"\1", 20) + record(b"\x16" * 300, 22) + record(b"x" * 16000, 23)
    assert fed(TlsReader("good.test"), said + after, size) == said + after
    pieces = b"".join(record(hello(GOOD)[at : at + 9]) for at in range(0, len(hello(GOOD)), 9))
    assert fed(TlsReader("good.test"), pieces, size) == pieces


GOOD, EVIL = named(b"good.test"), named(b"evil.test")
TLS_GAMES = {
    "another name": record(hello(EVIL)),
    "no name": record(hello()),
    "an empty name": record(hello(named(b""))),
    "two names": record(hello(named(b"good.test", b"evil.test"))),
    "two extensions": record(hello(GOOD, named(b"evil.test"))),
    "a name with a zero": record(hello(named(b"good.test\0.evil.test"))),
    "a name with a dot behind": record(hello(named(b"good.test."))),
    "a name below": record(hello(named(b"evil.good.test"))),
    "a name of another kind": record(hello(extension(0, b"\0\4\1\0\1a"))),
    "an encrypted name": record(hello(GOOD, extension(0xFE0D, bytes(40)))),
    "an old encrypted name": record(hello(GOOD, extension(0xFFCE, bytes(40)))),
    "in pieces": b"".join(record(hello(EVIL)[at : at + 5]) for at in range(0, len(hello(EVIL)), 5)),
    "more behind it": record(hello(GOOD) + hello(EVIL)),
    "a second one": record(hello(GOOD)) + record(hello(EVIL)),
    "a second one behind a change of ciphers": record(hello(GOOD)) + record(b"\1", 20) + record(hello(EVIL)),
    "a second one behind early data": record(hello(GOOD)) + record(b"x" * 99, 23) + record(hello(EVIL)),
    "a second one in pieces": record(hello(GOOD)) + record(hello(EVIL)[:3]) + record(hello(GOOD)[3:] + b"x"),
    "another message first": record(b"\2" + hello(GOOD)[1:]),
    "data first": record(b"GET / HTTP/1.1", 23),
    "data within": record(hello(GOOD)[:9]) + record(b"x", 23),
    "an empty record": record(b""),
    "an old hello": b"\x80\x2e\1\3\1" + bytes(40),
    "no TLS": b"GET / HTTP/1.1\r\nHost: good.test\r\n\r\n",
    "SSH": b"SSH-2.0-x\r\n",
    "a wrong length": record(hello(GOOD)[:-1] + b"xx"),
    "one that is too long": record(b"\1\xff\xff\xff" + bytes(9)),
    "one without an end": record(b"\1\0\x7f\0" + bytes(16000)) * 5,
    "one in very small pieces": record(b"\1") * 40,
}


@pytest.mark.parametrize("size", [1, 4, 1 << 20])
@pytest.mark.parametrize("what", TLS_GAMES)
def test_games_with_tls(what: str, size: int) -> None:
    """A ClientHello for any other server is not let through, nor half of it, however it is dressed up."""
    passed: list[bytes] = []
    with pytest.raises(Refused):
        fed(TlsReader("good.test"), TLS_GAMES[what], size, passed)
    assert b"evil" not in b"".join(passed)


@given(st.lists(BYTES, max_size=8), st.lists(st.integers(0, 400), max_size=3))
@example([b"\x16\3\1\0\0"], [])
def test_tls_of_any_kind(pieces: list[bytes], cuts: list[int]) -> None:
    """Whatever is said, what goes on is a beginning of it, and what is held is bounded."""
    data = record(hello(GOOD)) + b"".join(pieces)
    for at in cuts:
        data = data[:at] + data[at + 1 :]
    reader, passed = TlsReader("good.test"), b""
    with suppress(Refused):
        for at in range(0, len(data), 50):
            passed += reader.feed(data[at : at + 50])
            assert len(reader._held) + len(reader._coming) <= 3 * HELLO
    assert data.startswith(passed)


def test_http_goes_on() -> None:
    """Requests to the right server go on, one behind another on a connection, with their bodies."""
    first = b"POST /a?b HTTP/1.1\r\nHost: Good.test\r\nX-A: b\r\nContent-Length: 5\r\n\r\nhello"
    chunks = b"PUT http://good.test:80/b HTTP/1.1\r\nHost: good.test:80\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks += b"3\r\nabc\r\n0\r\n\r\n"
    old = b"GET /c HTTP/1.0\r\nHost: good.test\r\n\r\n"
    for size in (1, 10, 4096):
        told = fed(HttpReader("good.test", 80), first + chunks + old, size)
        assert told.startswith(first)
        assert b"PUT http://good.test:80/b HTTP/1.1\r\n" in told
        assert size < 100 or b"\r\n3\r\nabc\r\n0\r\n" in told  # else in chunks that are smaller
        assert told.endswith(b"GET /c HTTP/1.0\r\nHost: good.test\r\n\r\n")


def test_http_stays_http() -> None:
    """A request that would become another protocol is asked as one that stays."""
    told = fed(
        HttpReader("good.test", 80),
        REQUEST + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n\r\n",
    )
    assert told == b"GET / HTTP/1.1\r\nHost: good.test\r\nConnection: keep-alive\r\n\r\n"


HTTP_GAMES = {
    "another host": b"GET / HTTP/1.1\r\nHost: evil.test\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "no host, of old": b"GET / HTTP/1.0\r\n\r\n",
    "two hosts": REQUEST + b"Host: evil.test\r\n\r\n",
    "two hosts in one": b"GET / HTTP/1.1\r\nHost: good.test, evil.test\r\n\r\n",
    "another port": b"GET / HTTP/1.1\r\nHost: good.test:81\r\n\r\n",
    "a user": b"GET / HTTP/1.1\r\nHost: good.test@evil.test\r\n\r\n",
    "a whole address": b"GET http://evil.test/ HTTP/1.1\r\nHost: good.test\r\n\r\n",
    "a whole address with a user": b"GET http://good.test@evil.test/ HTTP/1.1\r\nHost: good.test\r\n\r\n",
    "an address of another kind": b"GET https://good.test/ HTTP/1.1\r\nHost: good.test\r\n\r\n",
    "CONNECT": b"CONNECT evil.test:443 HTTP/1.1\r\nHost: good.test\r\n\r\n",
    "CONNECT to the right one": b"CONNECT good.test:80 HTTP/1.1\r\nHost: good.test\r\n\r\n",
    "a second request": REQUEST + b"\r\nGET / HTTP/1.1\r\nHost: evil.test\r\n\r\n",
    "two lengths": REQUEST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET",
    "two lengths that differ": REQUEST + b"Content-Length: 4\r\nContent-Length: 40\r\n\r\nabcd",
    "a coding of its own": REQUEST + b"Transfer-Encoding: xchunked\r\n\r\n",
    "a space before the colon": b"GET / HTTP/1.1\r\nHost : evil.test\r\nHost: good.test\r\n\r\n",
    "a header without a name": REQUEST + b": x\r\n\r\n",
    "a bare return": b"GET / HTTP/1.1\r\nX: a\rHost: evil.test\r\nHost: good.test\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a head without an end": REQUEST + b"X: " + b"a" * 40000,
    "TLS": record(hello(GOOD)),
    "another protocol": b"SSH-2.0-x\r\n\r\n",
}


@pytest.mark.parametrize("size", [1, 1 << 20])
@pytest.mark.parametrize("what", HTTP_GAMES)
def test_games_with_http(what: str, size: int) -> None:
    """A request for any other server is not let through, however it is dressed up."""
    passed: list[bytes] = []
    with pytest.raises(Refused):
        fed(HttpReader("good.test", 80), HTTP_GAMES[what], size, passed)
    assert b"evil" not in b"".join(passed)


@given(st.lists(BYTES, max_size=6))
def test_http_of_any_kind(pieces: list[bytes]) -> None:
    """Whatever is said, it is refused, or goes on as HTTP."""
    reader = HttpReader("good.test", 80)
    with suppress(Refused):
        for one in (REQUEST, *pieces):
            reader.feed(one)
