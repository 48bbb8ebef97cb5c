"""The host's side of QEMU's guest agent protocol: a guest with the package ``qemu-guest-agent`` needs nothing of ours.

Requests and answers are JSON objects, a line each (QEMU, docs/interop/qemu-ga-ref). One is under way at a time. Before
the first, and after one that got no answer, ``guest-sync-delimited`` says from where on the answers are ours: the agent
puts the byte 0xFF before its answer. The guest is hostile: lines have a bound, and what nobody asked for is passed
over.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import json
import os
import threading
import time
from subprocess import CalledProcessError, CompletedProcess, TimeoutExpired
from typing import TYPE_CHECKING, Any

from cardcage.errors import CardcageError, StateError, UsageError
from cardcage.waiting import Condition

from cardcage_agent.errors import AgentError, AgentTimeout, NoAgent, ProtocolError
from cardcage_agent.files import SILENCE
from cardcage_agent.process import LIMIT
from cardcage_agent.reach import nanoseconds, reach

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from cardcage.device import Slot

__all__ = ["Qga", "QgaLink", "open_qga"]

PORT = "org.qemu.guest_agent.0"
LINE_MAX = 16 << 20
"""Bytes of an answer."""
LINES_MAX = 64
"""Lines that came and were not looked at."""
REQUEST_MAX = 3 << 16
"""Bytes of a request: a virtio console drops what is beyond a little more than that while the guest does not read."""
PIECE = 1 << 16
"""Bytes of a file in one request."""
POLLS = (0.002, 0.05)
"""Seconds between two looks whether a command has ended: the first, and the most."""


class QgaLink:
    """Char back end ``qemu-agent``, and the service ``qga``: lines to and from the agent."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self.lock = threading.Lock()
        self._changed = Condition()
        self._kept = bytearray()
        self._lines: list[bytes] = []
        self._wanted = False
        self._failure: CardcageError | None = None
        self._received: Callable[[bytes], None] | None = None
        self.synchronized = False
        self.numbers = itertools.count(int.from_bytes(os.urandom(4), "big"))

    @property
    def machine(self) -> str:
        """The machine's name."""
        return self._slot.machine

    def start(self, received: Callable[[bytes], None], /) -> None:
        """Begin; see CharBackend."""
        self._received = received

    def write(self, data: bytes, /) -> None:
        """Bytes from the guest."""
        with self._changed:
            if not self._wanted:
                return
            _, delimiter, after = data.rpartition(b"\xff")
            if delimiter:  # what came before it is of no account
                self._kept.clear()
                self._lines.clear()
            self._kept += after
            if b"\n" in after:  # looked for in what is new: a guest must not make us read all again for each byte
                *whole, rest = bytes(self._kept).split(b"\n", LINES_MAX)
                self._lines += [one for one in whole if one.strip()]
                self._kept = bytearray(rest)
            if len(self._lines) >= LINES_MAX or len(self._kept) + sum(map(len, self._lines)) > LINE_MAX:
                self._kept.clear()
                self._lines.clear()
                self._wanted = False
                self._failure = self._failure or ProtocolError(
                    f"{self.machine}: qemu-guest-agent sent more than the answer to one request"
                )
            self._changed.notify_all()

    def close(self) -> None:
        """The device is gone."""
        self.fail(StateError(f"{self.machine}: the machine was closed"))

    def fail(self, error: CardcageError) -> None:
        """End what waits, and all that comes after it, with *error*. The first counts."""
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def send(self, request: dict[str, Any], *, delimited: bool = False) -> None:
        """Send a request, after which its answer is waited for."""
        data = (b"\xff" if delimited else b"") + json.dumps(request).encode() + b"\n"
        if len(data) > REQUEST_MAX:
            raise AgentError(f"a request of {len(data)} bytes: expected {REQUEST_MAX} at most; write a file first")
        with self._changed:
            if self._failure is not None:
                raise self._failure
            self._lines.clear()
            self._kept.clear()
            self._wanted = True
        self._slot.loop.call_soon(lambda: self._received(data) if self._received is not None else None)

    def answer(self, deadline: float) -> Any:
        """The next JSON object that comes; None at *deadline* (monotonic seconds). Raises what ended the link."""
        with self._changed:
            while True:
                while self._lines:
                    try:
                        found = json.loads(self._lines.pop(0))
                    except (ValueError, RecursionError):
                        continue
                    if isinstance(found, dict):
                        return found
                if self._failure is not None:
                    raise self._failure
                left = deadline - time.monotonic()
                if left <= 0:
                    self._wanted = False
                    return None
                self._changed.wait(left)


