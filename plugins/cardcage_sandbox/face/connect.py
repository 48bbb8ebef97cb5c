"""The Connect protocol with JSON, as far as the SDK speaks it: unary calls, and streams in either direction.

https://connectrpc.com/docs/protocol: a stream is of envelopes, a byte of flags and a length of 4 bytes, big-endian,
before each message; the last of a response has flag 2, and says how it went.
"""

from __future__ import annotations

import errno
import json
import struct
from subprocess import TimeoutExpired
from typing import TYPE_CHECKING, Any

from cardcage.errors import CardcageError, GuestError, HostError, UsageError
from starlette.responses import JSONResponse, Response, StreamingResponse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from starlette.requests import Request

__all__ = ["Failed", "failure", "seconds", "streamed", "table", "taken", "unary"]

ENVELOPE = struct.Struct(">BI")
END = 2
MESSAGE = 1 << 20
"""Bytes of a message."""
STATUS = {
    "invalid_argument": 400,
    "deadline_exceeded": 504,
    "not_found": 404,
    "already_exists": 409,
    "permission_denied": 403,
    "resource_exhausted": 429,
    "unauthenticated": 401,
    "unimplemented": 501,
    "unavailable": 503,
    "internal": 500,
    "unknown": 500,
}
KINDS: tuple[tuple[type[BaseException], str], ...] = (
    (FileNotFoundError, "not_found"),
    (ProcessLookupError, "not_found"),
    (FileExistsError, "already_exists"),
    (PermissionError, "permission_denied"),
    (TimeoutError, "deadline_exceeded"),
    (TimeoutExpired, "deadline_exceeded"),
    (OSError, "invalid_argument"),
    (UsageError, "invalid_argument"),
    (HostError, "unavailable"),
    (GuestError, "internal"),
    (CardcageError, "internal"),
)


class Failed(Exception):
    """A call failed: a code of the protocol, and why."""

    def __init__(self, code: str, why: str) -> None:
        self.code, self.why = code, why
        super().__init__(why)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.code, self.why)


def failure(error: BaseException) -> Failed:
    """*error* as the protocol has it. What is none of ours is raised again."""
    if isinstance(error, Failed):
        return error
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return Failed("resource_exhausted", str(error))
    for kind, code in KINDS:
        if isinstance(error, kind):
            return Failed(code, str(error))
    raise error


def table(data: bytes) -> dict[str, Any]:
    """A message. Raises Failed for what is no table of JSON."""
    try:
        found = json.loads(data or b"{}")
    except (ValueError, RecursionError) as error:
        raise Failed("invalid_argument", f"expected a message of JSON: {error}") from error
    if not isinstance(found, dict):
        raise Failed("invalid_argument", "expected a message of JSON: a table")
    return found


def seconds(request: Request) -> float | None:
    """The time that a call may take. Raises Failed."""
    text = request.headers.get("connect-timeout-ms")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        raise Failed("invalid_argument", "connect-timeout-ms: expected up to 10 digits")
    return int(text) / 1000


async def unary(request: Request, call: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]) -> Response:
    """Answer a call of one message with one."""
    try:
        _expect(request, "application/json")
        return JSONResponse(await call(table(await request.body())))
    except Exception as error:  # failure() raises what is a mistake of our own
        failed = failure(error)
        return JSONResponse({"code": failed.code, "message": failed.why}, STATUS[failed.code])


async def taken(request: Request) -> AsyncIterator[dict[str, Any]]:
    """The messages of a stream that a caller sends. Raises Failed."""
    _expect(request, "application/connect+json")
    kept = b""
    async for part in request.stream():
        kept += part
        while len(kept) >= ENVELOPE.size:
            flags, size = ENVELOPE.unpack_from(kept)
            if flags or size > MESSAGE:
                raise Failed("invalid_argument", f"expected messages as they are, of {MESSAGE} bytes at most")
            if len(kept) < ENVELOPE.size + size:
                break
            yield table(kept[ENVELOPE.size : ENVELOPE.size + size])
            kept = kept[ENVELOPE.size + size :]
    if kept:
        raise Failed("invalid_argument", "the stream ended inside a message")


def streamed(messages: AsyncIterator[dict[str, Any]]) -> Response:
    """Answer with a stream, whose end says what *messages* raised."""

    async def pieces() -> AsyncIterator[bytes]:
        end: dict[str, Any] = {}
        try:
            async for one in messages:
                yield _envelope(0, one)
        except Exception as error:  # as above
            failed = failure(error)
            end = {"error": {"code": failed.code, "message": failed.why}}
        yield _envelope(END, end)

    return StreamingResponse(pieces(), media_type="application/connect+json")


def _envelope(flags: int, message: dict[str, Any]) -> bytes:
    data = json.dumps(message).encode()
    return ENVELOPE.pack(flags, len(data)) + data


def _expect(request: Request, wanted: str) -> None:
    given = request.headers.get("content-type", "").partition(";")[0].strip()
    if given != wanted:
        raise Failed("unimplemented", f"content-type {given[:60]!r}: expected {wanted}, the form of e2b's SDK 2.63")
