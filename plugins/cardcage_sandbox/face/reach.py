"""The way into a sandbox: who may take it, and calls and streams that do."""

from __future__ import annotations

import base64
import binascii
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio
from cardcage_fleet.session import Kind
from starlette.responses import Response
from starlette.routing import Route

from cardcage_sandbox.client import Sandbox
from cardcage_sandbox.face.connect import Failed, seconds, streamed, taken, unary
from cardcage_sandbox.face.control import Refused, error

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from starlette.requests import Request

    from cardcage_sandbox.face.app import Face
    from cardcage_sandbox.talk import Talk

__all__ = ["Reach", "failing", "only"]

PING = 30.0
"""Seconds without a message after which a stream says that it is there, where the caller does not say when."""


class Reach:
    """Requests that are for one sandbox."""

    def __init__(self, face: Face) -> None:
        self.face = face

    def call(self, path: str, act: Callable[..., Awaitable[dict[str, Any]]]) -> Route:
        """A route of a call: one message is answered with one."""

        async def answer(request: Request) -> Response:
            async def answered(message: dict[str, Any]) -> dict[str, Any]:
                sandbox = await self.reached(request)
                return await act(sandbox, message, self.user(request, sandbox))

            try:
                return await unary(request, answered)
            except Refused as refused:
                return error(refused.status, refused.why)

        return Route(path, answer, methods=["POST"])

    def stream(self, path: str, act: Callable[..., AsyncIterator[dict[str, Any]]]) -> Route:
        """A route of a call: one message is answered with a stream."""

        async def answer(request: Request) -> Response:
            try:
                sandbox = await self.reached(request)
                user = self.user(request, sandbox)
                # read now: while it answers, the server listens for the caller's end
                message = [one async for one in taken(request)]
                if len(message) != 1:
                    raise Failed("invalid_argument", f"{len(message)} messages: expected one")
            except Refused as refused:
                return error(refused.status, refused.why)
            except Failed as failed:
                return streamed(failing(failed))
            return streamed(act(sandbox, message[0], request, user))

        return Route(path, answer, methods=["POST"])

    async def reached(self, request: Request, act: str = "") -> Sandbox:
        """The sandbox that a request is for, which runs. Raises Refused."""
        face = self.face
        id = request.headers.get("e2b-sandbox-id", "")
        if not id and request.url.hostname:  # PORT-ID.DOMAIN
            id = request.url.hostname.partition(".")[0].partition("-")[2]
        if not id and act and "signature" in request.query_params:
            id = await self._signer(act, request)
        debug = face.debug and id in ("", "debug_sandbox_id")
        allowed = debug or face.keys.may_reach(id, request.headers)
        if not allowed and not (act and face.keys.is_signed(id, act, request.query_params)):
            raise Refused(401, "X-Access-Token: expected the sandbox's token")
        try:
            sandbox = await face.sandbox("debug_sandbox_id" if debug else id)
            running = await face.thread(lambda: sandbox.is_running)
        except Refused as refused:
            raise Refused(502, refused.why) from refused
        if not running:
            raise Refused(502, f"the sandbox {id} was not found: it is paused, or has ended")
        return sandbox

    async def _signer(self, act: str, request: Request) -> str:
        """The sandbox with whose token a link was signed: it names none."""
        rows = await self.face.thread(Sandbox.list)
        return next((one.id for one in rows if self.face.keys.is_signed(one.id, act, request.query_params)), "")

    def user(self, request: Request, sandbox: Sandbox) -> str:
        given = request.headers.get("authorization", "")
        if given.startswith("Basic "):
            with suppress(binascii.Error, ValueError):
                return base64.b64decode(given[6:], validate=True).decode().partition(":")[0] or sandbox.made.user
            raise Refused(401, "authorization: expected a user in Basic form")
        return request.query_params.get("username") or sandbox.made.user

    async def frames(self, talk: Talk, request: Request, first: dict[str, Any]) -> AsyncIterator[Any]:
        """*first*, the frames of an act, and None for each time that nothing came. Raises what ended it.

        A caller that goes away ends the act; so does the time that it gave, if the act does not end by it itself.
        """
        limit = seconds(request)
        until = None if limit is None else time.monotonic() + limit + 5
        ping = request.headers.get("keepalive-ping-interval", "")
        pause = min(max(float(ping), 1.0), 3600.0) if ping.isascii() and ping.isdigit() and len(ping) < 6 else PING
        try:
            yield first
            while True:
                wait = pause if until is None else min(pause, max(until - time.monotonic(), 0))
                with anyio.move_on_after(wait) as scope:
                    await anyio.wait_readable(talk.fileno())
                if scope.cancelled_caught:
                    if until is not None and time.monotonic() >= until:
                        raise TimeoutError(f"nothing ended within {limit:g} s")
                    yield None
                    continue
                frame = await self.face.thread(talk.receive)
                if frame is None or frame.kind is not Kind.DATA:
                    talk.table = talk.result(frame)
                    return
                yield frame
        finally:
            talk.hang_up()
            talk.close()


async def failing(failed: Failed) -> AsyncIterator[dict[str, Any]]:
    """A stream that fails at once."""
    raise failed
    yield {}  # which makes it a stream


async def only(message: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """A stream of one message."""
    yield message
