"""The fork itself: the parent stands parked meanwhile, and the child goes on as a machine of its own."""

from __future__ import annotations

import gc
import mmap
import os
import select
import signal
import socket
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from cardcage.errors import CardcageError, HostError, UsageError, in_words
from cardcage.machine import State, rename
from cardcage.security import OPERATOR, Act
from cardcage_jail import is_inside

from cardcage_fork.forking import fork_between_imports
from cardcage_fork.plan import MOST, blocks_of, holders, refuse
from cardcage_fork.serve import Server, leave_server
from cardcage_fork.wire import Peer, pack_error, raise_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.machine import Machine

__all__ = ["Made", "forget_link", "forget_links", "fork_process", "keep_link", "kill_process"]

PATIENCE = 60
"""Seconds that a new process may take to be a machine of its own: it copies disks."""
SETTLED, NAME = "settled", "name"
"""Words of a copy: all that it has of its parent is its own; it can be found by that name."""
LATER = "fork:later"
"""A list of :meth:`cardcage.host.Host.share`: calls that cards add to it in ``cardcage_forked`` are made once the copy
runs, and before anybody hears of it. The guest does not wait for them."""
_links: dict[socket.socket, int] = {}
"""The ends of links to copies that this process holds, and descriptors of their processes: a new copy closes them."""


class Made:
    """A copy that was made: its process, name, our end of the link to it. *pidfd*: of one that is no child, else -1."""

    def __init__(self, pid: int, end: socket.socket, name: str = "", pidfd: int = -1) -> None:
        self.pid, self.end, self.peer, self.name, self.pidfd = pid, end, Peer(end), name, pidfd


def keep_link(end: socket.socket, pidfd: int = -1) -> None:
    """*end* is of a link to a copy."""
    _links[end] = pidfd


def forget_link(end: socket.socket) -> None:
    """*end* is about to be closed."""
    _links.pop(end, None)


def forget_links() -> None:
    """This is a new process: the links are its parent's."""
    for end, pidfd in _links.items():
        end.close()
        if pidfd >= 0:
            os.close(pidfd)
    _links.clear()


def kill_process(pid: int, pidfd: int = -1) -> None:
    """End a copy's process: by *pidfd*, where there is one; in a jail by its number, since the broker lets those of the
    machine be killed, and no other. Raises ProcessLookupError."""
    if pidfd >= 0 and not is_inside():
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    else:
        os.kill(pid, signal.SIGKILL)


