"""The calls that reach into a sandbox: files, and its services of commands and directories."""

from __future__ import annotations

import base64
import binascii
import secrets
import signal
import time
from contextlib import suppress
from subprocess import TimeoutExpired
from typing import TYPE_CHECKING, Any

import anyio
from cardcage.errors import HostError
from cardcage_fleet.session import Kind
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from cardcage_sandbox.client import Sandbox
from cardcage_sandbox.face.connect import Failed, failure, seconds, streamed, taken, unary
from cardcage_sandbox.face.control import Refused, error
from cardcage_sandbox.face.guard import TooLarge
from cardcage_sandbox.face.words import Watcher, changed, ended, flat, given, number, plain, shape, text, told
from cardcage_sandbox.files import Entry
from cardcage_sandbox.talk import Talk

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from starlette.requests import Request

    from cardcage_sandbox.face.app import Face

__all__ = ["Insides"]

PING = 30.0
"""Seconds without a message after which a stream says that it is there, where the caller does not say when."""
WATCHERS, UNASKED = 256, 900.0
"""Watchers at once, and seconds after which one that nobody asks is closed."""
SIGNALS = {"SIGNAL_SIGTERM": signal.SIGTERM, "SIGNAL_SIGKILL": signal.SIGKILL, 15: 15, 9: 9}
STATUSES = {"not_found": 404, "permission_denied": 403, "resource_exhausted": 507, "unavailable": 502}


