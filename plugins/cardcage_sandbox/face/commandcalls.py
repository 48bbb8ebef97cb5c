"""Commands of a sandbox, as the SDK asks for them."""

from __future__ import annotations

import base64
import signal
from subprocess import TimeoutExpired
from typing import TYPE_CHECKING, Any

from cardcage.errors import HostError
from starlette.routing import Route

from cardcage_sandbox.face.connect import Failed, failure, seconds, streamed, taken
from cardcage_sandbox.face.control import Refused, error
from cardcage_sandbox.face.reach import failing, only
from cardcage_sandbox.face.words import ended, given, shape, text

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request
    from starlette.responses import Response

    from cardcage_sandbox.client import Sandbox
    from cardcage_sandbox.face.reach import Reach
    from cardcage_sandbox.talk import Talk

__all__ = ["CommandCalls"]

SIGNALS = {"SIGNAL_SIGTERM": signal.SIGTERM, "SIGNAL_SIGKILL": signal.SIGKILL, 15: 15, 9: 9}
SERVICE = "/process.Process"


class CommandCalls:
    """The calls, as the SDK makes them."""

    def __init__(self, reach: Reach) -> None:
        self._reach, self._face = reach, reach.face

    def routes(self) -> list[Route]:
        """Routes of all."""
        calls = {
            "List": self.list,
            "Update": self.update,
            "SendInput": self.sendinput,
            "SendSignal": self.sendsignal,
            "CloseStdin": self.closestdin,
        }
        return [
            *(self._reach.call(f"{SERVICE}/{name}", call) for name, call in calls.items()),
            self._reach.stream(f"{SERVICE}/Start", self.start),
            self._reach.stream(f"{SERVICE}/Connect", self.connect),
            Route(f"{SERVICE}/StreamInput", self.streaminput, methods=["POST"]),
        ]

    async def start(
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

    async def connect(
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
        async for frame in self._reach.frames(talk, request, {"event": {"start": {"pid": pid}}}):
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

    async def _selected(self, sandbox: Sandbox, message: dict[str, Any]) -> tuple[int, bool]:
        """The number of the command that a message means, and whether it has a terminal."""
        which = message.get("process")
        which = which if isinstance(which, dict) else {}
        for one in await self._face.thread(sandbox.commands.list):
            if one.pid == which.get("pid") or (one.tag and one.tag == which.get("tag")):
                return one.pid, one.pty
        raise Failed("not_found", f"process {which.get('pid', which.get('tag'))!r:.60} was not found")

    async def list(self, sandbox: Sandbox, message: dict[str, Any], user: str) -> dict[str, Any]:
        """The commands that run."""
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

    async def update(self, sandbox: Sandbox, message: dict[str, Any], user: str) -> dict[str, Any]:
        """Another size of a terminal."""
        pid, _ = await self._selected(sandbox, message)
        rows, columns = shape(message.get("pty"))
        await self._face.thread(lambda: sandbox.commands.resize(pid, rows, columns))
        return {}

    async def sendinput(self, sandbox: Sandbox, message: dict[str, Any], user: str) -> dict[str, Any]:
        """Input for a command."""
        pid, _ = await self._selected(sandbox, message)
        data = given(message)
        await self._face.thread(lambda: sandbox.commands.send_stdin(pid, data))
        return {}

    async def streaminput(self, request: Request) -> Response:
        """Inputs for a command, in order."""
        try:
            sandbox = await self._reach.reached(request)
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

    async def sendsignal(self, sandbox: Sandbox, message: dict[str, Any], user: str) -> dict[str, Any]:
        """A signal for a command."""
        pid, _ = await self._selected(sandbox, message)
        number = SIGNALS.get(message.get("signal", ""))
        if number is None:
            raise Failed("invalid_argument", "signal: expected SIGTERM or SIGKILL")
        await self._face.thread(lambda: sandbox.commands.send_signal(pid, number))
        return {}

    async def closestdin(self, sandbox: Sandbox, message: dict[str, Any], user: str) -> dict[str, Any]:
        """The end of a command's input."""
        pid, _ = await self._selected(sandbox, message)
        await self._face.thread(lambda: sandbox.commands.send_stdin(pid, b"", close=True))
        return {}
