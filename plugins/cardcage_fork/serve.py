"""A copy's process: it does what its parent asks for, and ends when that hangs up or the guest ends alone."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from cardcage.errors import CardcageError, HostError, UsageError, in_words
from cardcage.waiting import Event

from cardcage_fork.wire import DESCRIPTORS, Peer, pack_error, pack_value, unpack_value

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.machine import Machine

__all__ = ["Server"]

SEEDING = 5.0
"""Seconds that the agent may take to give the guest new randomness."""
METHODS = frozenset(
    "state outcome wait stop pause resume reset shutdown inject_nmi checkpoint revert run put get "
    "agent.ping agent.reseed agent.set_time agent.wait console.output console.send console.expect".split()
)
"""Attributes that a parent can ask for by name; besides them there are ``fork``, ``born``, ``close`` and ``detach``."""


_serving: list[Server] = []
"""The one of this process, where it is a copy."""


def leave_server() -> None:
    """This is a new process: what serves its parent is the parent's."""
    while _serving:
        _serving.pop().abandon()


class Server:
    """Serves one link. :meth:`run` is the life of the process's first thread."""

    def __init__(self, machine: Machine, end: socket.socket) -> None:
        self._machine, self._peer = machine, Peer(end)
        self._sending = threading.Lock()
        self._children: dict[int, int] = {}
        self._wake, self._alone = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK), False
        self._seeded, self._unseeded = Event(), False  # the latter of a copy of a paused machine, until it goes on
        self._observer = self._changed  # the same object each time
        self.born = time.monotonic()
        machine.observers.add("state", self._observer)
        _serving.append(self)

    def _changed(self, state: str) -> None:
        os.eventfd_write(self._wake, 1)

    def abandon(self) -> None:
        """Close what is another process's."""
        self._machine.observers.remove("state", self._observer)
        self._peer.close()
        for fd in (self._wake, *self._children.values()):
            os.close(fd)

    def run(self) -> None:
        """Serve until the link is closed; a copy that was let go, until its guest ends."""
        threading.Thread(target=self._seed, name="fork-seed", daemon=True).start()
        link = self._peer.fileno()
        while not self._alone or self._machine.state != "stopped":
            poll = select.poll()
            watched = [self._wake, *self._children.values(), *(() if self._alone else (link,))]
            for fd in watched:
                poll.register(fd, select.POLLIN)
            for fd, _ in poll.poll():
                if fd == self._wake:
                    os.eventfd_read(fd)
                    if self._unseeded and self._machine.state == "running":
                        self._unseeded = False
                        threading.Thread(target=self._seed, name="fork-seed", daemon=True).start()
                elif fd != link:
                    self._reap(fd)
                elif not self._hear():
                    return

    def _reap(self, fd: int) -> None:
        pid = next(pid for pid, one in self._children.items() if one == fd)
        del self._children[pid]
        os.close(fd)
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)

    def _seed(self) -> None:
        """New randomness for the guest, first of all, or once it goes on; or a line that says that it has none."""
        machine: Any = self._machine
        if machine.state == "paused":
            self._unseeded = True
            os.eventfd_write(self._wake, 1)  # it may have gone on meanwhile
            return
        try:
            if machine.services.get("agent") is not None and machine.state == "running":
                machine.agent.reseed(timeout=SEEDING)
                return
            why = "it has no agent" if machine.services.get("agent") is None else f"it is {machine.state}"
        except (CardcageError, OSError) as error:
            why = str(error)
        finally:
            self._seeded.set()
        machine.log.warning("copies share their random numbers for a while", why=why)

    def _hear(self) -> bool:
        """Take a request; False when there will be none."""
        try:
            request, _ = self._peer.receive()
        except (EOFError, OSError):
            return False
        name, number = str(request.get("do")), request.get("id")
        if name == "close":
            self._answer(number, lambda: None)
            return False
        if name == "born":
            self._answer(number, lambda: self.born)
            return True
        if name == "detach":
            self._alone = True
            self._answer(number, lambda: None)
            self._peer.close()
            return True
        arguments, keys = unpack_value(request.get("with", [])), unpack_value(request.get("keys", {"table": []}))
        act: Callable[[], Any]
        if name == "fork":
            count = arguments[0]
            threading.Thread(target=self._fork, args=(number, count), name="fork-fork", daemon=True).start()
            return True
        if name in METHODS:

            def act() -> Any:
                if name == "run" and self._machine.state == "running":
                    self._seeded.wait(SEEDING)
                owner: Any = self._machine
                *path, last = name.split(".")
                for one in path:
                    owner = getattr(owner, one)
                found = getattr(owner, last)
                return found(*arguments, **keys) if callable(found) else found
        else:

            def act() -> Any:
                raise HostError(f"a copy cannot be asked for {name!r}")

        threading.Thread(target=self._answer, args=(number, act), name=f"fork-{name}", daemon=True).start()
        return True

    def _answer(self, number: Any, act: Callable[[], Any]) -> None:
        try:
            answer = {"id": number, "return": pack_value(_plain(act()))}
        except (CardcageError, OSError, ValueError) as error:
            answer = {"id": number, "error": pack_error(error)}
        except Exception as error:  # whatever a card raised is told, and the copy goes on
            answer = {"id": number, "error": pack_error(error if _tells(error) else HostError(in_words(error)))}
        self._send(answer)

    def _send(self, answer: dict[str, Any], descriptors: tuple[int, ...] = ()) -> None:
        with self._sending, suppress(OSError):  # nobody is there any more
            self._peer.send(answer, descriptors)

    def _fork(self, number: Any, count: int) -> None:
        from cardcage_fork.process import fork_process

        with self._sending:  # a copy of this one has the lock's state; it makes its own
            try:
                if type(count) is int and count > DESCRIPTORS:
                    raise UsageError(f"{count} copies of a copy: expected at most {DESCRIPTORS} at once")
                made = fork_process(self._machine, count)
            except Exception as error:  # whatever it was, it is told, and this copy goes on
                answer: dict[str, Any] = {"id": number, "error": pack_error(error)}
                made = []
            else:
                answer = {"id": number, "return": [[one.pid, one.name] for one in made]}
            with suppress(OSError):
                self._peer.send(answer, tuple(one.end.fileno() for one in made))
        for one in made:
            self._children[one.pid] = os.pidfd_open(one.pid)
            one.end.close()
        os.eventfd_write(self._wake, 1)


def _plain(value: Any) -> Any:
    return str(value) if type(value).__name__ == "State" else value


def _tells(error: Exception) -> bool:
    return type(error).__name__ in ("TimeoutExpired",)
