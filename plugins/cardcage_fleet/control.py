"""Commands to a running machine from other processes of its user: a socket beside the machine's entry on the roster.

A request is one line of JSON, ``{"execute": NAME, "arguments": {...}}``, and so is its answer, ``{"return": {...}}`` or
``{"error": {"class": ..., "desc": ...}}``; then the machine hangs up. Cards offer what there is to execute by a
:class:`~cardcage_fleet.ControlOffer`. Before a command runs, the security checkers are asked whether the operator may
``reach`` the machine and give this ``command``.

A command that is offered by a :class:`~cardcage_fleet.SessionOffer` goes on as a conversation:
:mod:`cardcage_fleet.session`.
"""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import ref

from cardcage import errors
from cardcage.errors import CardcageError, CardError, HostError, UsageError, in_words, near
from cardcage.security import HOST, OPERATOR, Act
from cardcage_jail import listen_at

from cardcage_fleet import ControlOffer, SessionOffer
from cardcage_fleet.roster import MOST, Roster, connected, is_ours, load

if TYPE_CHECKING:
    import socket

    from cardcage.machine import Machine

    from cardcage_fleet.roster import RosterEntry
    from cardcage_fleet.session import Session

__all__ = ["Door", "command", "find", "raised"]

SUFFIX = ".control"
DESCRIPTORS = 64
"""Descriptors that may come with a request."""
CALLERS = 8
"""Commands that are heard at once; more are hung up on."""
SESSIONS = 32
"""Sessions at once; one more is refused."""
PATIENCE = 5.0
"""Seconds that a caller may take to say its line."""
ANSWER = 1 << 20
"""Bytes of an answer."""
ENDING = 2.0
"""Seconds that callers have to take their answers when the machine ends."""
SHUT_RD, SHUT_RDWR = 0, 2


class Door:
    """The machine's end. Commands run each on a thread of its own, without the machine's lock."""

    def __init__(self, machine: Machine, entry: RosterEntry) -> None:
        # Not the machine: the loop thread would keep one that nobody else holds.
        self._machine, self._name = ref(machine), machine.name
        self._loop, self._machine_lock = machine.loop, machine.lock
        self._lock = threading.Lock()
        self._callers: dict[threading.Thread, socket.socket] = {}
        self._sessions: set[threading.Thread] = set()
        self._socket = listen_at(str(Path(entry.file).with_suffix(SUFFIX)))
        machine.loop.add_reader(self._socket.fileno(), self._accept)

    def _accept(self) -> None:
        with suppress(OSError):  # the caller went away
            caller, _ = self._socket.accept()
            thread = threading.Thread(target=self._serve, args=(caller,), name=f"{self._name}-control")
            with self._lock:
                if not is_ours(caller) or len(self._callers) - len(self._sessions) >= CALLERS:
                    caller.close()
                    return
                self._callers[thread] = caller
            thread.start()

    def _serve(self, caller: socket.socket) -> None:
        from cardcage_fleet.session import Session

        session = Session(caller)
        try:
            line = heard(caller, MOST, PATIENCE, session.fds)
            caller.settimeout(PATIENCE)
            self._answer(line, session)
        except OSError:  # it went away, or says nothing: its own loss
            pass
        finally:
            session.close()
            with self._lock:
                self._callers.pop(threading.current_thread(), None)
                self._sessions.discard(threading.current_thread())
                caller.close()

    def _answer(self, line: bytes, session: Session) -> None:
        try:
            answer: dict[str, Any] = {"return": self._execute(line, session)}
        except CardcageError as error:
            kind = next(one.__name__ for one in type(error).__mro__ if one.__name__ in errors.__all__)
            answer = {"error": {"class": kind, "desc": str(error)}}
        session.answer(answer)

    def _execute(self, line: bytes, session: Session) -> dict[str, Any]:
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
        registry = machine.host.registry
        talks = name in registry.names(SessionOffer)
        offer = registry.get(SessionOffer if talks else ControlOffer, name)
        if talks:
            with self._lock:
                if len(self._sessions) >= SESSIONS:
                    raise UsageError(f'machine "{self._name}" has {SESSIONS} sessions: no more at once')
                self._sessions.add(threading.current_thread())
        try:
            found = offer.load()(machine, arguments, session) if talks else offer.load()(machine, arguments)
            if not isinstance(found, dict):
                raise TypeError(f"it answered {found!r:.40}, expected a table")
            json.dumps(found)
        except (CardcageError, OSError) as error:
            if isinstance(error, CardcageError):
                raise
            if session.begun:
                raise  # the caller went away
            raise CardError(f"{offer.who}: {in_words(error)}") from error
        except Exception as error:  # a card's fault is told and logged, and neither the door nor the machine ends
            machine.log.error("a command failed", command=offer.who, error=repr(error))
            raise CardError(f"{offer.who}: {in_words(error)}") from error
        return found

    def abandon(self) -> None:
        """This is a forked process, and the door the parent's."""
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        self._lock = threading.Lock()  # a thread that is not here may have had it
        for caller in self._callers.values():
            caller.close()
        self._callers.clear()

    def close(self) -> None:
        """Let commands that run end, and hang up on all others. Not under the machine's lock, nor in a command.

        Nothing more is heard of a caller; one that does not take its answer within seconds loses it.
        """
        with self._machine_lock:
            if self._socket.fileno() >= 0:
                self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
        with self._lock:
            threads = list(self._callers)
        until = time.monotonic() + ENDING
        for how in (SHUT_RD, SHUT_RDWR):
            with self._lock:
                for caller in self._callers.values():
                    with suppress(OSError):  # it hung up first
                        caller.shutdown(how)
            for thread in threads:
                thread.join(max(until - time.monotonic(), 0) if how == SHUT_RD else None)


