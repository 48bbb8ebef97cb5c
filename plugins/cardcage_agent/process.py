"""Processes in the guest, with the names of :mod:`subprocess`."""

from __future__ import annotations

import io
import os
import signal
import struct
import time
import warnings
from contextlib import suppress
from subprocess import DEVNULL, PIPE, STDOUT, TimeoutExpired
from typing import IO, TYPE_CHECKING, Any

from cardcage.errors import UsageError

from cardcage_agent.errors import AgentError
from cardcage_agent.frames import WINDOW, Kind, Verb

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from typing_extensions import Buffer

    from cardcage_agent.link import Call, Link

    Command = str | Sequence[str | bytes | os.PathLike[str]]

__all__ = ["LIMIT", "PATIENCE", "Popen", "guest_error"]

LIMIT = 256 << 20
"""Bytes of one stream that are collected unless the caller says otherwise."""
PATIENCE = 60.0
"""Seconds that an agent is waited for unless the caller says otherwise: a guest boots meanwhile."""
ENVIRONMENT, INPUT, OUTPUT, ERRORS, JOINED, PTY = 1, 2, 4, 8, 16, 32
REQUEST = struct.Struct("<IIQ")
PROGRAM, DIRECTORY, USER = range(3)
SIGNALED = 256


def guest_error(error: int, machine: str, name: str = "") -> OSError:
    """The OSError of its number, about a name in the guest: ``FileNotFoundError: ... 'debian:/etc/x'``."""
    return OSError(error, os.strerror(error), f"{machine}:{name}" if name else machine)


def words(args: Command) -> list[bytes]:
    """The arguments; text is a command for the guest's shell. Raises UsageError for none, or a NUL in one."""
    found = [b"/bin/sh", b"-c", os.fsencode(args)] if isinstance(args, str) else [os.fsencode(one) for one in args]
    if not found or any(b"\0" in one for one in found):
        raise UsageError("a command: expected one argument at least, and no NUL in any")
    return found


def strings(*texts: str | bytes) -> bytes:
    """Each as bytes with its NUL. Raises UsageError for one that has a NUL."""
    found = [os.fsencode(one) for one in texts]
    if any(b"\0" in one for one in found):
        raise UsageError("a name for the guest: expected no NUL in it")
    return b"".join(one + b"\0" for one in found)


class Output(io.RawIOBase):
    """A stream out of the guest, to be read until it ends."""

    def __init__(self, link: Link, call: Call, stream: int) -> None:
        self._link, self._call, self._stream = link, call, stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer, /) -> int:
        view = memoryview(buffer).cast("B")
        inbox = self._call.inboxes[self._stream - 1]
        self._link.wait(self._call, lambda: bool(inbox.kept) or inbox.ended, None)
        data = self._link.receive(self._call, self._stream, len(view))
        view[: len(data)] = data
        return len(data)


class Input(io.RawIOBase):
    """A stream into the guest. Raises BrokenPipeError once nobody reads it there."""

    def __init__(self, link: Link, call: Call) -> None:
        self._link, self._call = link, call

    def writable(self) -> bool:
        return True

    def write(self, data: Buffer, /) -> int:
        view, call = memoryview(data).cast("B"), self._call
        self._link.wait(call, lambda: call.deaf or self._link.sendable(call) > 0, None)
        if view and (call.deaf or call.over):
            raise BrokenPipeError("nobody in the guest reads this any more")
        return self._link.send(call, view)

    def close(self) -> None:
        if not self.closed:
            self._link.end(self._call)
        super().close()


