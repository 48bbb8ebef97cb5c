"""Copies of a machine, as the process that made them has them."""

from __future__ import annotations

import os
import socket
import threading
import warnings
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE, CalledProcessError, CompletedProcess
from typing import TYPE_CHECKING, Any

from cardcage.errors import HostError, StateError
from cardcage.machine import State
from cardcage.waiting import Condition
from cardcage_jail import is_inside

from cardcage_fork.process import Made, await_readable, forget_link, fork_process, keep_link, kill_process
from cardcage_fork.wire import close_all, pack_value, raise_error, unpack_value

if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Mapping, Sequence
    from typing import Self

    from cardcage.machine import Machine
    from cardcage.outcome import Outcome

__all__ = ["Copy", "fork"]


def fork(machine: Machine, n: int = 1) -> list[Copy]:
    """Make *n* running copies of *machine*, 1 to 1000, each a process of its own.

    Memory and translated code are shared until one writes. A copy of a machine that is paused is paused. Each has a
    name, a MAC address and an entry on the roster of its own; a disk that the guest can write is its own from here on,
    and ends with it; its console is a :class:`Copy`'s, not the terminal. The agent in a guest gives it new randomness
    first of all; without one, a line in the log says that copies share their random numbers for a while.

    Raises StateError, in one line and before anything stops, where something of the machine cannot be in two processes;
    HostError when the host has no room; Denied.
    """
    return [Copy(one) for one in fork_process(machine, n)]


