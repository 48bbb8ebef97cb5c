"""Post-copy for tests: a destination in a process of its own, and connections that break where a test says so."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cardcage.errors import HostError
from cardcage.machine import Machine
from cardcage_migrate.faults import open_faults
from cardcage_migrate.limits import Limits
from cardcage_migrate.outgoing import Outgoing
from cardcage_migrate.progress import Progress
from cardcage_migrate.reach import connect, parse


def _why_not() -> str:
    try:
        os.close(open_faults())
    except HostError as error:
        return str(error)
    return ""


possible = pytest.mark.skipif(bool(_why_not()), reason=_why_not())
"""For what takes a host that has it."""
SIDE = Path(__file__).parent / "plugins" / "postcopy_side.py"


class Side:
    """A process that waits at *uri* for a machine. Attribute ``uri``: where it is reached."""

    def __init__(self, folder: Path, uri: str = "", script: Path = SIDE, **options: Any) -> None:
        wanted = uri or f"unix:{folder}/door"
        paths = os.pathsep.join(str(one) for one in (SIDE.parent, SIDE.parents[1]))
        environment = {**os.environ, "PYTHONPATH": paths}
        keys = {key: value for key, value in {"trust": True, **options}.items() if value is not None}
        self.process = subprocess.Popen(
            [sys.executable, str(script), wanted, str(folder), json.dumps(keys)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        told = self.hear("ready")
        self.uri = f"tcp:127.0.0.1:{told['port']}" if told["port"] else wanted

    def hear(self, key: str) -> dict[str, Any]:
        """The next line that tells of *key*; nothing once it is dead."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            told: dict[str, Any] = json.loads(line)
            if key in told:
                return told
        return {}

    def ask(self, key: str, do: str, **more: Any) -> dict[str, Any]:
        """Say a line, and hear."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **more}) + "\n")
        self.process.stdin.flush()
        return self.hear(key)

    def close(self) -> None:
        """End it."""
        with suppress(BrokenPipeError, ValueError):
            self.process.communicate('{"do": "quit"}\n', timeout=60)

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Breaking:
    """A connection for pages that breaks once so many bytes went over it, from when it is *armed*."""

    def __init__(self, peer: Any, most: int, armed: bool = True) -> None:
        self._peer, self._left, self.armed = peer, most, armed

    def sendall(self, data: Any, /) -> None:
        """As far as it goes."""
        view = memoryview(data).cast("B")
        if not self.armed:
            return self._peer.sendall(view)
        if len(view) > self._left:
            self._peer.sendall(view[: self._left])
            self._peer.shutdown(socket.SHUT_RDWR)
            raise BrokenPipeError(32, "it was cut")
        self._left -= len(view)
        return self._peer.sendall(view)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._peer, name)


def dial(uri: str) -> Any:
    """A connection there."""
    return connect(parse(uri))[0]


def gone_over(vm: Machine, uri: str, most: int, *, late: bool = True, bandwidth: int | None = 4 << 20) -> Progress:
    """Move by post-copy, whose pages have a connection that breaks after *most* bytes; with *late*, once it runs
    there."""
    made: list[Any] = []

    def link() -> tuple[Any, bool]:
        made.append(Breaking(dial(uri), most, not late) if made else dial(uri))
        return made[-1], False

    def tell(one: Progress) -> None:
        if one.status == "postcopy-active":
            made[1].armed = True

    return Outgoing(vm, uri, Limits(downtime=60, mode="postcopy", bandwidth=bandwidth), tell).over(link)