class Popen:
    """A process in the guest, as :class:`subprocess.Popen` has it.

    It leads a session of its own in the guest, and a signal reaches all of its process group. One that is dropped while
    it runs is killed, with a ResourceWarning.

    Args:
        link: of the machine.
        args: a list of the program and its arguments, or text for the guest's ``/bin/sh -c``.
        stdin: ``PIPE`` or ``DEVNULL``. stdout: ``PIPE`` or ``DEVNULL``. stderr: these, or ``STDOUT``.
        text, encoding, errors: streams of text; by default of bytes. UTF-8 unless *encoding* says otherwise.
        env: the whole environment; by default PATH, HOME, USER and LOGNAME. cwd: by default the user's home.
        user: name or number; by default root.
        pty: rows and columns of a terminal that is its standard input, output and error output; ``stdin`` and
            ``stdout`` here are its other side, whatever else was asked for.
        timeout: seconds in which it has to start; None for ever.

    Raises FileNotFoundError, PermissionError and other OSErrors as the guest's kernel has them, about the program or
    *cwd*; AgentError for an unknown *user*; TimeoutExpired.

    Attributes:
        args, stdin, stdout, stderr, returncode: as subprocess has them. pid: in the guest.
    """

    def __init__(
        self,
        link: Link,
        args: Command,
        *,
        stdin: int | None = None,
        stdout: int | None = PIPE,
        stderr: int | None = PIPE,
        text: bool | None = None,
        encoding: str | None = None,
        errors: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        user: str | int | None = None,
        pty: tuple[int, int] | None = None,
        timeout: float | None = None,
    ) -> None:
        __tracebackhide__ = True
        self.args, self._link = args, link
        self.returncode: int | None = None
        self._encoding = encoding or ("utf-8" if text or errors else None)
        self._errors = errors or "strict"
        self._unsent: memoryview | None = None
        self._got = (bytearray(), bytearray())
        request, streams = _request(args, stdin, stdout, stderr, env, cwd, user, pty)
        self._call = call = link.call(Verb.RUN, request, streams)
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            if not link.wait(call, lambda: call.pid is not None, deadline) and timeout is not None:
                raise TimeoutExpired(args, timeout)
        except BaseException:
            link.cancel(call)
            raise
        if call.pid is None:
            raise self._refusal(cwd, user)
        self.pid = call.pid
        takes, gives = (
            pty is not None or stdin == PIPE,
            [self._reader(stream) if stream in streams else None for stream in (1, 2)],
        )
        self.stdin: IO[Any] | None = self._writer() if takes else None
        self.stdout, self.stderr = gives

    def _refusal(self, cwd: object, user: object) -> Exception:
        error, more = self._call.result or (0, b"")
        machine, subject = self._link.machine, more[0] if more else PROGRAM
        if subject == USER:
            return AgentError(f'{machine}: the guest has no user "{user}"')
        names = {PROGRAM: os.fsdecode(words(self.args)[0]), DIRECTORY: str(cwd)}
        return guest_error(error, machine, names.get(subject, "")) if error else AgentError(f"{machine}: no process")

    def _writer(self) -> IO[Any]:
        raw = io.BufferedWriter(Input(self._link, self._call), 32768)
        return raw if self._encoding is None else io.TextIOWrapper(raw, self._encoding, self._errors)

    def _reader(self, stream: int) -> IO[Any]:
        raw = io.BufferedReader(Output(self._link, self._call, stream), 32768)
        return raw if self._encoding is None else io.TextIOWrapper(raw, self._encoding, self._errors)

    def poll(self) -> int | None:
        """The return code, None while it runs: 0 to 255, or the number of the signal that ended it, negative."""
        status = self._call.status
        if status is not None:
            self.returncode = status if status < SIGNALED else SIGNALED - status
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; the return code. Raises TimeoutExpired after *timeout* seconds, or what ended the machine.

        One that writes more than 256 KiB which nobody reads never ends: use :meth:`communicate`.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self._link.wait(self._call, lambda: self._call.status is not None, deadline) and timeout is not None:
            raise TimeoutExpired(self.args, timeout)
        code = self.poll()
        if code is None:
            raise AgentError(f"{self._link.machine}: the agent gave the process up")
        return code

    def communicate(
        self, input: bytes | str | None = None, timeout: float | None = None, *, limit: int = LIMIT
    ) -> tuple[Any, Any]:
        """Send *input*, read both streams to their ends and wait: ``(stdout, stderr)``, None for one that is no pipe.

        After TimeoutExpired, which holds what came, it can be called again, without *input*.

        Args:
            limit: bytes of one stream; a process with more is killed, and AgentError raised.
        """
        __tracebackhide__ = True
        deadline = None if timeout is None else time.monotonic() + timeout
        if self._unsent is None:
            data = input.encode(self._encoding or "utf-8", self._errors) if isinstance(input, str) else input or b""
            if data and self.stdin is None:
                raise UsageError("input for a process whose stdin is no pipe")
            self._unsent = memoryview(data)
            self._send()
        while not self._finished():
            if self._send() + self._collect(limit):
                continue
            if not self._link.wait(self._call, self._moves, deadline) and timeout is not None:
                raise TimeoutExpired(self.args, timeout, bytes(self._got[0]), bytes(self._got[1]))
        self.poll()
        out, err = (
            None if stream is None else self._decoded(got)
            for stream, got in zip((self.stdout, self.stderr), self._got, strict=True)
        )
        return out, err

    def _decoded(self, got: bytearray) -> bytes | str:
        if self._encoding is None:
            return bytes(got)
        return got.decode(self._encoding, self._errors).replace("\r\n", "\n").replace("\r", "\n")

    def _send(self) -> int:
        """Send what goes of the input, and its end after it; bytes that went."""
        unsent = self._unsent
        if unsent is None or self.stdin is None or self.stdin.closed:
            return 0
        sent = self._link.send(self._call, unsent) if unsent else 0
        self._unsent = unsent = unsent[sent:]
        if not unsent or self._call.deaf or self._call.over:
            self._unsent = memoryview(b"")
            self.stdin.close()
        return sent

    def _collect(self, limit: int) -> int:
        moved = 0
        for stream, got in enumerate(self._got, 1):
            data = self._link.receive(self._call, stream, WINDOW)
            got += data
            moved += len(data)
            if len(got) > limit:
                self._link.cancel(self._call)
                raise AgentError(f"{self._link.machine}: {self.args!r} wrote more than {limit} bytes")
        return moved

    def _moves(self) -> bool:
        sendable = bool(self._unsent) and (self._call.deaf or self._link.sendable(self._call) > 0)
        return sendable or any(one.kept for one in self._call.inboxes) or self._finished()

    def _finished(self) -> bool:
        call = self._call
        return call.status is not None and all(one.ended and not one.kept for one in call.inboxes)

    def send_signal(self, sig: int) -> None:
        """Send a signal, 1 to 64, to its process group; nothing once it has ended."""
        if not 0 < sig <= 64:
            raise UsageError(f"signal {sig}: expected 1 to 64")
        if self.poll() is None:
            self._link.tell(self._call, Kind.SIGNAL, int(sig).to_bytes(4, "little"))

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def resize(self, rows: int, columns: int) -> None:
        """Give its terminal another size, 1 to 65535 each: the process gets SIGWINCH."""
        self._link.tell(self._call, Kind.RESIZE, struct.pack("<HH", rows, columns))

    def close(self) -> None:
        """Give it up: what still runs of its session is killed, and nothing more comes of its streams. Idempotent."""
        self._link.cancel(self._call)

    def __enter__(self) -> Popen:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            if self.stdin is not None:
                with suppress(BrokenPipeError):  # what its buffer still had
                    self.stdin.close()
            self.wait()
        self.close()

    def __del__(self) -> None:
        call = getattr(self, "_call", None)
        if call is not None and not call.over:
            if self.poll() is None:
                warnings.warn(
                    f"process {call.pid} of {self._link.machine} was dropped: it is killed", ResourceWarning, 2, self
                )
            self._link.cancel(call)