class _Verbs:
    """The verbs that cards give a machine, as far as a link carries them."""

    _call: Callable[..., Any]

    def run(
        self,
        args: str | Sequence[str | os.PathLike[str]],
        *,
        input: bytes | str | None = None,
        stdout: int | None = PIPE,
        stderr: int | None = PIPE,
        check: bool = False,
        timeout: float | None = None,
        **keys: Any,
    ) -> CompletedProcess[Any]:
        """See :meth:`cardcage_agent.Machine.run`, whose arguments it takes."""
        given = {"input": input, "stdout": stdout, "stderr": stderr, "timeout": timeout, **keys}
        done: CompletedProcess[Any] = self._call("run", args, **given)
        if check and done.returncode:
            raise CalledProcessError(done.returncode, args, done.stdout, done.stderr)
        return done

    def put(self, source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
        """Copy a file of this host into the guest."""
        self._call("put", os.path.abspath(source), target)

    def get(self, source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
        """Copy a file of the guest to this host."""
        self._call("get", source, os.path.abspath(target))

    def checkpoint(self) -> None:
        """See :func:`cardcage_fork.checkpoint`."""
        self._call("checkpoint")

    def revert(self) -> int:
        """See :func:`cardcage_fork.revert`."""
        return int(self._call("revert"))


class Copy(_Verbs):
    """A running copy of a machine, in a process of its own: what :class:`cardcage.Machine` has, asked for over there.

    Methods raise what they raise there, as far as :mod:`cardcage.errors` has it, and HostError when its process is
    gone. Thread-safe. One that is dropped without :meth:`close` or :meth:`detach` is ended with a ResourceWarning.

    Attributes: ``name`` of the copy, ``pid`` of its process, ``console``, ``agent``.
    """

    def __init__(self, made: Made) -> None:
        self.name, self.pid, self._owner = made.name, made.pid, os.getpid()
        self._end, self._peer = made.end, made.peer
        self._changed = Condition()
        self._answers: dict[int, tuple[dict[str, Any], list[int]]] = {}
        self._waiting: set[int] = set()
        self._last, self._reading, self._gone, self._pidfd = 0, False, False, made.pidfd
        self.console = CopyConsole(self)
        self.agent = CopyAgent(self)

    # the link

    def _call(self, verb: str, *values: Any, **keys: Any) -> Any:
        answer, descriptors = self._ask(verb, values, keys)
        close_all(descriptors)  # nobody asked for any
        return unpack_value(answer.get("return"))

    def _ask(self, verb: str, values: Sequence[Any], keys: Mapping[str, Any]) -> tuple[dict[str, Any], list[int]]:
        message = {"do": verb, "with": [pack_value(one) for one in values], "keys": pack_value(dict(keys))}
        with self._changed:
            if self._end.fileno() < 0:
                raise StateError(f"{self.name}: the copy was closed, or let go")
            self._last += 1
            number = self._last
            try:
                self._peer.send({"id": number, **message})
            except OSError as error:
                raise self._lost() from error
            self._waiting.add(number)
        try:
            answer, descriptors = self._await(number)
        finally:
            self._waiting.discard(number)
        if "error" in answer:
            close_all(descriptors)
            raise_error(answer["error"])
        return answer, descriptors

    def _await(self, number: int) -> tuple[dict[str, Any], list[int]]:
        """The answer to request *number*: of those who wait, one reads for all."""
        while True:
            with self._changed:
                while self._reading and number not in self._answers and not self._gone:
                    self._changed.wait()
                if number in self._answers:
                    return self._answers.pop(number)
                if self._gone:
                    raise self._lost()
                self._reading = True
            found = None
            try:
                found = self._peer.receive()
            except (EOFError, OSError):
                pass
            finally:
                with self._changed:
                    self._reading = False
                    if found is None:
                        self._gone = True
                    elif type(of := found[0].get("id")) is int and of in self._waiting:
                        self._answers[of] = found
                    else:  # of one who waits no longer, or of nobody
                        close_all(found[1])
                    self._changed.notify_all()

    def _lost(self) -> HostError:
        return HostError(f"{self.name}: the process of the copy (pid {self.pid}) has ended")

    # as a machine

    @property
    def born(self) -> float:
        """When it went on by itself: seconds of this host's CLOCK_MONOTONIC (:func:`time.monotonic`)."""
        return float(self._call("born"))

    @property
    def state(self) -> State:
        """Running, paused or stopped."""
        return State(self._call("state"))

    @property
    def outcome(self) -> Outcome | None:
        """How it ended; None before that."""
        found: Outcome | None = self._call("outcome")
        return found

    def wait(self, timeout: float | None = None) -> Outcome:
        """See :meth:`cardcage.Machine.wait`."""
        found: Outcome = self._call("wait", timeout)
        return found

    def pause(self) -> None:
        """See :meth:`cardcage.Machine.pause`."""
        self._call("pause")

    def resume(self) -> None:
        """See :meth:`cardcage.Machine.resume`."""
        self._call("resume")

    def reset(self) -> None:
        """See :meth:`cardcage.Machine.reset`."""
        self._call("reset")

    def shutdown(self) -> None:
        """See :meth:`cardcage.Machine.shutdown`."""
        self._call("shutdown")

    def stop(self, why: str = "") -> None:
        """See :meth:`cardcage.Machine.stop`."""
        self._call("stop", why)

    def inject_nmi(self, cpu: int = 0) -> None:
        """See :meth:`cardcage.Machine.inject_nmi`."""
        self._call("inject_nmi", cpu)

    def fork(self, n: int = 1) -> list[Copy]:
        """Copies of this copy, as :func:`fork` makes them of a machine, at most 250 at once."""
        answer, descriptors = self._ask("fork", [n], {})
        found: list[Copy] = []
        try:
            rows = unpack_value(answer.get("return"))
            if not isinstance(rows, list) or len(rows) != len(descriptors):
                raise HostError(f"{self.name}: {n} copies were asked for, and {len(descriptors)} came")
            for row in rows:
                found.append(_child(self, row, descriptors[0]))
                del descriptors[0]
        except BaseException:
            close_all(descriptors)  # they end by that
            for one in found:
                one.kill()
            raise
        return found

    # its end

    def detach(self) -> None:
        """Let it go: it goes on by itself until its guest ends, or somebody stops it by its name."""
        if self._end.fileno() >= 0:
            self._call("detach")
            self._hang_up()
            threading.Thread(target=self._reap, name=f"{self.name}-reap", daemon=True).start()

    def close(self) -> None:
        """Stop it and give everything back; its process has ended then. Idempotent."""
        if self._end.fileno() < 0:
            return
        with suppress(HostError, StateError):
            self._call("close")
        self._hang_up()
        self._reap()

    def kill(self) -> None:
        """End its process at once, whatever it does."""
        if self._end.fileno() >= 0:
            self._hang_up()
            with suppress(ProcessLookupError):
                kill_process(self.pid, self._pidfd)
            self._reap()

    def _reap(self) -> None:
        """Wait for the end of its process; that of a copy's copy is not this process's child, and reaped over there."""
        if self._pidfd >= 0:
            await_readable(self._pidfd, None)
            os.close(self._pidfd)
        else:
            with suppress(ChildProcessError):
                os.waitpid(self.pid, 0)

    def _hang_up(self) -> None:
        with self._changed:
            self._gone = True
            if self._end.fileno() >= 0:
                forget_link(self._end)
                self._end.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        end: socket.socket | None = getattr(self, "_end", None)
        if end is not None and end.fileno() >= 0 and os.getpid() == self._owner:
            warnings.warn(
                f"unclosed {self!r}: use it in a with block, close() or detach() it", ResourceWarning, 2, self
            )
            self.kill()

    def __repr__(self) -> str:
        return f"<Copy {self.name!r} pid {self.pid}>"


def _child(copy: Copy, row: Any, fd: int) -> Copy:
    """The copy that *row* tells of, whose link is *fd*. Raises HostError for a process that is not *copy*'s child."""
    match row:
        case [int(pid), str(name)] if pid > 1:
            with suppress(OSError):
                pidfd = os.pidfd_open(pid)
                try:
                    # In a jail /proc tells nothing of others; nor can anything be done there to a stranger's process.
                    if not is_inside() and _parent(pid) != copy.pid:
                        raise OSError
                    end = socket.socket(fileno=fd)
                except BaseException:
                    os.close(pidfd)
                    raise
                keep_link(end, pidfd)
                return Copy(Made(pid, end, name, pidfd))
    raise HostError(f"{copy.name}: a copy of it has ended, or is none")


def _parent(pid: int) -> int:
    """The parent of a process (proc_pid_stat(5)). Raises OSError."""
    return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])


