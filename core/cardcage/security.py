"""Mediation: before each act between labelled objects the machine asks the checkers.

An act is (source label, target label, class, permission), as in SELinux. Checkers stack restrictively: each may refuse
by raising :exc:`~cardcage.errors.Denied`; an error in one refuses too; with none, a question costs one ``if``.

Classes and permissions that the core asks about:

=============  ==========================================================================================
``machine``    ``create start pause resume reset stop add save load`` (source: ``operator``)
``device``     ``plug unplug`` (source: the machine)
``backend``    ``open`` (source: the device; target: the back end's kind and type, ``char:stdio``)
``bus``        ``claim move`` (source: the device; target: ``pio`` or ``mmio``)
``interrupt``  ``raise message`` (source: the device; asked when a line is taken, and at each message)
``memory``     ``read write map`` (source: the device; asked at each access while there are checkers); ``merge``
               (source: the machine; target: those whose memory a policy would merge with its own)
``card``       ``load`` (source: ``host``; target: the card's name)
=============  ==========================================================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from cardcage.errors import CardcageError, Denied

if TYPE_CHECKING:
    from cardcage.memory import GuestMemory

__all__ = ["CLASSES", "Checker", "MediatedMemory", "Mediator"]

CLASSES = {
    "machine": ("create", "start", "pause", "resume", "reset", "stop", "add", "save", "load"),
    "device": ("plug", "unplug"),
    "backend": ("open",),
    "bus": ("claim", "move"),
    "interrupt": ("raise", "message"),
    "memory": ("read", "write", "map", "merge"),
    "card": ("load",),
}


class Checker(Protocol):
    """A security card's factory product."""

    def check(self, source: str, target: str, tclass: str, permission: str, /) -> None:
        """Return to allow, raise :exc:`~cardcage.errors.Denied` to refuse. Any thread."""
        ...


class Mediator:
    """The checkers of a host or machine."""

    __slots__ = ("checkers",)

    def __init__(self, checkers: tuple[Checker, ...] = ()) -> None:
        self.checkers = checkers

    def check(self, source: str, target: str, tclass: str, permission: str) -> None:
        """Ask all. Raises Denied when one refuses or breaks."""
        if self.checkers:
            self._ask(source, target, tclass, permission)

    def _ask(self, source: str, target: str, tclass: str, permission: str) -> None:
        act = f"{source} may not {permission} {tclass} {target}"
        for checker in self.checkers:
            try:
                checker.check(source, target, tclass, permission)
            except Denied as error:
                raise Denied(str(error) or act) from error
            except Exception as error:  # a checker that breaks must not let anything pass
                blame = "" if isinstance(error, CardcageError) else f"{type(error).__name__}: "
                raise Denied(f"{act}: a checker failed: {blame}{error}") from error


class MediatedMemory:
    """Guest memory as a device with *label* sees it while there are checkers."""

    def __init__(self, memory: GuestMemory, mediator: Mediator, label: str, target: str) -> None:
        self._memory, self._mediator, self._label, self._target = memory, mediator, label, target

    def _ask(self, permission: str) -> None:
        self._mediator.check(self._label, self._target, "memory", permission)

    def read(self, address: int, size: int, /) -> bytes:
        self._ask("read")
        return self._memory.read(address, size)

    def write(self, address: int, data: bytes, /) -> None:
        self._ask("write")
        self._memory.write(address, data)

    def view(self, address: int, size: int, /) -> memoryview:
        self._ask("map")
        return self._memory.view(address, size)

    def written(self, address: int, size: int, /) -> None:
        self._memory.written(address, size)

    def contains(self, address: int, size: int, /) -> bool:
        return self._memory.contains(address, size)

    def discard(self, address: int, size: int, /) -> bool:
        self._ask("write")
        return self._memory.discard(address, size)
