"""Reading along in what a guest says to a server: whom it is meant for.

A reader takes bytes as they come and gives back what may go on, nothing until it knows; it raises :exc:`Refused`. What
it holds back is bounded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

    import h11

__all__ = ["HttpReader", "Reader", "Refused", "TlsReader", "server_name"]

HELLO = 32768
"""Bytes of a ClientHello."""
HEAD = 16384
"""Bytes of a request's head."""
RECORD = 16384 + 256
HANDSHAKE, CLIENT_HELLO = 22, 1
SERVER_NAME, ENCRYPTED = 0, (0xFE0D, 0xFFCE)
FIRST = 6
"""Bytes of a record by which a ClientHello is known."""


class Refused(Exception):
    """Not meant for the server, what was said; the message says in a few words of ASCII why."""


class Reader(Protocol):
    """Someone who reads along."""

    def feed(self, data: bytes, /) -> bytes:
        """Take bytes; those that may go on now. Raises Refused."""


class Parts:
    """Fields of a message, one behind another."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> bytes:
        found = self._data[self._at : self._at + count]
        if len(found) != count:
            raise Refused("TLS: a wrong ClientHello")
        self._at += count
        return found

    def vector(self, size: int) -> bytes:
        """Bytes behind their length, which has *size* bytes."""
        return self.take(int.from_bytes(self.take(size), "big"))

    @property
    def left(self) -> bool:
        return self._at < len(self._data)

    def end(self) -> None:
        if self.left:
            raise Refused("TLS: a wrong ClientHello")


def server_name(hello: bytes) -> str:
    """The server's name in a ClientHello (RFC 8446, RFC 6066), as it is there. Raises Refused."""
    parts = Parts(hello)
    parts.take(4 + 2 + 32)
    parts.vector(1)
    parts.vector(2)
    parts.vector(1)
    extensions = Parts(parts.vector(2)) if parts.left else Parts(b"")
    parts.end()
    found: list[bytes] = []
    while extensions.left:
        kind, body = int.from_bytes(extensions.take(2), "big"), extensions.vector(2)
        if kind in ENCRYPTED:
            raise Refused("TLS with an encrypted server name")
        if kind == SERVER_NAME:
            whole = Parts(body)
            names = Parts(whole.vector(2))
            whole.end()
            while names.left:
                if names.take(1) != b"\0":
                    raise Refused("TLS: a server name of an unknown kind")
                found.append(names.vector(2))
    if not found:
        raise Refused("TLS without a server name")
    if len(found) > 1:
        raise Refused("TLS with several server names")
    return found[0].decode("latin-1")


