"""A peer's conversation in QMP: greeting, capabilities, commands (docs/interop/qmp-spec.txt). It knows no socket."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypedDict

from cardcage import __version__
from cardcage.errors import FAULTS, CardcageError, in_words
from cardcage.security import HOST, OPERATOR, Act

from cardcage_qmp.errors import CLASSES, QmpError
from cardcage_qmp.wire import JsonError, load

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.machine import Machine
    from cardcage.registry import Offer

    from cardcage_qmp.control import Control

__all__ = ["VERSION", "Session", "VersionInfo", "version"]

VERSION = (7, 2, 0)
"""The version of QEMU whose words these are."""
KEYS = {"execute", "arguments", "id"}
FDS = 64
"""Descriptors that a peer may leave here: on the way, and by name."""


class Triple(TypedDict):
    major: int
    minor: int
    micro: int


class VersionInfo(TypedDict):
    """QEMU's version, and ours as the package."""

    qemu: Triple
    package: str


def version() -> VersionInfo:
    """The version, as the greeting and ``query-version`` tell it: QEMU's, with ours as the package."""
    major, minor, micro = VERSION
    return {"qemu": {"major": major, "minor": minor, "micro": micro}, "package": f"cardcage {__version__}"}


class Session:
    """A peer's conversation. Its commands run one after another, on one thread.

    Attributes:
        control: the machine's monitor. fds: descriptors that the peer gave a name, by it.
    """

    def __init__(self, control: Control) -> None:
        self.control = control
        self.ready = False
        self.fds: dict[str, int] = {}
        self._arrived: list[int] = []

    @property
    def machine(self) -> Machine:
        """The machine. Raises StateError once it is gone."""
        return self.control.machine

    def greeting(self) -> dict[str, Any]:
        """The greeting."""
        return {"QMP": {"version": version(), "capabilities": []}}

    def answer(self, text: bytes) -> dict[str, Any]:
        """Carry a request out; returns the answer."""
        id: tuple[Any, ...] = ()
        try:
            request = load(text)
            if not isinstance(request, dict):
                raise QmpError("QMP input must be a JSON object")
            id = (request["id"],) if "id" in request else ()
            found: dict[str, Any] = {"return": self._execute(request)}
        except JsonError as error:
            found = {"error": {"class": "GenericError", "desc": str(error)}}
        except CardcageError as error:
            kind = error.kind if isinstance(error, QmpError) and error.kind in CLASSES else "GenericError"
            found = {"error": {"class": kind, "desc": str(error)}}
        return {**found, "id": id[0]} if id else found

    def _execute(self, request: dict[str, Any]) -> Any:
        for key in request:
            if key not in KEYS:
                raise QmpError(f"QMP input member '{key}' is unexpected")
        if "execute" not in request:
            raise QmpError("QMP input lacks member 'execute'")
        name, arguments = request["execute"], request.get("arguments", {})
        if not isinstance(name, str):
            raise QmpError("QMP input member 'execute' must be a string")
        if not isinstance(arguments, dict):
            raise QmpError("QMP input member 'arguments' must be an object")
        if not self.ready:
            return self._negotiate(name, arguments)
        if name == "qmp_capabilities":
            raise QmpError("Capabilities negotiation is already complete, command ignored", "CommandNotFound")
        return self.run(name, arguments)

    def _negotiate(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if name != "qmp_capabilities":
            raise QmpError("Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound")
        for key in arguments:
            if key != "enable":
                raise QmpError(f"Parameter '{key}' is unexpected")
        enable = arguments.get("enable", [])
        if not isinstance(enable, list) or not all(isinstance(one, str) for one in enable):
            raise QmpError("Invalid parameter type for 'enable', expected: array of strings")
        if enable:
            raise QmpError(f"Capability '{enable[0]:.100}' is not available")
        self.ready = True
        return {}

    def run(self, name: str, arguments: dict[str, Any]) -> Any:
        """Run a command, once security lets it. Raises QmpError, or what the command raises of this project's."""
        command = self.control.table.commands.get(name)
        if command is None:
            raise QmpError(f"The command {name:.100} has not been found", "CommandNotFound")
        placed, named = command.bind(arguments)
        self.ask(name)
        found = self.carried_out(command.offer, lambda: command.function(self, *placed, **named))
        return {} if found is None else found

    def ask(self, name: str) -> None:
        """Ask whether command *name* may be given. Raises Denied."""
        machine = self.machine
        facts = {"machine": machine.name, "name": name}
        machine.mediator.check(Act(OPERATOR, machine.label, "management", ("reach",), facts))
        machine.mediator.ask(Act(OPERATOR, HOST, "management", ("command",), facts), name)

    def carried_out(self, offer: Offer, call: Callable[[], Any]) -> Any:
        """The result of *call*, which is a card's. Raises this project's errors, whatever it raises."""
        try:
            return call()
        except CardcageError:
            raise
        except OSError as error:  # of a file that a peer named
            where = f"{error.filename}: " if error.filename else ""
            raise QmpError(f"{where}{error.strerror or error}") from error
        except FAULTS as error:  # a card's fault is told and logged, and neither the peer nor the machine ends
            self.machine.log.error("a QMP command failed", command=offer.who, error=repr(error))
            raise QmpError(f"{offer.who}: {in_words(error)}") from error

    # descriptors

    def take(self, fds: list[int]) -> None:
        """*fds* came from the peer; too many of them are closed."""
        self._arrived += fds
        while len(self._arrived) > FDS:
            os.close(self._arrived.pop(0))

    def next_fd(self) -> int:
        """The descriptor that came with this command, the caller's from now on. Raises QmpError."""
        if not self._arrived:
            raise QmpError("No file descriptor supplied via SCM_RIGHTS")
        return self._arrived.pop(0)

    def keep_fd(self, name: str, fd: int) -> None:
        """Keep *fd* under *name*, in place of another of that name. Raises QmpError."""
        if (old := self.fds.pop(name, None)) is not None:
            os.close(old)
        if len(self.fds) >= FDS:
            os.close(fd)
            raise QmpError(f"{FDS} file descriptors have names already")
        self.fds[name] = fd

    def close(self) -> None:
        """The peer has gone: what it gave goes too."""
        for fd in (*self._arrived, *self.fds.values()):
            with suppress(OSError):
                os.close(fd)
        self._arrived.clear()
        self.fds.clear()
