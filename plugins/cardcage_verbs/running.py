"""The machine's end of ``cardcage exec``: a process in the guest, and its streams to who asked for it."""

from __future__ import annotations

import threading
from collections import deque
from subprocess import PIPE, TimeoutExpired
from typing import IO, TYPE_CHECKING, Any

from cardcage.errors import CardcageError, UsageError
from cardcage.waiting import Condition
from cardcage_fleet.session import Kind

from cardcage_verbs.machine import only

if TYPE_CHECKING:
    from io import BufferedReader

    from cardcage.machine import Machine
    from cardcage_fleet.session import Frame, Session

__all__ = ["WINDOW", "execute"]

WINDOW = 1 << 18
"""Bytes of standard input that a caller may send before it is told that they went on."""
PIECE = 32768


class _Input:
    """Standard input on its way: what came, and was not written yet. The listener of a session must not wait."""

    def __init__(self, session: Session, stream: IO[bytes]) -> None:
        self._session, self._stream = session, stream
        self._changed = Condition()
        self._kept: deque[bytes] = deque()
        self._size, self._over = 0, False

    def put(self, data: bytes) -> None:
        """Add *data*; empty for the end, behind which nothing counts. More than there is room for ends the session."""
        with self._changed:
            if self._over:
                return
            self._size += len(data)
            if self._size > WINDOW:
                self._session.hang_up()
                return
            self._over = not data
            self._kept.append(data)
            self._changed.notify()

    def end(self) -> None:
        """Nobody waits for input any longer."""
        with self._changed:
            self._kept.clear()
            self._kept.append(b"")
            self._changed.notify()

    def carry(self) -> None:
        """Write it all, on a thread of its own."""
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._kept)
                    data = self._kept.popleft()
                if not data:
                    self._stream.close()
                    return
                self._stream.write(data)
                self._stream.flush()
                with self._changed:
                    self._size -= len(data)
                self._session.send(Kind.CREDIT, len(data).to_bytes(4, "little"))
        except (OSError, ValueError, CardcageError):  # nobody reads it there, the caller is gone, or the machine ended
            return


def execute(machine: Machine, arguments: dict[str, Any], session: Session) -> dict[str, Any]:
    """Run a command in the guest by the agent there.

    Arguments: *command*, a list; *user*, *cwd*, *env* and *timeout* (seconds to its start); *input*, whether it has
    one; *pty*, rows and columns. Returns its *status*, or the guest's *errno* where it could not be started. A caller
    that hangs up ends it.
    """
    only(arguments, command=list, user=str, cwd=str, env=dict, timeout=(int, float), input=bool, pty=list)
    command, pty = arguments.get("command"), arguments.get("pty")
    if not command or not all(isinstance(one, str) for one in command):
        raise UsageError("command: expected a list of text, with one word at least")
    env = arguments.get("env")
    if env is not None and not all(isinstance(one, str) for one in env.values()):
        raise UsageError("env: expected a table of text")
    if pty is not None and (len(pty) != 2 or not all(type(one) is int for one in pty)):
        raise UsageError("pty: expected rows and columns")
    start: Any = getattr(machine, "popen", None)
    if start is None:
        raise UsageError(f"{machine.name}: no card offers an agent that runs commands")
    takes = bool(arguments.get("input")) or pty is not None
    try:
        process = start(
            command,
            stdin=PIPE if takes else None,
            stdout=PIPE,
            stderr=PIPE,
            env=env,
            cwd=arguments.get("cwd"),
            user=arguments.get("user"),
            pty=None if pty is None else (pty[0], pty[1]),
            timeout=arguments.get("timeout", 60),
        )
    except TimeoutExpired as error:
        raise UsageError(f"{machine.name}: the command did not start within {error.timeout:g} s") from error
    except OSError as error:
        return {"errno": error.errno, "error": str(error)}
    try:
        return {"status": _carry(process, session, takes)}
    finally:
        process.close()


def _carry(process: Any, session: Session, takes: bool) -> int:
    """Carry the streams until the process's end; its return code."""
    session.begin(pid=process.pid)
    given = _Input(session, process.stdin) if takes else None

    def heard(frame: Frame) -> None:
        if frame.kind in (Kind.DATA, Kind.END) and given is not None:
            given.put(frame.data)
        elif frame.kind is Kind.SIGNAL and len(frame.data) == 1 and 0 < frame.data[0] <= 64:
            process.send_signal(frame.data[0])
        elif frame.kind is Kind.RESIZE and len(frame.data) == 4 and takes:
            process.resize(int.from_bytes(frame.data[:2], "little"), int.from_bytes(frame.data[2:], "little"))

    def pump(stream: BufferedReader, number: int) -> None:
        try:
            while data := stream.read1(PIECE):
                session.send(Kind.DATA, data, number)
            session.send(Kind.END, stream=number)
        except OSError:  # nobody hears it any more
            process.close()
        except CardcageError:  # the machine ended, or the process was given up; wait() says so
            pass

    session.listen(heard, process.close)
    outputs = [(one, at) for at, one in ((1, process.stdout), (2, process.stderr)) if one is not None]
    threads = [threading.Thread(target=pump, args=one, name="exec-output") for one in outputs]
    threads += [threading.Thread(target=given.carry, name="exec-input")] if given is not None else []
    for one in threads:
        one.start()
    try:
        for one in threads[: len(outputs)]:
            one.join()
        code: int = process.wait()
        return code
    finally:
        process.close()
        if given is not None:
            given.end()
        for one in threads:
            one.join()
