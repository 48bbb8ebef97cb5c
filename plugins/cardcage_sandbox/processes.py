"""The commands that run in a sandbox, which go on whoever listens to them."""

from __future__ import annotations

import errno
import json
import threading
import time
from contextlib import suppress
from subprocess import PIPE, TimeoutExpired
from typing import TYPE_CHECKING, Any

from cardcage.errors import CardcageError, UsageError
from cardcage.waiting import Condition
from cardcage_fleet.session import Kind

from cardcage_sandbox import TABLE

if TYPE_CHECKING:
    from io import BufferedReader

    from cardcage.machine import Machine
    from cardcage_agent import Popen
    from cardcage_fleet.session import Session

__all__ = ["Running", "Table", "processes"]

MOST = 128
"""Commands at once."""
PIECE = 32768
STARTS = 60.0
"""Seconds that a command may take to start."""


def processes(machine: Machine) -> Table:
    """The commands that run in *machine*."""
    table: Table = machine.host.share(TABLE, dict).setdefault("table", Table())
    return table


class Table:
    """All that run. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[int, Running] = {}
        self._starting = 0

    def find(self, pid: int) -> Running:
        """The one with this number. Raises ProcessLookupError."""
        with self._lock:
            if (found := self._running.get(pid)) is None:
                raise ProcessLookupError(errno.ESRCH, "No such process", f"command {pid}")
            return found

    def rows(self) -> list[dict[str, Any]]:
        """Facts of each."""
        with self._lock:
            return [one.told for one in self._running.values()]

    def start(
        self,
        machine: Machine,
        session: Session,
        *,
        command: list[str],
        env: dict[str, str],
        cwd: str | None,
        user: str,
        pty: list[int] | None,
        input: bool,
        limit: float | None,
        keep: bool,
        tag: str,
    ) -> dict[str, Any]:
        """Start a command and carry its output to *session* until its end; its status.

        Args:
            limit: seconds, after which it is killed. keep: it goes on when the session ends before it.
        """
        with self._lock:
            if len(self._running) + self._starting >= MOST:
                raise UsageError(f"{machine.name} runs {MOST} commands: no more at once")
            self._starting += 1
        try:
            made: Any = machine
            process: Popen = made.popen(
                command,
                stdin=PIPE if input or pty is not None else None,
                env=env,
                cwd=cwd,
                user=user,
                pty=None if pty is None else (pty[0], pty[1]),
                timeout=STARTS,
            )
        finally:
            with self._lock:
                self._starting -= 1
        told = {"pid": process.pid, "command": command, "env": env, "cwd": cwd or "", "user": user, "tag": tag}
        running = Running(process, told, limit, pty is not None)
        with self._lock:
            self._running[process.pid] = running
        try:
            return running.attach(session, begin=lambda: running.begin(self._forget), keep=keep)
        except OSError:  # the caller went away before it had begun
            running.begin(self._forget)
            if not keep:
                process.close()
            raise

    def _forget(self, running: Running) -> None:
        with self._lock:
            if self._running.get(running.process.pid) is running:
                del self._running[running.process.pid]


class Running:
    """One command, and who listens to it. A listener that does not read holds it up."""

    def __init__(self, process: Popen, told: dict[str, Any], limit: float | None, pty: bool) -> None:
        self.process, self.told, self.pty = process, {**told, "pty": pty}, pty
        self._until = None if limit is None else time.monotonic() + limit
        self._limit = limit
        self._changed = Condition()
        self._listeners: list[Session] = []
        self._input = threading.Lock()
        self._begun = False
        self._over: dict[str, Any] | None = None

    def begin(self, over: Any) -> None:
        """Carry its outputs. Idempotent."""
        if self._begun:
            return
        self._begun = True
        threading.Thread(target=self._run, args=(over,), name="sandbox-command", daemon=True).start()

    def _run(self, over: Any) -> None:
        outputs = [(one, at) for at, one in ((1, self.process.stdout), (2, self.process.stderr)) if one is not None]
        pumps = [threading.Thread(target=self._pump, args=one, name="sandbox-output", daemon=True) for one in outputs]
        for one in pumps:
            one.start()
        late = False
        try:
            for one in pumps:
                one.join(None if self._until is None else max(self._until - time.monotonic(), 0))
            status = self.process.wait(None if self._until is None else max(self._until - time.monotonic(), 0))
            late = any(one.is_alive() for one in pumps)
            told: dict[str, Any] = {"status": status}
        except TimeoutExpired:
            late, told = True, {}
        except CardcageError as error:  # the machine ended, or its agent broke the protocol
            told = {"lost": str(error)}
        if late:
            told = {"limit": self._limit}
        self.process.close()
        for one in pumps:
            one.join()
        over(self)
        with self._changed:
            self._over = told
            self._changed.notify_all()

    def _pump(self, stream: BufferedReader, number: int) -> None:
        with suppress(OSError, ValueError, CardcageError):  # the machine ended, or it was given up: _run says so
            while data := stream.read1(PIECE):
                with self._changed:
                    listeners = list(self._listeners)
                for one in listeners:
                    try:
                        one.send(Kind.DATA, data, 1 if self.pty else number)
                    except OSError:  # it went away
                        self._leave(one)

    def attach(self, session: Session, *, begin: Any = None, keep: bool = True) -> dict[str, Any]:
        """Carry what comes to *session* from now on, until the end; its status, or why there is none."""
        session.send(Kind.DATA, json.dumps({"pid": self.process.pid}).encode(), 3)
        with self._changed:
            self._listeners.append(session)
        session.listen(lambda frame: None, lambda: self._leave(session))
        if begin is not None:
            begin()
        with self._changed:
            self._changed.wait_for(lambda: self._over is not None or session not in self._listeners)
            over = self._over
        if over is None and not keep:
            self.process.close()
        return over or {}

    def _leave(self, session: Session) -> None:
        with self._changed:
            if session in self._listeners:
                self._listeners.remove(session)
            self._changed.notify_all()

    def write(self, data: bytes) -> None:
        """Send it input. Raises UsageError for one that takes none."""
        with self._input:
            if self.process.stdin is None or self.process.stdin.closed:
                raise UsageError(f"command {self.process.pid} has no input")
            self.process.stdin.write(data)
            self.process.stdin.flush()

    def end_input(self) -> None:
        """Its input has ended."""
        with self._input:
            if self.process.stdin is not None and not self.process.stdin.closed:
                self.process.stdin.close()
