"""Commands to a running machine from other processes of its user: a socket beside the machine's entry on the roster.

A request is one line of JSON, ``{"execute": NAME, "arguments": {...}}``, and so is its answer, ``{"return": {...}}`` or
``{"error": {"class": ..., "desc": ...}}``; then the machine hangs up. Open files may come with the request, for a
command that takes some: so a machine in a jail writes where it could open nothing. Cards offer what there is to execute
by a :class:`~cardcage_fleet.ControlOffer`. Before a command runs, the security checkers are asked whether the operator
may ``reach`` the machine and give this ``command``.
"""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from socket import recv_fds, send_fds
from typing import TYPE_CHECKING, Any
from weakref import ref

from cardcage import errors
from cardcage.errors import CardcageError, CardError, HostError, UsageError, in_words, near
from cardcage.security import HOST, OPERATOR, Act

from cardcage_fleet import ControlOffer
from cardcage_fleet.roster import MOST, Roster, connected, is_ours, listening, load

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from cardcage.machine import Machine

    from cardcage_fleet.roster import RosterEntry

__all__ = ["Door", "command", "find"]

SUFFIX = ".control"
CALLERS = 8
"""Commands that are heard at once; more are hung up on."""
PATIENCE = 5.0
"""Seconds that a caller may take to say its line."""
ANSWER = 1 << 20
"""Bytes of an answer."""
FILES = 200
"""Descriptors that may come with a command."""
MSG_CMSG_CLOEXEC = 0x40000000


class Door:
    """The machine's end. Commands run each on a thread of its own, without the machine's lock."""

    def __init__(self, machine: Machine, entry: RosterEntry) -> None:
        # Not the machine: the loop thread would keep one that nobody else holds.
        self._machine, self._name = ref(machine), machine.name
        self._loop, self._machine_lock = machine.loop, machine.lock
        self._lock = threading.Lock()
        self._callers: dict[threading.Thread, socket.socket] = {}
        self._socket = listening(Path(entry.file).with_suffix(SUFFIX))
        machine.loop.add_reader(self._socket.fileno(), self._accept)

    def _accept(self) -> None:
        with suppress(OSError):  # the caller went away
            caller, _ = self._socket.accept()
            thread = threading.Thread(target=self._serve, args=(caller,), name=f"{self._name}-control")
            with self._lock:
                if not is_ours(caller) or len(self._callers) >= CALLERS:
                    caller.close()
                    return
                self._callers[thread] = caller
            thread.start()

    def _serve(self, caller: socket.socket) -> None:
        files: list[int] = []
        try:
            answer = self._answer(heard(caller, MOST, PATIENCE, files), files)
            caller.settimeout(PATIENCE)
            caller.sendall(answer.encode() + b"\n")
        except OSError:  # it went away, or says nothing: its own loss
            pass
        finally:
            for fd in files:
                os.close(fd)
            with self._lock:
                self._callers.pop(threading.current_thread(), None)
                caller.close()

    def _answer(self, line: bytes, files: list[int]) -> str:
        try:
            return self._execute(line, files)
        except CardcageError as error:
            kind = next(one.__name__ for one in type(error).__mro__ if one.__name__ in errors.__all__)
            return json.dumps({"error": {"class": kind, "desc": str(error)}})

    def _execute(self, line: bytes, files: list[int]) -> str:
        try:
            request = load(line)
        except ValueError as error:
            raise UsageError(f"expected a line of JSON: {error}") from error
        name, arguments = request.get("execute"), request.get("arguments", {})
        if not isinstance(name, str) or not isinstance(arguments, dict) or request.keys() - {"execute", "arguments"}:
            raise UsageError('expected {"execute": NAME, "arguments": {...}}')
        machine = self._machine()
        if machine is None:
            raise UsageError(f'machine "{self._name}" is gone')
        facts = {"machine": machine.name, "name": name}
        machine.mediator.check(Act(OPERATOR, machine.label, "management", ("reach",), facts))
        machine.mediator.ask(Act(OPERATOR, HOST, "management", ("command",), facts), name)
        offer = machine.host.registry.get(ControlOffer, name)
        if files and not offer.files:
            raise UsageError(f'the command "{name}" takes no files')
        try:
            found = offer.load()(machine, arguments, *([files] if offer.files else []))
            if not isinstance(found, dict):
                raise TypeError(f"it answered {found!r:.40}, expected a table")
            return json.dumps({"return": found})
        except CardcageError:
            raise
        except Exception as error:  # a card's fault is told and logged, and neither the door nor the machine ends
            machine.log.error("a command failed", command=offer.who, error=repr(error))
            raise CardError(f"{offer.who}: {in_words(error)}") from error

    def close(self) -> None:
        """Hang up on all callers, and wait for commands that run. Not under the machine's lock, nor in a command."""
        with self._machine_lock:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
        with self._lock:
            threads = list(self._callers)
            for caller in self._callers.values():
                with suppress(OSError):  # it hung up first
                    caller.shutdown(2)
        for thread in threads:
            thread.join()