def open_qga(slot: Slot) -> QgaLink:
    """Open the back end ``qemu-agent``; it is the machine's service ``qga``. Raises ConfigError for a second one."""
    link = QgaLink(slot)
    slot.host.provide("qga", link)
    return link


class Qga:
    """QEMU's guest agent in the guest.

    Each call waits for the agent, up to its own *timeout*. Raises NoAgent when none answers, AgentError with the words
    of the agent for what it refuses, and StateError for a machine that has no port for one.
    """

    def __init__(self, machine: Any) -> None:
        self._machine = machine

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None, *, timeout: float = SILENCE) -> Any:
        """Carry out any command of the agent, such as ``guest-get-osinfo``, and return what it returns."""
        link = self._link(command)
        deadline = time.monotonic() + timeout
        with link.lock:
            if not link.synchronized:
                self._synchronize(link, timeout, deadline)
            request = {"execute": command, **({"arguments": dict(arguments)} if arguments else {})}
            link.send(request)
            found = link.answer(deadline)
            if found is None:
                link.synchronized = False
                raise AgentTimeout(f"{link.machine}: {command}: no answer within {timeout:g} s")
        if "error" in found:
            error = found["error"]
            words = error.get("desc") if isinstance(error, dict) else None
            raise AgentError(f"{link.machine}: {command}: {_printable(words or 'refused')}")
        return found.get("return")

    def _link(self, command: str) -> QgaLink:
        missing = f'QEMU\'s guest agent: a virtio-console port named "{PORT}" with char = "qemu-agent" is one'
        link: QgaLink = reach(self._machine, "qga", f"qga {command}", missing)
        return link

    def _synchronize(self, link: QgaLink, timeout: float, deadline: float) -> None:
        """Find where the agent's answers to us begin. A guest that still boots is asked again each second."""
        while time.monotonic() < deadline:
            number = next(link.numbers) & 0x7FFFFFFF
            link.send({"execute": "guest-sync-delimited", "arguments": {"id": number}}, delimited=True)
            until = min(deadline, time.monotonic() + 1)
            while (found := link.answer(until)) is not None:
                if found.get("return") == number:
                    link.synchronized = True
                    return
        raise NoAgent(
            f"{link.machine}: no qemu-guest-agent has answered within {timeout:g} s: the guest has none, or hangs"
        )

    def ping(self, timeout: float = SILENCE) -> float:
        """Seconds that an answer takes."""
        began = time.monotonic()
        self.execute("guest-ping", timeout=timeout)
        return time.monotonic() - began

    def info(self, timeout: float = SILENCE) -> dict[str, Any]:
        """The agent's version, and its commands."""
        return self._table("guest-info", self.execute("guest-info", timeout=timeout))

    def set_time(self, seconds: float | None = None, timeout: float = SILENCE) -> None:
        """Set the guest's clock: seconds since 1970; by default this host's time."""
        self.execute("guest-set-time", {"time": nanoseconds(seconds)}, timeout=timeout)

    def freeze(self, timeout: float = SILENCE) -> int:
        """Freeze the guest's file systems; how many. Until :meth:`thaw`, the agent refuses most other commands."""
        return self._number("guest-fsfreeze-freeze", self.execute("guest-fsfreeze-freeze", timeout=timeout))

    def thaw(self, timeout: float = SILENCE) -> int:
        """Let file systems go on; how many."""
        return self._number("guest-fsfreeze-thaw", self.execute("guest-fsfreeze-thaw", timeout=timeout))

    def shutdown(self, mode: str = "powerdown", timeout: float = SILENCE) -> None:
        """Ask the guest to end: ``powerdown``, ``halt`` or ``reboot``. There is no answer."""
        link = self._link("guest-shutdown")
        self.ping(timeout)
        link.send({"execute": "guest-shutdown", "arguments": {"mode": mode}})
        link.synchronized = False

    def run(
        self,
        args: Sequence[str],
        *,
        input: bytes | None = None,
        check: bool = False,
        timeout: float = 60.0,
        env: Mapping[str, str] | None = None,
    ) -> CompletedProcess[bytes]:
        """Run a program in the guest and wait for its end; both outputs are captured, up to 16 MiB of each.

        Args:
            args: the program, by its whole path or as found by the agent's PATH, and its arguments.
            input: for its standard input. check: raise CalledProcessError for another return code than 0.
            timeout: seconds, after which TimeoutExpired is raised; the protocol has no way to end the program.
            env: variables, in place of the agent's.
        """
        if isinstance(args, str) or not args:
            raise UsageError("a command: expected a list of the program and its arguments")
        deadline = time.monotonic() + timeout
        keys: dict[str, Any] = {"path": args[0], "arg": list(args[1:]), "capture-output": True}
        if input is not None:
            keys["input-data"] = base64.b64encode(input).decode()
        if env is not None:
            keys["env"] = [f"{name}={value}" for name, value in env.items()]
        begun = self._table("guest-exec", self.execute("guest-exec", keys, timeout=timeout))
        pid, pause = self._number("guest-exec", begun.get("pid")), POLLS[0]
        while True:
            left = max(deadline - time.monotonic(), 0.001)
            found = self._table("guest-exec-status", self.execute("guest-exec-status", {"pid": pid}, timeout=left + 1))
            if found.get("exited"):
                break
            if time.monotonic() >= deadline:
                raise TimeoutExpired(list(args), timeout)
            time.sleep(min(pause, left))
            pause = min(2 * pause, POLLS[1])
        out, err = (self._bytes("guest-exec-status", found.get(name, "")) for name in ("out-data", "err-data"))
        code = (
            -self._number("signal", found["signal"]) if "signal" in found else self._number("", found.get("exitcode"))
        )
        if check and code:
            raise CalledProcessError(code, list(args), out, err)
        return CompletedProcess(list(args), code, out, err)

    def read(self, path: str, *, limit: int = LIMIT, timeout: float = SILENCE) -> bytes:
        """The contents of a file of the guest. Raises AgentError for more than *limit* bytes."""
        with _Open(self, path, "r", timeout) as handle:
            data = bytearray()
            while True:
                keys = {"handle": handle, "count": PIECE}
                found = self._table("guest-file-read", self.execute("guest-file-read", keys, timeout=timeout))
                piece = self._bytes("guest-file-read", found.get("buf-b64", ""))
                data += piece
                if len(data) > limit:
                    raise AgentError(f"{self._machine.name}:{path}: more than {limit} bytes")
                if found.get("eof") or not piece:
                    return bytes(data)

    def write(self, path: str, data: bytes, *, append: bool = False, timeout: float = SILENCE) -> None:
        """Write a file of the guest, which is made or emptied first, unless *append*."""
        with _Open(self, path, "a" if append else "w", timeout) as handle:
            for at in range(0, len(data), PIECE):
                text = base64.b64encode(data[at : at + PIECE]).decode()
                keys = {"handle": handle, "buf-b64": text}
                found = self._table("guest-file-write", self.execute("guest-file-write", keys, timeout=timeout))
                if found.get("count") != len(data[at : at + PIECE]):
                    raise AgentError(f"{self._machine.name}:{path}: {found.get('count')} bytes were written of a piece")

    # what the guest says

    def _table(self, command: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise AgentError(f"{self._machine.name}: {command}: an answer that is no object")
        return value

    def _number(self, command: str, value: Any) -> int:
        if not isinstance(value, int) or not -(1 << 63) <= value < 1 << 63:
            raise AgentError(f"{self._machine.name}: {command}: an answer that is no number")
        return value

    def _bytes(self, command: str, value: Any) -> bytes:
        try:
            return base64.b64decode(value, validate=True)
        except (binascii.Error, TypeError, ValueError) as error:
            raise AgentError(f"{self._machine.name}: {command}: an answer that is not base64") from error


class _Open:
    """A file that the agent has open meanwhile."""

    def __init__(self, agent: Qga, path: str, mode: str, timeout: float) -> None:
        self._agent, self._timeout = agent, timeout
        self._keys = {"path": path, "mode": mode}

    def __enter__(self) -> int:
        found = self._agent.execute("guest-file-open", self._keys, timeout=self._timeout)
        self._handle = self._agent._number("guest-file-open", found)
        return self._handle

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self._agent.execute("guest-file-close", {"handle": self._handle}, timeout=self._timeout)
        except AgentError:
            if kind is None:
                raise


def _printable(words: Any) -> str:
    """A guest's words in an error: nothing in it controls a terminal."""
    return "".join(one if one.isprintable() else "?" for one in str(words)[:500])
