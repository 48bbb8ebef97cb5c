"""Files of a sandbox, and its service of directories, as the SDK asks for them."""

from __future__ import annotations

import secrets
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from cardcage_sandbox.face.connect import Failed, failure
from cardcage_sandbox.face.control import Refused, error
from cardcage_sandbox.face.guard import TooLarge
from cardcage_sandbox.face.words import Watcher, changed, flat, number, plain, text, told
from cardcage_sandbox.files import Entry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

    from cardcage_sandbox.client import Sandbox
    from cardcage_sandbox.face.reach import Reach

__all__ = ["FileCalls"]

WATCHERS, UNASKED = 256, 900.0
"""Watchers at once, and seconds after which one that nobody asks is closed."""
STATUSES = {"not_found": 404, "permission_denied": 403, "resource_exhausted": 507, "unavailable": 502}
SERVICE = "/filesystem.Filesystem"


class FileCalls:
    """The calls, as the SDK makes them."""

    def __init__(self, reach: Reach) -> None:
        self._reach, self._face = reach, reach.face
        self._watchers: dict[str, Watcher] = {}

    def routes(self) -> list[Route]:
        """Routes of all."""
        calls = {
            "Stat": self.stat,
            "MakeDir": self.makedir,
            "Move": self.move,
            "ListDir": self.listdir,
            "Remove": self.remove,
            "CreateWatcher": self.createwatcher,
            "GetWatcherEvents": self.getwatcherevents,
            "RemoveWatcher": self.removewatcher,
        }
        return [
            Route("/health", self.health, methods=["GET"]),
            Route("/files", self.download, methods=["GET"]),
            Route("/files", self.upload, methods=["POST"]),
            *(self._reach.call(f"{SERVICE}/{name}", call) for name, call in calls.items()),
            self._reach.stream(f"{SERVICE}/WatchDir", self.watchdir),
        ]

    def close(self) -> None:
        """Close all watchers."""
        for one in self._watchers.values():
            one.close()
        self._watchers.clear()

    async def health(self, request: Request) -> Response:
        """A sign that the sandbox runs."""
        try:
            await self._reach.reached(request)
        except Refused as refused:
            return error(refused.status, refused.why)
        return Response(status_code=204)

    async def download(self, request: Request) -> Response:
        """The contents of a file."""
        try:
            sandbox = await self._reach.reached(request, "read")
            pieces = sandbox.files.chunks(request.query_params.get("path", ""), user=self._reach.user(request, sandbox))
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
            sandbox = await self._reach.reached(request, "write")
            user, path = self._reach.user(request, sandbox), request.query_params.get("path", "")
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

    async def stat(self, sandbox: Sandbox, message: dict[str, Any], user: str) -> dict[str, Any]:
        """A file."""
        path = text(message, "path")
        return {"entry": told(await self._face.thread(lambda: sandbox.files.stat(path, user=user)))}

    async def makedir(self, sandbox: Sandbox, message: dict[str, Any], user: str) -> dict[str, Any]:
        """A new directory."""
        path = text(message, "path")
        if not await self._face.thread(lambda: sandbox.files.make_dir(path, user=user)):
            raise Failed("already_exists", f"{path}: File exists")
        return {"entry": told(await self._face.thread(lambda: sandbox.files.stat(path, user=user)))}

    async def move(self, sandbox: Sandbox, message: dict[str, Any], user: str) -> dict[str, Any]:
        """A new name."""
        source, to = text(message, "source"), text(message, "destination")
        return {"entry": told(await self._face.thread(lambda: sandbox.files.rename(source, to, user=user)))}

    async def listdir(self, sandbox: Sandbox, message: dict[str, Any], user: str) -> dict[str, Any]:
        """The entries of a directory."""
        path, depth = text(message, "path"), number(message, "depth", 1)
        found = await self._face.thread(lambda: sandbox.files.list(path, depth=max(depth, 1), user=user))
        return {"entries": [told(one) for one in found]}

    async def remove(self, sandbox: Sandbox, message: dict[str, Any], user: str) -> dict[str, Any]:
        """A file or directory less; one that is not there is no error, as with e2b."""
        path = text(message, "path")
        with suppress(FileNotFoundError):
            await self._face.thread(lambda: sandbox.files.remove(path, user=user))
        return {}

    async def createwatcher(self, sandbox: Sandbox, message: dict[str, Any], user: str) -> dict[str, Any]:
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

    async def getwatcherevents(self, sandbox: Sandbox, message: dict[str, Any], user: str) -> dict[str, Any]:
        """Changes since the last time."""
        return {"events": self._watcher(sandbox, message)[1].take()}

    async def removewatcher(self, sandbox: Sandbox, message: dict[str, Any], user: str) -> dict[str, Any]:
        """No more of it."""
        id, found = self._watcher(sandbox, message)
        del self._watchers[id]
        await self._face.thread(found.close)
        return {}

    async def watchdir(
        self, sandbox: Sandbox, message: dict[str, Any], request: Request, user: str
    ) -> AsyncIterator[dict[str, Any]]:
        """Changes as they come."""
        flat(message)
        path = text(message, "path")
        watch = await self._face.thread(lambda: sandbox.files.watch(path, user=user))
        async for frame in self._reach.frames(watch.talk, request, {"start": {}}):
            if frame is None:
                yield {"keepalive": {}}
            elif isinstance(frame, dict):
                yield frame
            else:
                for change in watch.parsed(frame.data):
                    if (event := changed(change)) is not None:
                        yield {"filesystem": event}


def answered(problem: Exception) -> Response:
    """An error of a call about files. What is none of ours is raised again."""
    if isinstance(problem, Refused):
        return error(problem.status, problem.why)
    failed = failure(problem)
    return error(STATUSES.get(failed.code, 400), failed.why)