class TlsReader:
    """TLS for *name* and no other: each ClientHello that can be read is looked at, a second one too."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._coming = b""  # of a record that is looked at: its head, and what there is of it
        self._held = b""  # records of a ClientHello that is not whole
        self._hello = b""
        self._left = 0  # of a record that goes on as it is
        self._first = True

    def feed(self, data: bytes, /) -> bytes:
        """See :class:`Reader`."""
        return b"".join(self._read(data))

    def _read(self, data: bytes) -> Iterator[bytes]:
        while data:
            if self._left:
                piece, data = data[: self._left], data[self._left :]
                self._left -= len(piece)
                yield piece
                continue
            need = self._need()
            piece, data = data[: need - len(self._coming)], data[need - len(self._coming) :]
            self._coming += piece
            if len(self._coming) == 5:
                self._check()
            if len(self._coming) < self._need():
                continue
            head, self._coming = self._coming, b""
            if len(head) == 5 + int.from_bytes(head[3:5], "big") and self._is_hello(head):
                yield self._handshake(head)
            else:
                self._left = 5 + int.from_bytes(head[3:5], "big") - len(head)
                yield head

    def _check(self) -> None:
        head = self._coming
        length = int.from_bytes(head[3:5], "big")
        if not 20 <= head[0] <= 24 or head[1] != 3 or not 0 < length <= RECORD:
            raise Refused("not TLS")
        if head[0] != HANDSHAKE and (self._first or self._hello):
            raise Refused("TLS without a ClientHello")

    def _need(self) -> int:
        """Bytes of the record that are needed now."""
        head = self._coming
        if len(head) < 5:
            return 5
        if head[0] != HANDSHAKE:
            return 5
        length = int.from_bytes(head[3:5], "big")
        if len(head) < 5 + min(length, FIRST):
            return 5 + min(length, FIRST)
        return 5 + length if self._is_hello(head) else len(head)

    def _is_hello(self, head: bytes) -> bool:
        """Whether a record of a handshake is of a ClientHello; an encrypted one is known by its first bytes."""
        if head[0] != HANDSHAKE:
            return False
        if self._first or self._hello:
            return True
        body = head[5:]
        if body[0] != CLIENT_HELLO:
            return False
        return len(body) < FIRST or (int.from_bytes(body[1:4], "big") <= HELLO and body[4] == 3)

    def _handshake(self, record: bytes) -> bytes:
        """A whole record of a ClientHello; what goes on by it."""
        self._hello += record[5:]
        self._held += record
        if self._hello[0] != CLIENT_HELLO:
            raise Refused("TLS without a ClientHello")
        if len(self._hello) >= 4:
            length = 4 + int.from_bytes(self._hello[1:4], "big")
            if length > HELLO or len(self._held) > 2 * HELLO:
                raise Refused("TLS: a ClientHello that is too long")
            if len(self._hello) > length:
                raise Refused("TLS: more than a ClientHello")
            if len(self._hello) == length:
                name = server_name(self._hello)
                if name.lower() != self._name:
                    raise Refused(f"TLS for {ascii(name)[1:-1]:.100}")
                found, self._held, self._hello, self._first = self._held, b"", b"", False
                return found
        elif len(self._held) > 64:
            raise Refused("TLS: a ClientHello in too many pieces")
        return b""


class HttpReader:
    """HTTP/1 for *name* and no other: each request is parsed, and written anew, so that server and reader agree.

    What would make another protocol of it is taken out, or refused. Raises ImportError without h11.
    """

    def __init__(self, name: str, port: int) -> None:
        import h11

        self._h11, self._hosts = h11, (name.encode(), f"{name}:{port}".encode())
        self._from, self._to = self._fresh()

    def _fresh(self) -> tuple[h11.Connection, h11.Connection]:
        h11 = self._h11
        return h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD), h11.Connection(h11.CLIENT)

    def feed(self, data: bytes, /) -> bytes:
        """See :class:`Reader`."""
        try:
            return b"".join(self._read(data))
        except (self._h11.ProtocolError, ValueError) as error:
            raise Refused("not HTTP/1") from error

    def _read(self, data: bytes) -> Iterator[bytes]:
        h11 = self._h11
        if data:
            self._from.receive_data(data)
        while True:
            event = self._from.next_event()
            if isinstance(event, h11.Request):
                yield self._begun(event)
            elif isinstance(event, h11.Data):
                yield self._to.send(h11.Data(data=event.data)) or b""
            elif isinstance(event, h11.EndOfMessage):
                yield self._to.send(h11.EndOfMessage(headers=event.headers)) or b""
                rest, _ = self._from.trailing_data
                self._from, self._to = self._fresh()
                if rest:
                    self._from.receive_data(rest)
            else:
                return

    def _begun(self, request: h11.Request) -> bytes:
        """The head of a request."""
        headers = list(request.headers)
        names = [name for name, _ in headers]
        hosts = [value.lower() for name, value in headers if name == b"host"]
        target = bytes(request.target)
        if request.method == b"CONNECT":
            raise Refused("HTTP CONNECT")
        if len(hosts) != 1 or hosts[0] not in self._hosts:
            raise Refused(f"HTTP for {ascii(b' '.join(hosts))[2:-1]:.100}")
        if not target.startswith(b"/") and target != b"*":
            scheme, slashes, rest = target.partition(b"://")
            authority = rest.partition(b"/")[0].partition(b"?")[0].lower()
            if not slashes or scheme.lower() != b"http" or authority not in self._hosts:
                raise Refused(f"HTTP for {ascii(target)[2:-1]:.100}")
        if b"transfer-encoding" in names and b"content-length" in names:
            raise Refused("HTTP with two lengths")
        kept = []
        for name, value in request.headers.raw_items():
            if name.lower() == b"connection":  # what it says of other headers is for those that are taken out
                value = b"close" if b"close" in value.lower() else b"keep-alive"
            if name.lower() not in (b"upgrade", b"http2-settings"):
                kept.append((name, value))
        text = self._to.send(self._h11.Request(method=request.method, target=target, headers=kept)) or b""
        first, _, rest = text.partition(b"\r\n")
        return first[:-3] + bytes(request.http_version) + b"\r\n" + rest