def heard(peer: socket.socket, most: int, patience: float, files: list[int] | None = None) -> bytes:
    """A line from *peer*, without its end. Raises OSError (TimeoutError) when none comes, or one that is too long.

    Descriptors that come with it are added to *files*, up to :data:`FILES`.
    """
    until, line = time.monotonic() + patience, b""
    while not line.endswith(b"\n"):
        peer.settimeout(max(until - time.monotonic(), 0.001))
        if files is None:
            part = peer.recv(4096)
        else:
            part, more, _, _ = recv_fds(peer, 4096, FILES, MSG_CMSG_CLOEXEC)
            files += more
            if len(files) > FILES:
                raise TimeoutError("too many files came along")
        line += part
        if not part or len(line) > most or time.monotonic() > until:
            raise TimeoutError("no whole line was said")
    return line[:-1]


def find(name: str) -> RosterEntry:
    """The machine of this user that runs as *name*, or with this pid or number (``PID-0``). Raises UsageError."""
    alive, _, _ = Roster().read()
    stems = [Path(one.file).stem for one in alive]
    found = [one for one, stem in zip(alive, stems, strict=True) if name in (one.name, str(one.pid), stem)]
    if not found:
        raise UsageError(f'no machine "{name}" of this user runs.{near(name, [one.name for one in alive])}'.rstrip("."))
    if len(found) > 1:
        which = ", ".join(Path(one.file).stem for one in found)
        raise UsageError(f'{len(found)} machines run as "{name}": say which by its number: {which}')
    return found[0]


def command(
    entry: RosterEntry, name: str, arguments: dict[str, Any], timeout: float = 60, files: Sequence[int] = ()
) -> dict[str, Any]:
    """Have a machine execute *name*, with open *files*. Raises what it raised there, HostError without an answer."""
    try:
        with connected(Path(entry.file).with_suffix(SUFFIX), timeout) as peer:
            line = json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n"
            peer.sendall(line[send_fds(peer, [line], files) if files else 0 :])
            answer = load(heard(peer, ANSWER, timeout))
    except (OSError, ValueError) as error:
        why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        raise HostError(f"machine {entry.name} (pid {entry.pid}) takes no command: {why}") from error
    if isinstance(wrong := answer.get("error"), dict):
        kind = getattr(errors, str(wrong.get("class")), None) if wrong.get("class") in errors.__all__ else None
        text = "".join(one if one.isprintable() else "?" for one in str(wrong.get("desc")))
        raise kind(text) if isinstance(kind, type) and issubclass(kind, CardcageError) else HostError(text)
    result = answer.get("return")
    if not isinstance(result, dict):
        raise HostError(f"machine {entry.name} (pid {entry.pid}) gave no answer that can be understood")
    return result
