"""The application: a control face and a sandbox's own on one port, which share no path."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import anyio.to_thread
from cardcage.errors import CardcageError, HostError, UsageError
from starlette.applications import Starlette

from cardcage_sandbox.client import Sandbox
from cardcage_sandbox.face.commandcalls import CommandCalls
from cardcage_sandbox.face.control import Control, Refused
from cardcage_sandbox.face.filecalls import FileCalls
from cardcage_sandbox.face.guard import Guard, Keys, TooLarge, too_large
from cardcage_sandbox.face.reach import Reach
from cardcage_sandbox.face.snapshots import Snapshots
from cardcage_sandbox.template import Template

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from starlette.types import ASGIApp

    from cardcage_sandbox.client import SandboxInfo

    T = TypeVar("T")

__all__ = ["DEBUG", "Face", "application"]

DEBUG = "debug_sandbox_id"
"""The sandbox that the SDK means in its debug mode, in which it makes none."""
THREADS = 512
KNOWN = 4096


class Face:
    """State that the calls have in common.

    Args:
        key: what the control calls must know. templates: by the names that they are asked for.
        debug: serve one sandbox to whoever asks for :data:`DEBUG`, without a token.
    """

    def __init__(self, key: str, templates: Mapping[str, Template], *, debug: bool = False) -> None:
        self.keys, self.debug, self.snapshots = Keys(key), debug, Snapshots()
        self._templates = dict(templates)
        self._known: dict[str, Sandbox] = {}
        self._debugged: Sandbox | None = None
        self._limiter = anyio.CapacityLimiter(THREADS)
        self._lock = asyncio.Lock()

    async def thread(self, call: Callable[..., T], *values: Any) -> T:
        """The result of *call*, which may wait."""
        return await anyio.to_thread.run_sync(call, *values, abandon_on_cancel=True, limiter=self._limiter)

    def template(self, name: str) -> Template:
        """A template by its name, or that of a snapshot. Raises Refused."""
        found = self._templates.get(name) or self.snapshots.template(name, self._templates)
        if found is None:
            expected = f"expected one of {', '.join(sorted(self._templates))}, or a snapshot"
            raise Refused(404, f'template "{name[:60]}": {expected}')
        return found

    def is_template(self, name: str) -> bool:
        """True for a name that no snapshot may have."""
        return name in self._templates

    def know(self, sandbox: Sandbox) -> None:
        """Keep *sandbox* at hand."""
        if len(self._known) >= KNOWN:
            self._known.clear()
        self._known[sandbox.id] = sandbox

    def forget(self, id: str) -> None:
        """It has ended."""
        self._known.pop(id, None)

    async def sandbox(self, id: str) -> Sandbox:
        """The sandbox *id*, which has not ended. Raises Refused."""
        return (await self.looked(id))[0]

    async def looked(self, id: str) -> tuple[Sandbox, SandboxInfo]:
        """The sandbox *id*, and its facts now. Raises Refused."""
        if self.debug and id == DEBUG:
            made = await self._debug()
            return made, made.made
        try:
            found = self._known.get(id)
            if found is None:
                found = await self.thread(lambda: Sandbox.connect(id))
                self.know(found)
                return found, found.made
            return found, await self.thread(found.info)
        except (UsageError, HostError) as error:
            self.forget(id)
            raise Refused(404, f"sandbox {id[:60]!r} was not found") from error

    async def _debug(self) -> Sandbox:
        async with self._lock:
            made = self._debugged
            if made is None or not await self.thread(getattr, made, "is_running"):
                template = self.template("base")
                made = self._debugged = await self.thread(lambda: Sandbox.create(template, timeout="24h"))
            return made

    async def close(self) -> None:
        """End the sandbox of the debug mode."""
        if (one := self._debugged) is not None:
            with suppress(CardcageError):
                await self.thread(one.kill)


def application(face_of: Callable[[], Face], hosts: frozenset[str]) -> ASGIApp:
    """The application. *face_of* is called in its loop; *hosts* are the names that it answers to, all when empty."""
    app = Starlette(exception_handlers={TooLarge: too_large})

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        face = face_of()
        reach = Reach(face)
        files = FileCalls(reach)
        app.router.routes += [*Control(face).routes(), *files.routes(), *CommandCalls(reach).routes()]
        try:
            yield
        finally:
            files.close()
            await face.close()

    app.router.lifespan_context = lifespan
    return Guard(app, hosts)
