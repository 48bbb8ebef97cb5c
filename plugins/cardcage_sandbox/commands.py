"""Commands and terminals of a sandbox."""

from __future__ import annotations

import codecs
import json
from subprocess import TimeoutExpired
from typing import TYPE_CHECKING, Any, Literal, overload

from attrs import frozen
from cardcage.errors import GuestError, UsageError
from cardcage.units import Duration

from cardcage_sandbox.talk import Talk, act

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from cardcage_fleet.roster import RosterEntry

    Heard = Callable[[str], object]

__all__ = ["Command", "CommandFailed", "CommandResult", "Commands", "Pty", "RunningCommand", "seconds"]

LIMIT = 64 << 20
"""Bytes of each output that are kept for the caller."""
PIECE = 1 << 16


def seconds(timeout: float | str) -> float:
    """A time as the caller has it: seconds, or text with a unit. Raises UsageError."""
    try:
        return float(Duration(timeout))
    except (TypeError, ValueError) as error:
        raise UsageError(f"timeout: {error}") from error


@frozen
class CommandResult:
    """How a command ended: ``exit_code`` is 0 to 255, or the number of the signal that ended it, negative."""

    exit_code: int
    stdout: str
    stderr: str


class CommandFailed(GuestError):
    """A command with ``check=True`` ended with another status than 0. Attributes: ``result``."""

    def __init__(self, command: str, result: CommandResult) -> None:
        self.command, self.result = command, result
        last = result.stderr.strip().rpartition("\n")[2][:200]
        super().__init__(f"{command[:60]!r} ended with {result.exit_code}{': ' if last else ''}{last}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.command, self.result)


@frozen
class RunningCommand:
    """A command that runs: its number, words, directory, user, a name that its maker gave it, whether it has a
    terminal, and its variables."""

    pid: int
    command: list[str]
    env: dict[str, str]
    cwd: str
    user: str
    tag: str
    pty: bool


class Command:
    """A command that was started, or that was attached to: its output comes from then on.

    Attributes: ``pid``, its number in the guest.
    """

    def __init__(self, commands: _Acts, words: Any, talk: Talk, limit: int = LIMIT) -> None:
        self._commands, self._words, self._talk, self._limit = commands, words, talk, limit
        try:
            self.pid = int(talk.began()["pid"])
        except BaseException:
            talk.close()
            raise
        self._output: tuple[list[str], list[str]] = ([], [])
        self._kept = [0, 0]
        self._result: CommandResult | None = None
        self._pieces = self._read()

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """Pieces of output: 1 or 2, for standard output and errors, and the text."""
        return self._pieces

    def _read(self) -> Iterator[tuple[int, str]]:
        decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(2)]
        for frame in self._talk.frames():
            at = frame.stream - 1
            self._kept[at] += len(frame.data)
            if self._kept[at] > self._limit:
                self.kill()
                raise UsageError(f"{self._words!r:.60} wrote more than {self._limit} bytes, and was killed")
            if text := decoders[at].decode(frame.data):
                self._output[at].append(text)
                yield frame.stream, text
        for at, decoder in enumerate(decoders):
            if text := decoder.decode(b"", True):
                self._output[at].append(text)
                yield at + 1, text
        self._end(self._talk.table)

    def _end(self, told: dict[str, Any]) -> None:
        self._talk.close()
        out, err = ("".join(one) for one in self._output)
        if "limit" in told:
            raise TimeoutExpired(self._words, told["limit"], out.encode(), err.encode())
        if not isinstance(told.get("status"), int):
            raise GuestError(f"{self._words!r:.60} was lost: {told.get('lost', 'its sandbox ended')}")
        self._result = CommandResult(told["status"], out, err)

    def wait(
        self, *, on_stdout: Heard | None = None, on_stderr: Heard | None = None, check: bool = False
    ) -> CommandResult:
        """Read its output to the end, calling back with each piece; how it ended.

        Raises TimeoutExpired when its time was over, and CommandFailed with *check*.
        """
        for stream, text in self._pieces:
            heard = on_stdout if stream == 1 else on_stderr
            if heard is not None:
                heard(text)
        if self._result is None:
            raise UsageError(f"command {self.pid}: it was let go, or has failed")
        if check and self._result.exit_code:
            raise CommandFailed(str(self._words), self._result)
        return self._result

    def send_stdin(self, data: str | bytes, *, close: bool = False) -> None:
        """Send it input, with *close* the last."""
        self._commands.send_stdin(self.pid, data, close=close)

    def close_stdin(self) -> None:
        """Its input has ended."""
        self._commands.send_stdin(self.pid, b"", close=True)

    def send_signal(self, signal: int) -> bool:
        """Send its process group a signal, 1 to 64; False when it has ended."""
        return self._commands.send_signal(self.pid, signal)

    def resize(self, rows: int, columns: int) -> None:
        """Give its terminal another size."""
        self._commands.resize(self.pid, rows, columns)

    def kill(self) -> bool:
        """Kill it; False when it has ended."""
        return self._commands.kill(self.pid)

    def disconnect(self) -> None:
        """Hear no more of it: it goes on."""
        self._talk.hang_up()
        self._talk.close()

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        self.disconnect()