class CopyConsole:
    """The console of a copy: what :attr:`cardcage.Machine.console` has for the host."""

    def __init__(self, copy: Copy) -> None:
        self._copy = copy

    @property
    def output(self) -> str:
        """The guest's output as far as it is kept, undecodable bytes replaced; what came before the fork is in it."""
        return str(self._copy._call("console.output"))

    def send(self, text: str | bytes) -> None:
        """Type *text* (no newline is added)."""
        self._copy._call("console.send", text)

    def expect(self, what: str | re.Pattern[str], timeout: float | None = 30.0) -> str:
        """Wait until *what* comes, and return all text up to it. Raises ConsoleTimeout, or GuestError at its end."""
        return str(self._copy._call("console.expect", what, timeout))


class CopyAgent:
    """The agent in a copy: what ``vm.agent`` has."""

    def __init__(self, copy: Copy) -> None:
        self._copy = copy

    def wait(self, timeout: float = 60.0) -> None:
        """Wait until it answers. Raises HostError (NoAgent there)."""
        self._copy._call("agent.wait", timeout)

    def ping(self, timeout: float | None = 30.0) -> float:
        """Seconds that an answer takes."""
        return float(self._copy._call("agent.ping", timeout))

    def set_time(self, seconds: float | None = None) -> None:
        """Set the guest's clock: seconds since 1970; by default this host's time."""
        self._copy._call("agent.set_time", seconds)

    def reseed(self, data: bytes | None = None) -> None:
        """Give the guest's kernel new randomness, by default of the host's."""
        self._copy._call("agent.reseed", data)