def heard(peer: socket.socket, most: int, patience: float, fds: list[int] | None = None) -> bytes:
    """A line from *peer*, without its end. Raises OSError (TimeoutError) when none comes, or one that is too long.

    Args:
        fds: gets descriptors that came with it, a few; without, none is taken.
    """
    until, line = time.monotonic() + patience, b""
    while not line.endswith(b"\n"):
        peer.settimeout(max(until - time.monotonic(), 0.001))
        if fds is None:
            part = peer.recv(4096)
        else:
            part, more = receive_fds(peer)
            fds += more
        line += part
        if not part or len(line) > most or time.monotonic() > until or (fds is not None and len(fds) > DESCRIPTORS):
            raise TimeoutError("no whole line was said")
    return line[:-1]


def receive_fds(peer: socket.socket) -> tuple[bytes, list[int]]:
    """Some bytes, and descriptors that came with them, closed on exec. Raises OSError."""
    import socket

    part, more, _, _ = socket.recv_fds(peer, 4096, DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
    return part, more


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


def command(entry: RosterEntry, name: str, arguments: dict[str, Any], timeout: float = 60) -> dict[str, Any]:
    """Have a machine execute *name*. Raises what it raised there, HostError when the machine does not answer."""
    try:
        with connected(Path(entry.file).with_suffix(SUFFIX), timeout) as peer:
            peer.sendall(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")
            answer = load(heard(peer, ANSWER, timeout))
    except (OSError, ValueError) as error:
        why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        raise HostError(f"machine {entry.name} (pid {entry.pid}) takes no command: {why}") from error
    return raised(answer, entry)


def raised(answer: dict[str, Any], entry: RosterEntry) -> dict[str, Any]:
    """The table that *answer* returns. Raises the error that it tells of, HostError for what is no answer."""
    if isinstance(wrong := answer.get("error"), dict):
        kind = getattr(errors, str(wrong.get("class")), None) if wrong.get("class") in errors.__all__ else None
        text = "".join(one if one.isprintable() else "?" for one in str(wrong.get("desc")))
        raise kind(text) if isinstance(kind, type) and issubclass(kind, CardcageError) else HostError(text)
    result = answer.get("return")
    if not isinstance(result, dict):
        raise HostError(f"machine {entry.name} (pid {entry.pid}) gave no answer that can be understood")
    return result
