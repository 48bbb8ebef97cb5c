"""The calls that make, find and end sandboxes."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote

from cardcage.errors import CardcageError, ConfigError, UsageError
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cardcage_sandbox.client import NO_NETWORK, Sandbox, SandboxInfo
from cardcage_sandbox.face.snapshots import MOST, NAME
from cardcage_sandbox.template import keepers

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.requests import Request

    from cardcage_sandbox.face.app import Face

    Answer = Callable[[Request], Awaitable[Response]]

__all__ = ["ENVD", "Control"]

ENVD = "0.6.1"
"""The version of e2b's agent whose calls there are: files' metadata, for one, came after it."""
PAGE = 100
MIB = 1 << 20
REFUSED = {"mcp": "MCP servers", "iam": "identities", "volumeMounts": "volumes"}

KEEPERS = 32
"""Templates that run at once, beyond which none with a way out of its own is begun."""


class Refused(Exception):
    """A status, and why."""

    def __init__(self, status: int, why: str) -> None:
        self.status, self.why = status, why
        super().__init__(why)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.status, self.why)


class Control:
    """The calls, as the SDK makes them."""

    def __init__(self, face: Face) -> None:
        self._face = face

    def routes(self) -> list[Route]:
        """Where they are."""
        table: tuple[tuple[str, str, Callable[[Request], Awaitable[Response]]], ...] = (
            ("POST", "/v2/sandboxes", self.create),
            ("POST", "/sandboxes", self.create),
            ("GET", "/v2/sandboxes", self.list),
            ("POST", "/v2/sandboxes/{id}/connect", self.connect),
            ("POST", "/sandboxes/{id}/connect", self.connect),
            ("POST", "/sandboxes/{id}/resume", self.resume),
            ("GET", "/sandboxes/{id}", self.info),
            ("DELETE", "/sandboxes/{id}", self.kill),
            ("POST", "/sandboxes/{id}/pause", self.pause),
            ("POST", "/sandboxes/{id}/timeout", self.timeout),
            ("POST", "/sandboxes/{id}/fork", self.fork),
            ("PUT", "/sandboxes/{id}/network", self.network),
            ("GET", "/sandboxes/{id}/metrics", self.metrics),
            ("POST", "/sandboxes/{id}/snapshots", self.snapshot),
            ("GET", "/snapshots", self.snapshots),
            ("DELETE", "/templates/{name}", self.forget),
        )
        return [Route(path, self._guarded(call), methods=[method]) for method, path, call in table]

    def _guarded(self, call: Answer) -> Answer:
        async def guarded(request: Request) -> Response:
            if not self._face.keys.is_key(request.headers.get("x-api-key")):
                return error(401, "X-API-KEY: expected this server's key")
            try:
                return await call(request)
            except Refused as refused:
                return error(refused.status, refused.why)
            except (UsageError, ConfigError) as problem:
                return error(400, str(problem))
            except CardcageError as problem:
                return error(500, str(problem))

        return guarded

    async def _body(self, request: Request, **kinds: type) -> dict[str, Any]:
        try:
            found = json.loads(await request.body() or b"{}")
        except (ValueError, RecursionError) as problem:
            raise Refused(400, f"expected JSON: {problem}") from problem
        if not isinstance(found, dict):
            raise Refused(400, "expected JSON: a table")
        for name, kind in kinds.items():
            if found.get(name) is not None and type(found[name]) is not kind:
                raise Refused(400, f"{name}: expected {kind.__name__}")
        return found

    async def _sandbox(self, request: Request) -> Sandbox:
        return await self._face.sandbox(request.path_params["id"])

    def _told(self, sandbox: Sandbox, info: SandboxInfo) -> dict[str, Any]:
        return {
            "templateID": info.template,
            "sandboxID": sandbox.id,
            "clientID": "cardcage",
            "envdVersion": ENVD,
            "envdAccessToken": self._face.keys.token(sandbox.id),
            "domain": None,
        }

    async def create(self, request: Request) -> Response:
        """Make one."""
        kinds = {"templateID": str, "timeout": int, "metadata": dict, "envVars": dict, "autoPause": bool}
        body = await self._body(request, **kinds, network=dict, allow_internet_access=bool)
        for name, what in REFUSED.items():
            if body.get(name):
                raise Refused(400, f"{name}: there are no {what}")
        if body.get("allow_internet_access"):
            raise Refused(400, NO_NETWORK)
        template = await self._face.thread(self._face.template, body.get("templateID") or "base")
        egress = _egress(body.get("network") or {})
        if egress and len(await self._face.thread(keepers)) >= KEEPERS:
            raise Refused(429, f"network.allowOut: there are {KEEPERS} templates that run: expected one of theirs")
        keys: dict[str, Any] = {
            "timeout": body.get("timeout") or 300,
            "metadata": body.get("metadata"),
            "envs": body.get("envVars"),
            "on_timeout": "pause" if body.get("autoPause") else "kill",
            "egress": egress or None,
        }
        sandbox = await self._face.thread(lambda: Sandbox.create(template, **keys))
        self._face.know(sandbox)
        return JSONResponse(self._told(sandbox, sandbox.made), 201)

    async def list(self, request: Request) -> Response:
        """A page of them."""
        query = request.query_params
        rows = await self._face.thread(Sandbox.list)
        wanted = {unquote(name): unquote(value) for name, value in parse_qsl(query.get("metadata", ""))}
        since = _moment(query.get("startedAfter"))
        states = [one for one in query.get("state", "").split(",") if one]
        rows = [
            one
            for one in rows
            if wanted.items() <= one.metadata.items()
            and (not states or one.state in states)
            and query.get("template", one.template) == one.template
            and one.started >= since
        ]
        if query.get("order") != "asc":
            rows.reverse()
        return _page(request, [listed(one) for one in rows])

    async def info(self, request: Request) -> Response:
        """Facts of one."""
        sandbox = await self._sandbox(request)
        info = await self._face.thread(sandbox.info)
        return JSONResponse({**listed(info), **self._told(sandbox, info), "allowInternetAccess": False})

    async def connect(self, request: Request) -> Response:
        """Find one, let it go on where it is paused, and live longer."""
        body = await self._body(request, timeout=int, memory=bool)
        if body.get("memory") is False:
            raise Refused(400, "memory: a sandbox is not booted anew")
        sandbox = await self._sandbox(request)
        timeout = body.get("timeout") or 300

        def act() -> SandboxInfo:
            if not sandbox.resume(timeout):
                sandbox.set_timeout(timeout, longer=True)
            return sandbox.info()

        return JSONResponse(self._told(sandbox, await self._face.thread(act)), 200)

    async def resume(self, request: Request) -> Response:
        """Let one go on."""
        body = await self._body(request, timeout=int)
        sandbox = await self._sandbox(request)
        if not await self._face.thread(lambda: sandbox.resume(body.get("timeout") or 300)):
            raise Refused(409, f"sandbox {sandbox.id} runs")
        return JSONResponse(self._told(sandbox, await self._face.thread(sandbox.info)), 201)

    async def kill(self, request: Request) -> Response:
        """End one."""
        sandbox = await self._sandbox(request)
        await self._face.thread(sandbox.kill)
        self._face.forget(sandbox.id)
        return Response(status_code=204)

    async def pause(self, request: Request) -> Response:
        """Bring one to a stand."""
        body = await self._body(request, memory=bool)
        if body.get("memory") is False:
            raise Refused(400, "memory: a paused sandbox keeps its memory")
        sandbox = await self._sandbox(request)
        if not await self._face.thread(sandbox.pause):
            raise Refused(409, f"sandbox {sandbox.id} is paused")
        return Response(status_code=204)

    async def timeout(self, request: Request) -> Response:
        """Give one another end."""
        body = await self._body(request, timeout=int)
        sandbox = await self._sandbox(request)
        await self._face.thread(lambda: sandbox.set_timeout(body.get("timeout", 0)))
        return Response(status_code=204)

    async def fork(self, request: Request) -> Response:
        """Copies of one."""
        body = await self._body(request, timeout=int, count=int)
        sandbox = await self._sandbox(request)
        timeout, count = body.get("timeout") or 300, body.get("count") or 1
        made = await self._face.thread(lambda: sandbox.fork(count, timeout=timeout))
        for one in made:
            self._face.know(one)
        return JSONResponse([{"sandbox": self._told(one, one.made)} for one in made], 201)

    async def network(self, request: Request) -> Response:
        """A network: one that runs keeps what it was made with."""
        body = await self._body(request)
        await self._sandbox(request)
        if any(body.get(one) for one in body if one != "denyOut"):
            raise Refused(400, NO_NETWORK)
        return Response(status_code=204)

    async def snapshot(self, request: Request) -> Response:
        """Keep one, as a template by its name."""
        body = await self._body(request, name=str, memory=bool)
        if body.get("memory") is False:
            raise Refused(400, "memory: a snapshot has its sandbox's memory")
        sandbox, kept, name = await self._sandbox(request), self._face.snapshots, body.get("name") or ""
        if name and not NAME.fullmatch(name):
            raise Refused(400, f"name: {name[:70]!r}: expected at most 64 letters, digits, _ and -")
        template = await self._face.thread(self._face.template, sandbox.made.template)
        here, all_of = await self._face.thread(lambda: (kept.list(name=name) if name else [], kept.list()))
        if any(path.parent.name != sandbox.id for path in here) or self._face.is_template(name):
            raise Refused(409, f"name: {name} is another sandbox's snapshot, or a template")
        if len(all_of) >= MOST and not here:
            raise Refused(429, f"there are {MOST} snapshots: delete some first")
        name = await self._face.thread(lambda: kept.keep(sandbox, template, name))
        return JSONResponse(named(name), 201)

    async def snapshots(self, request: Request) -> Response:
        """A page of what was kept."""
        query = request.query_params
        sandbox, name = query.get("sandboxID", ""), query.get("name", "")
        if any(one and not NAME.fullmatch(one) for one in (sandbox, name)):
            raise Refused(400, "sandboxID, name: expected letters, digits, _ and -")
        rows = await self._face.thread(lambda: self._face.snapshots.list(sandbox, name))
        return _page(request, [named(path.name) for path in rows])

    async def forget(self, request: Request) -> Response:
        """Remove what was kept."""
        if not await self._face.thread(lambda: self._face.snapshots.remove(request.path_params["name"])):
            raise Refused(404, f"snapshot {request.path_params['name'][:60]!r} was not found")
        return Response(status_code=204)

    async def metrics(self, request: Request) -> Response:
        """Use of one now: of its processors since it began, of memory as its kernel has it."""
        sandbox = await self._sandbox(request)
        info = await self._face.thread(sandbox.info)
        text = await self._face.thread(lambda: sandbox.files.read("/proc/meminfo", user="root"))
        found = {
            line.partition(":")[0]: int(line.split()[1]) * 1024
            for line in text.decode(errors="replace").splitlines()
            if len(line.split()) > 1 and line.split()[1].isdigit()
        }
        now = datetime.now(UTC)
        total, free, cache = (found.get(one, 0) for one in ("MemTotal", "MemAvailable", "Cached"))
        row = {
            "timestamp": now.isoformat(),
            "timestampUnix": int(now.timestamp()),
            "cpuCount": info.cpus,
            "cpuUsedPct": _busy(info),
            "memUsed": max(total - free, 0),
            "memTotal": total,
            "memCache": cache,
            "diskUsed": found.get("Shmem", 0),
            "diskTotal": info.disk,
        }
        return JSONResponse([row])


def named(snapshot: str) -> dict[str, Any]:
    """A snapshot as the SDK reads it."""
    return {"snapshotID": snapshot, "names": [snapshot]}


def error(status: int, why: str) -> JSONResponse:
    """An error as the SDK reads it."""
    return JSONResponse({"code": status, "message": why}, status)


def listed(info: SandboxInfo) -> dict[str, Any]:
    """A sandbox in a list."""
    return {
        "templateID": info.template,
        "sandboxID": info.id,
        "clientID": "cardcage",
        "envdVersion": ENVD,
        "startedAt": _said(info.started),
        "endAt": _said(info.ends),
        "cpuCount": info.cpus,
        "memoryMB": info.memory // MIB,
        "diskSizeMB": info.disk // MIB,
        "state": info.state,
        "metadata": info.metadata,
    }


def _page(request: Request, rows: list[Any]) -> Response:
    """The page of *rows* that a request asks for, and where the next one begins. Raises Refused."""
    query = request.query_params
    first, limit = _number(query.get("nextToken"), 0, 0), _number(query.get("limit"), PAGE, 1)
    page = rows[first : first + min(limit, PAGE)]
    more = {"x-next-token": str(first + len(page))} if first + len(page) < len(rows) else {}
    return JSONResponse(page, headers=more)


def _said(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def _moment(text: str | None) -> float:
    if not text:
        return 0.0
    try:
        return datetime.fromisoformat(text.replace(" ", "+")).timestamp()
    except ValueError as problem:
        raise Refused(400, f"startedAfter: {problem}") from problem


def _number(text: str | None, default: int, least: int) -> int:
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10) or int(text) < least:
        raise Refused(400, f"limit, nextToken: expected a number from {least}")
    return int(text)


def _busy(info: SandboxInfo) -> float:
    """Per cent of its processors that its process has used since the sandbox began."""
    with suppress(OSError, ValueError, IndexError):
        words = Path(f"/proc/{info.pid}/stat").read_bytes().rpartition(b")")[2].split()
        used = (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
        return round(100 * used / max(time.time() - info.started, 0.1) / info.cpus, 2)
    return 0.0


def _egress(network: dict[str, Any]) -> list[str]:
    """What ``allowOut`` opens; what is denied is so without being named. Raises Refused."""
    for name in network:
        if network[name] and name not in ("allowOut", "denyOut"):
            raise Refused(400, f"network.{name[:40]}: a sandbox has no network card with that: expected allowOut")
    found = network.get("allowOut") or []
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise Refused(400, "network.allowOut: expected a list of names and CIDRs")
    if "0.0.0.0/0" in found:
        raise Refused(400, NO_NETWORK)
    return found