def _request(
    args: Command,
    stdin: int | None,
    stdout: int | None,
    stderr: int | None,
    env: Mapping[str, str] | None,
    cwd: str | os.PathLike[str] | None,
    user: str | int | None,
    pty: tuple[int, int] | None,
) -> tuple[bytes, tuple[int, ...]]:
    """The request for a process, and the streams that it answers in. Raises UsageError."""
    allowed = ((stdin, (PIPE, DEVNULL, None)), (stdout, (PIPE, DEVNULL, None)), (stderr, (PIPE, DEVNULL, STDOUT, None)))
    for given, known in allowed:
        if given not in known:
            raise UsageError(
                f"a stream of a process in the guest: {given!r}, expected PIPE or DEVNULL, or STDOUT for stderr"
            )
    flags, size, streams = (ENVIRONMENT if env is not None else 0), 0, [1]
    if pty is not None:
        if not all(0 < one < 65536 for one in pty):
            raise UsageError(f"a terminal of {pty}: expected rows and columns from 1 to 65535")
        flags, size = flags | PTY, pty[0] << 16 | pty[1]
    else:
        streams = [stream for stream, given in ((1, stdout), (2, stderr)) if given == PIPE]
        flags |= (INPUT if stdin == PIPE else 0) | (OUTPUT if 1 in streams else 0)
        flags |= ERRORS if 2 in streams else JOINED if stderr == STDOUT else 0
    variables = [f"{name}={value}" for name, value in (env or {}).items()]
    arguments = words(args)
    head = REQUEST.pack(flags, size, len(arguments) | len(variables) << 32)
    where = os.fspath(cwd) if cwd is not None else ""
    who = str(user) if user is not None else ""
    return head + strings(who, where, *arguments, *variables), tuple(streams)
