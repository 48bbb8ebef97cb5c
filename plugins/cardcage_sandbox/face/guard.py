"""A guard before each request: who may ask, and how much may be sent."""

from __future__ import annotations

import hashlib
import hmac
import time
from base64 import b64encode
from typing import TYPE_CHECKING

from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from starlette.datastructures import Headers, QueryParams
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["BODY", "UPLOAD", "Guard", "Keys", "TooLarge", "too_large"]

BODY = 1 << 20
"""Bytes of a request's body."""
UPLOAD = 1 << 30
"""Bytes of one that is a file."""


class TooLarge(Exception):
    """A body has more bytes than are read."""


class Keys:
    """The key that the control calls are made with, and a token for each sandbox that follows from it."""

    def __init__(self, key: str) -> None:
        self._key = key.encode()

    def is_key(self, given: str | None) -> bool:
        """True for the key."""
        return hmac.compare_digest((given or "").encode(), self._key)

    def token(self, id: str) -> str:
        """The token of a sandbox."""
        return hmac.new(self._key, f"sandbox:{id}".encode(), hashlib.sha256).hexdigest()

    def may_reach(self, id: str, headers: Headers) -> bool:
        """True for a request that has the sandbox's token."""
        return hmac.compare_digest(headers.get("x-access-token", "").encode(), self.token(id).encode())

    def is_signed(self, id: str, act: str, query: QueryParams) -> bool:
        """True for a link to a file that was signed with the sandbox's token, and is not out of date."""
        given, until = query.get("signature", ""), query.get("signature_expiration", "")
        text = f"{query.get('path', '')}:{act}:{query.get('username', '')}:{self.token(id)}"
        if until:
            if not (until.isascii() and until.isdigit() and len(until) < 16) or int(until) < time.time():
                return False
            text += f":{until}"
        digest = b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        return hmac.compare_digest(given.encode(), f"v1_{digest}".encode())


class Guard:
    """Refuses bodies that are too long, pages of a browser, and names that are not this host's.

    A page of any site may send requests to this host: it has an ``Origin``, and where its name was made to mean this
    host, a ``Host`` that is none of *hosts*.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str]) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request (ASGI 3.0)."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        host = headers.get(b"host", b"").decode("latin-1").rpartition(":")[0] or headers.get(b"host", b"").decode()
        if b"origin" in headers or (self._hosts and host not in self._hosts):
            await _refuse(403, "requests of web pages are refused")(scope, receive, send)
            return
        most = UPLOAD if scope["path"] == "/files" else BODY
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 15 or int(length) > most:
            await _refuse(413, f"a body of more than {most} bytes")(scope, receive, send)
            return
        streams = headers.get(b"content-type", b"").startswith(b"application/connect+")
        left = most

        async def received() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0 and not streams:  # the messages of a stream are bounded each
                raise TooLarge
            return message

        await self._app(scope, received, send)


async def too_large(request: Request, error: Exception) -> Response:
    """The answer where more came than is read."""
    return _refuse(413, "the body is too long")


def _refuse(status: int, why: str) -> JSONResponse:
    return JSONResponse({"code": status, "message": why}, status, {"connection": "close"})