class _Acts:
    """Acts that commands and terminals have in common."""

    def __init__(self, entry: RosterEntry, name: str, user: str, envs: Mapping[str, str]) -> None:
        self._entry, self._name, self._user, self._envs = entry, name, user, dict(envs)

    def starting(self, words: list[str], envs: Mapping[str, str] | None, user: str | None, **keys: Any) -> Talk:
        """A command that starts: the act of :meth:`run` as it is."""
        return Talk(
            self._entry,
            self._name,
            "start",
            command=words,
            env={**self._envs, **(envs or {})},
            user=user or self._user,
            **keys,
        )

    def attaching(self, pid: int) -> Talk:
        """The act of :meth:`connect` as it is."""
        return Talk(self._entry, self._name, "attach", pid=pid)

    def connect(self, pid: int) -> Command:
        """A command that runs, by its number: its output from now on. Raises ProcessLookupError."""
        return Command(self, f"command {pid}", self.attaching(pid))

    def list(self) -> list[RunningCommand]:
        """The commands that were started, and run."""
        lines, _ = act(self._entry, self._name, "processes")
        return [RunningCommand(**json.loads(line)) for line in lines.splitlines()]

    def send_stdin(self, pid: int, data: str | bytes, *, close: bool = False) -> None:
        """Send a command input."""
        whole = data.encode() if isinstance(data, str) else data
        pieces = (whole[at : at + PIECE] for at in range(0, len(whole), PIECE))
        act(self._entry, self._name, "input", pieces, pid=pid, close=close)

    def send_signal(self, pid: int, signal: int) -> bool:
        """Send a command's process group a signal, 1 to 64; False when it has ended."""
        try:
            act(self._entry, self._name, "signal", pid=pid, signal=signal)
        except ProcessLookupError:
            return False
        return True

    def kill(self, pid: int) -> bool:
        """Kill a command; False when it has ended."""
        return self.send_signal(pid, 9)

    def resize(self, pid: int, rows: int, columns: int) -> None:
        """Give a command's terminal another size."""
        act(self._entry, self._name, "resize", pid=pid, pty=[rows, columns])


class Commands(_Acts):
    """Runs commands in a sandbox."""

    @overload
    def run(
        self,
        command: str | Sequence[str],
        *,
        background: Literal[False] = False,
        on_stdout: Heard | None = None,
        on_stderr: Heard | None = None,
        envs: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        stdin: bool = False,
        tag: str | None = None,
        timeout: float | str | None = 60,
        check: bool = False,
        limit: int = LIMIT,
    ) -> CommandResult: ...

    @overload
    def run(
        self,
        command: str | Sequence[str],
        *,
        background: Literal[True],
        envs: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        stdin: bool = False,
        tag: str | None = None,
        timeout: float | str | None = 60,
        limit: int = LIMIT,
    ) -> Command: ...

    def run(
        self,
        command: str | Sequence[str],
        *,
        background: bool = False,
        on_stdout: Heard | None = None,
        on_stderr: Heard | None = None,
        envs: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        stdin: bool = False,
        tag: str | None = None,
        timeout: float | str | None = 60,
        check: bool = False,
        limit: int = LIMIT,
    ) -> CommandResult | Command:
        """Run a command, and wait for its end; with *background*, for its beginning.

        Args:
            command: text for ``/bin/sh -c``, or a list of a program and its arguments.
            on_stdout, on_stderr: called with each piece of output, as it comes.
            envs: variables, besides the sandbox's and a login's. cwd, user: by default the user's home, the template's.
            stdin: it has an input, for ``send_stdin``. tag: a name of your own for it, which :meth:`list` tells.
            timeout: seconds, or text such as ``"5m"``, after which it is killed; None for none.
            check: raise CommandFailed for another status than 0.
            limit: bytes of each output; a command with more is killed.

        Raises OSErrors as the guest's kernel has them about the program, TimeoutExpired, UsageError.
        """
        words = ["/bin/sh", "-c", command] if isinstance(command, str) else list(command)
        ends = None if timeout is None else seconds(timeout)
        talk = self.starting(words, envs, user, cwd=cwd, input=stdin, tag=tag, limit=ends, keep=background)
        started = Command(self, command, talk, limit)
        if background:
            return started
        with started:
            return started.wait(on_stdout=on_stdout, on_stderr=on_stderr, check=check)


class Pty(_Acts):
    """Terminals in a sandbox."""

    def create(
        self,
        rows: int = 24,
        columns: int = 80,
        *,
        command: Sequence[str] = ("/bin/sh", "-i"),
        envs: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        timeout: float | str | None = None,
        limit: int = LIMIT,
    ) -> Command:
        """Start a program with a terminal, which goes on when nobody listens: all its output is standard output."""
        given = {"TERM": "xterm-256color", **(envs or {})}
        ends = None if timeout is None else seconds(timeout)
        keys = {"cwd": cwd, "pty": [rows, columns], "limit": ends, "keep": True}
        return Command(self, list(command), self.starting(list(command), given, user, **keys), limit)