class Insides:
    """The calls, as the SDK makes them."""

    def __init__(self, face: Face) -> None:
        self._face = face
        self._watchers: dict[str, Watcher] = {}

    def routes(self) -> list[Route]:
        """Where they are."""
        found = [
            Route("/health", self.health, methods=["GET"]),
            Route("/files", self.download, methods=["GET"]),
            Route("/files", self.upload, methods=["POST"]),
        ]
        for name in ("List", "Update", "SendInput", "SendSignal", "CloseStdin"):
            found.append(self._call(f"/process.Process/{name}", getattr(self, f"process_{name.lower()}")))
        for name in ("Stat", "MakeDir", "Move", "ListDir", "Remove"):
            found.append(self._call(f"/filesystem.Filesystem/{name}", getattr(self, f"file_{name.lower()}")))
        for name in ("CreateWatcher", "GetWatcherEvents", "RemoveWatcher"):
            found.append(self._call(f"/filesystem.Filesystem/{name}", getattr(self, f"file_{name.lower()}")))
        for path, stream in (
            ("/process.Process/Start", self.process_start),
            ("/process.Process/Connect", self.process_connect),
            ("/filesystem.Filesystem/WatchDir", self.file_watchdir),
        ):
            found.append(self._stream(path, stream))
        found.append(Route("/process.Process/StreamInput", self.process_streaminput, methods=["POST"]))
        return found

    def close(self) -> None:
        """Close all watchers."""
        for one in self._watchers.values():
            one.close()
        self._watchers.clear()

    def _call(self, path: str, call: Callable[..., Awaitable[dict[str, Any]]]) -> Route:
        async def answer(request: Request) -> Response:
            async def answered(message: dict[str, Any]) -> dict[str, Any]:
                sandbox = await self._reached(request)
                return await call(sandbox, message, self._user(request, sandbox))

            try:
                return await unary(request, answered)
            except Refused as refused:
                return error(refused.status, refused.why)

        return Route(path, answer, methods=["POST"])

    def _stream(self, path: str, call: Callable[..., AsyncIterator[dict[str, Any]]]) -> Route:
        async def answer(request: Request) -> Response:
            try:
                sandbox = await self._reached(request)
                user = self._user(request, sandbox)
                # read now: while it answers, the server listens for the caller's end
                message = [one async for one in taken(request)]
                if len(message) != 1:
                    raise Failed("invalid_argument", f"{len(message)} messages: expected one")
            except Refused as refused:
                return error(refused.status, refused.why)
            except Failed as failed:
                return streamed(failing(failed))
            return streamed(call(sandbox, message[0], request, user))

        return Route(path, answer, methods=["POST"])

    async def _reached(self, request: Request, act: str = "") -> Sandbox:
        """The sandbox that a request is for, which runs. Raises Refused."""
        face = self._face
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
        rows = await self._face.thread(Sandbox.list)
        return next((one.id for one in rows if self._face.keys.is_signed(one.id, act, request.query_params)), "")

    def _user(self, request: Request, sandbox: Sandbox) -> str:
        given = request.headers.get("authorization", "")
        if given.startswith("Basic "):
            with suppress(binascii.Error, ValueError):
                return base64.b64decode(given[6:], validate=True).decode().partition(":")[0] or sandbox.made.user
            raise Refused(401, "authorization: expected a user in Basic form")
        return request.query_params.get("username") or sandbox.made.user

    # files

    async def health(self, request: Request) -> Response:
        """Whether the sandbox runs."""
        try:
            await self._reached(request)
        except Refused as refused:
            return error(refused.status, refused.why)
        return Response(status_code=204)

    async def download(self, request: Request) -> Response:
        """The contents of a file."""
        try:
            sandbox = await self._reached(request, "read")
            pieces = sandbox.files.chunks(request.query_params.get("path", ""), user=self._user(request, sandbox))
            first = await self._face.thread(lambda: next(pieces, b""))
        except Exception as problem:  # answered(): raises what is a mistake of our own
            return answered(problem)

        async def body() -> AsyncIterator[bytes]:
            piece: bytes | None = first
            while piece is not None:
                yield piece
                piece = await self._face.thread(lambda: next(pieces, None))

        return StreamingResponse(body(), media_type="application/octet-stream")

    async def upload(self, request: Request) -> Response:
        """Write files: one as the body is, or several in a form."""
        try:
            sandbox = await self._reached(request, "write")
            user, path = self._user(request, sandbox), request.query_params.get("path", "")
            if any(name.startswith("x-metadata-") for name in request.headers):
                raise Refused(400, "x-metadata: files have no metadata of their own")
            kind = request.headers.get("content-type", "").partition(";")[0]
            if kind == "multipart/form-data":
                return JSONResponse(await self._form(request, sandbox, user, path))
            pieces = plain(request.stream(), request.headers.get("content-encoding", ""))
            return JSONResponse([await self._write(sandbox, user, path, pieces)])
        except TooLarge:
            raise
        except Exception as problem:  # as above
            return answered(problem)

    async def _form(self, request: Request, sandbox: Sandbox, user: str, path: str) -> list[dict[str, Any]]:
        found = []
        async with request.form(max_files=1000, max_fields=1) as form:
            for part in form.getlist("file"):
                if isinstance(part, str):
                    raise Refused(400, "file: expected a part with a filename")

                async def pieces(part: Any = part) -> AsyncIterator[bytes]:
                    while piece := await part.read(1 << 16):
                        yield piece

                found.append(await self._write(sandbox, user, path or part.filename or "", pieces()))
        return found

    async def _write(self, sandbox: Sandbox, user: str, path: str, pieces: AsyncIterator[bytes]) -> dict[str, Any]:
        thread = self._face.thread
        talk = await thread(lambda: sandbox.files.writing(path, user=user))
        try:
            async for piece in pieces:
                await thread(talk.send, piece)
            talk.end()
            table = await thread(lambda: talk.result(talk.receive()))
        finally:
            talk.hang_up()
            talk.close()
        entry = Entry(**table["entry"])
        return {"name": entry.name, "path": entry.path, "type": entry.type}

    async def file_stat(self, sandbox: Sandbox, message: dict[str, Any], user: str) -> dict[str, Any]:
        """A file."""
        path = text(message, "path")
        return {"entry": told(await self._face.thread(lambda: sandbox.files.stat(path, user=user)))}

    async def file_makedir(self, sandbox: Sandbox, message: dict[str, Any], user: str) -> dict[str, Any]:
        """A new directory."""
        path = text(message, "path")
        if not await self._face.thread(lambda: sandbox.files.make_dir(path, user=user)):
            raise Failed("already_exists", f"{path}: File exists")
        return {"entry": told(await self._face.thread(lambda: sandbox.files.stat(path, user=user)))}

    async def file_move(self, sandbox: Sandbox, message: dict[str, Any], user: str) -> dict[str, Any]:
        """A new name."""
        source, to = text(message, "source"), text(message, "destination")
        return {"entry": told(await self._face.thread(lambda: sandbox.files.rename(source, to, user=user)))}

    async def file_listdir(self, sandbox: Sandbox, message: dict[str, Any], user: str) -> dict[str, Any]:
        """The entries of a directory."""
        path, depth = text(message, "path"), number(message, "depth", 1)
        found = await self._face.thread(lambda: sandbox.files.list(path, depth=max(depth, 1), user=user))
        return {"entries": [told(one) for one in found]}

    async def file_remove(self, sandbox: Sandbox, message: dict[str, Any], user: str) -> dict[str, Any]:
        """A file or directory less; one that is not there is no error, as with e2b."""
        path = text(message, "path")
        with suppress(FileNotFoundError):
            await self._face.thread(lambda: sandbox.files.remove(path, user=user))
        return {}

    async def file_createwatcher(self, sandbox: Sandbox, message: dict[str, Any], user: str) -> dict[str, Any]:
        """A watcher that keeps changes until somebody asks."""
        flat(message)
        for id, one in list(self._watchers.items()):
            if one.over or time.monotonic() - one.asked > UNASKED:
                one.close()
                del self._watchers[id]
        if len(self._watchers) >= WATCHERS:
            raise Failed("resource_exhausted", f"{WATCHERS} watchers: no more at once")
        path = text(message, "path")
        watch = await self._face.thread(lambda: sandbox.files.watch(path, user=user))
        id = secrets.token_hex(8)
        self._watchers[id] = Watcher(sandbox.id, watch)
        return {"watcherId": id}

    def _watcher(self, sandbox: Sandbox, message: dict[str, Any]) -> tuple[str, Watcher]:
        id = text(message, "watcherId")
        found = self._watchers.get(id)
        if found is None or found.sandbox != sandbox.id:
            raise Failed("not_found", f"watcher {id[:40]!r} was not found")
        return id, found

    async def file_getwatcherevents(self, sandbox: Sandbox, message: dict[str, Any], user: str) -> dict[str, Any]:
        """What it has kept."""
        return {"events": self._watcher(sandbox, message)[1].take()}

    async def file_removewatcher(self, sandbox: Sandbox, message: dict[str, Any], user: str) -> dict[str, Any]:
        """No more of it."""
        id, found = self._watcher(sandbox, message)
        del self._watchers[id]
        await self._face.thread(found.close)
        return {}

    async def file_watchdir(
        self, sandbox: Sandbox, message: dict[str, Any], request: Request, user: str
    ) -> AsyncIterator[dict[str, Any]]:
        """Changes as they come."""
        flat(message)
        path = text(message, "path")
        watch = await self._face.thread(lambda: sandbox.files.watch(path, user=user))
        async for frame in self._frames(watch.talk, request, {"start": {}}):
            if frame is None:
                yield {"keepalive": {}}
            elif isinstance(frame, dict):
                yield frame
            else:
                for change in watch.parsed(frame.data):
                    if (event := changed(change)) is not None:
                        yield {"filesystem": event}

    # commands

    async def process_start(
        self, sandbox: Sandbox, message: dict[str, Any], request: Request, user: str
    ) -> AsyncIterator[dict[str, Any]]:
        """A command, and its output as it comes."""
        config, pty = message.get("process"), message.get("pty")
        if not isinstance(config, dict) or not isinstance(config.get("args", []), list):
            raise Failed("invalid_argument", "process: expected a command")
        words = [text(config, "cmd"), *config.get("args", [])]
        envs = config.get("envs", {})
        if not isinstance(envs, dict) or not all(isinstance(one, str) for one in words):
            raise Failed("invalid_argument", "process: expected words and variables of text")
        size = shape(pty) if pty is not None else None
        keys = {
            "cwd": config.get("cwd"),
            "input": message.get("stdin") is True,
            "limit": seconds(request),
            "keep": True,
            "tag": message.get("tag"),
            "pty": size,
        }
        talk = await self._face.thread(lambda: sandbox.commands.starting(words, envs, user, **keys))
        async for one in self._process(talk, request, pty=size is not None):
            yield one

    async def process_connect(
        self, sandbox: Sandbox, message: dict[str, Any], request: Request, user: str
    ) -> AsyncIterator[dict[str, Any]]:
        """The output of a command that runs, from now on."""
        pid, pty = await self._selected(sandbox, message)
        talk = await self._face.thread(lambda: sandbox.commands.attaching(pid))
        async for one in self._process(talk, request, pty=pty):
            yield one

    async def _process(self, talk: Talk, request: Request, *, pty: bool) -> AsyncIterator[dict[str, Any]]:
        try:
            pid = (await self._face.thread(talk.began))["pid"]
        except BaseException:
            talk.close()
            raise
        async for frame in self._frames(talk, request, {"event": {"start": {"pid": pid}}}):
            if frame is None:
                yield {"event": {"keepalive": {}}}
            elif isinstance(frame, dict):
                yield frame
            else:
                where = "pty" if pty else "stderr" if frame.stream == 2 else "stdout"
                yield {"event": {"data": {where: base64.b64encode(frame.data).decode()}}}
        if "limit" in talk.table:
            raise TimeoutExpired(f"command {pid}", talk.table["limit"])
        status = talk.table.get("status")
        if not isinstance(status, int):
            raise HostError(f"command {pid} was lost: {talk.table.get('lost', 'its sandbox ended')}")
        yield {"event": {"end": ended(status)}}

    async def _frames(self, talk: Talk, request: Request, first: dict[str, Any]) -> AsyncIterator[Any]:
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
                frame = await self._face.thread(talk.receive)
                if frame is None or frame.kind is not Kind.DATA:
                    talk.table = talk.result(frame)
                    return
                yield frame
        finally:
            talk.hang_up()
            talk.close()

    async def _selected(self, sandbox: Sandbox, message: dict[str, Any]) -> tuple[int, bool]:
        """The number of the command that a message means, and whether it has a terminal."""
        which = message.get("process")
        which = which if isinstance(which, dict) else {}
        for one in await self._face.thread(sandbox.commands.list):
            if one.pid == which.get("pid") or (one.tag and one.tag == which.get("tag")):
                return one.pid, one.pty
        raise Failed("not_found", f"process {which.get('pid', which.get('tag'))!r:.60} was not found")

    async def process_list(self, sandbox: Sandbox, message: dict[str, Any], user: str) -> dict[str, Any]:
        """What runs."""
        rows = await self._face.thread(sandbox.commands.list)
        return {
            "processes": [
                {
                    "pid": one.pid,
                    "config": {"cmd": one.command[0], "args": one.command[1:], "envs": one.env, "cwd": one.cwd},
                    **({"tag": one.tag} if one.tag else {}),
                }
                for one in rows
            ]
        }

    async def process_update(self, sandbox: Sandbox, message: dict[str, Any], user: str) -> dict[str, Any]:
        """Another size of a terminal."""
        pid, _ = await self._selected(sandbox, message)
        rows, columns = shape(message.get("pty"))
        await self._face.thread(lambda: sandbox.commands.resize(pid, rows, columns))
        return {}

    async def process_sendinput(self, sandbox: Sandbox, message: dict[str, Any], user: str) -> dict[str, Any]:
        """Input for a command."""
        pid, _ = await self._selected(sandbox, message)
        data = given(message)
        await self._face.thread(lambda: sandbox.commands.send_stdin(pid, data))
        return {}

    async def process_streaminput(self, request: Request) -> Response:
        """Inputs for a command, in order."""
        try:
            sandbox = await self._reached(request)
            pid = 0
            async for message in taken(request):
                if isinstance(start := message.get("start"), dict):
                    pid, _ = await self._selected(sandbox, start)
                elif isinstance(part := message.get("data"), dict) and pid:
                    await self._face.thread(sandbox.commands.send_stdin, pid, given(part))
                elif "keepalive" not in message:
                    raise Failed("invalid_argument", "expected a start, then data")
        except Refused as refused:
            return error(refused.status, refused.why)
        except Exception as problem:  # failure() raises what is a mistake of our own
            return streamed(failing(failure(problem)))
        return streamed(only({}))

    async def process_sendsignal(self, sandbox: Sandbox, message: dict[str, Any], user: str) -> dict[str, Any]:
        """A signal for a command."""
        pid, _ = await self._selected(sandbox, message)
        number = SIGNALS.get(message.get("signal", ""))
        if number is None:
            raise Failed("invalid_argument", "signal: expected SIGTERM or SIGKILL")
        await self._face.thread(lambda: sandbox.commands.send_signal(pid, number))
        return {}

    async def process_closestdin(self, sandbox: Sandbox, message: dict[str, Any], user: str) -> dict[str, Any]:
        """The end of a command's input."""
        pid, _ = await self._selected(sandbox, message)
        await self._face.thread(lambda: sandbox.commands.send_stdin(pid, b"", close=True))
        return {}


def answered(problem: Exception) -> Response:
    """An error of a call about files. What is none of ours is raised again."""
    if isinstance(problem, Refused):
        return error(problem.status, problem.why)
    failed = failure(problem)
    return error(STATUSES.get(failed.code, 400), failed.why)


async def failing(failed: Failed) -> AsyncIterator[dict[str, Any]]:
    """A stream that fails at once."""
    raise failed
    yield {}  # which makes it a stream


async def only(message: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """A stream of one message."""
    yield message