def await_readable(fd: int, seconds: float | None) -> bool:
    """Wait until *fd*, of any number, has something to read; False when the time is over."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if seconds is None else seconds * 1000))


def fork_process(machine: Machine, count: int) -> list[Made]:
    """Make *count* running copies of *machine*, 1 to 1000. Raises StateError, HostError or Denied; then there is none.

    It returns in this process only.
    """
    if not 0 < count <= MOST:
        raise UsageError(f"{count} copies: expected 1 to {MOST}")
    facts = {"machine": machine.name, "copies": count}
    machine.mediator.check(Act(OPERATOR, machine.label, "machine", ("fork",), facts))
    refuse(machine)
    there = holders(machine)  # found here: each page that a new process writes, if only by looking, is copied
    made: list[Made] = []
    born: Birth | None = None
    running = machine.state is State.RUNNING
    waits = any(not one.info.readonly for one in _disks(machine))
    try:
        with machine.parked():
            try:
                _lend(machine)
                for _ in range(count):
                    if isinstance(one := _fork(machine, there), Birth):
                        born = one
                        break
                    made.append(one)
            finally:
                if born is None:
                    _keep(machine, child=False)
            if born is not None:
                born.settle(tell=waits)
            elif waits:  # they copy what this machine would write
                _await(made, SETTLED)
        if born is not None:
            if running:
                machine.resume()
            born.live()
    except BaseException as error:
        if born is not None:
            born.die(error)
        _give_up(made)
        raise
    try:
        _await(made, NAME)
    except BaseException:
        _give_up(made)
        raise
    return made


def _disks(machine: Machine) -> list[Any]:
    return [
        backend for one in machine.devices.values() for backend in one.slot.host.opened if hasattr(backend, "writev")
    ]


def _lend(machine: Machine) -> None:
    vm: Any = machine.vm  # a ForkableVm: refuse() has seen to it
    vm.before_fork()
    for block in blocks_of(machine):
        block.map.madvise(mmap.MADV_DOFORK)


def _keep(machine: Machine, *, child: bool) -> None:
    vm: Any = machine.vm
    vm.after_fork(child=child)
    for block in blocks_of(machine):
        block.map.madvise(mmap.MADV_DONTFORK)


def _fork(machine: Machine, there: list[Any]) -> Made | Birth:
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError as error:
        raise HostError(f"{machine.name} cannot be forked: {error.strerror}") from error
    try:
        with warnings.catch_warnings():
            # Python 3.12 and later warn of threads: the machine's have ended, and others hold no lock of it.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = fork_between_imports()
    except BaseException as error:
        ours.close()
        theirs.close()
        if isinstance(error, OSError):
            raise HostError(f"{machine.name} cannot be forked: {error.strerror}") from error
        raise
    if pid == 0:
        ours.close()
        return Birth(machine, there, theirs)
    theirs.close()
    keep_link(ours)
    return Made(pid, ours)


def _await(made: list[Made], word: str) -> None:
    """Wait until each copy has said the *word*. Raises what went wrong in one."""
    for one in made:
        if not await_readable(one.end.fileno(), PATIENCE):
            os.kill(one.pid, signal.SIGKILL)
            raise HostError(f"a copy was not one within {PATIENCE} s (pid {one.pid})")
        try:
            message, _ = one.peer.receive()
        except EOFError:
            raise HostError(f"the process of a copy ended before it was one (pid {one.pid})") from None
        if "error" in message:
            raise_error(message["error"])
        if word not in message:
            raise HostError(f"a copy said nothing of its {word} (pid {one.pid})")
        one.name = str(message.get(NAME, ""))


def _give_up(made: list[Made]) -> None:
    for one in made:
        forget_link(one.end)
        one.end.close()  # its process ends by that
        with suppress(OSError):
            os.waitpid(one.pid, 0)


class Birth:
    """The new process, whose only thread this is. It never returns to who called the fork."""

    def __init__(self, machine: Machine, there: list[Any], end: socket.socket) -> None:
        self._machine, self._holders, self._end, self._peer = machine, there, end, Peer(end)
        self._later: list[Callable[[], object]] = machine.host.share(LATER, list)
        self._told = False

    def settle(self, *, tell: bool) -> None:
        """Make anew what is the parent's, with the machine parked; *tell* the parent, if it waits for that."""
        machine = self._machine
        self._later.clear()  # of a fork that failed
        with suppress(OSError):
            os.setsid()  # a terminal's signals are for the parent
        gc.freeze()  # whatever else the parent has is not ours to collect
        forget_links()
        leave_server()
        _keep(machine, child=True)
        name = machine.name
        machine.host.phases.call("forked", machine)
        if machine.name == name:  # there is no roster to find another by
            rename(machine, f"{name}-{os.getpid()}")
        for one in self._holders:
            one.forked()
        machine.console.forward = None
        if tell:
            self._peer.send({SETTLED: True})

    def live(self) -> None:
        """Do what could wait; serve the parent until it, or the guest, has had enough; then end the process."""
        server = Server(self._machine, self._end)
        while self._later:
            self._later.pop(0)()
        self._peer.send({NAME: self._machine.name})
        self._told = True
        server.run()
        self._end_process(0)

    def die(self, error: BaseException) -> None:
        """End the process, with a word to the parent about why."""
        if not self._told:
            told = error if isinstance(error, (CardcageError, OSError)) else HostError(f"a copy: {in_words(error)}")
            with suppress(OSError):
                self._peer.send({"error": pack_error(told)})
        else:
            self._machine.log.error("a copy ended", error=in_words(error))
        self._end_process(1)

    def _end_process(self, status: int) -> None:
        with suppress(BaseException):  # the process ends, whatever is in the way
            self._machine.dismantle()
        os._exit(status)
