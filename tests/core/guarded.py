"""A security card that refuses what a test says, and a machine that it watches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from attrs import define, field, frozen
from cardcage.device import Pio, Slot
from cardcage.errors import Denied
from cardcage.hookspecs import hookimpl
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage.registry import Registry
from cardcage.security import Act
from scripted import Scripted


@define(eq=False)
class Guard:
    """Refuses what is in ``refused`` ((class, permission) pairs), and remembers what it was asked."""

    refused: set[tuple[str, str]] = field(factory=set)
    asked: list[Act] = field(factory=list)
    callbacks: list[Callable[[], None]] = field(factory=list)
    released: list[str] = field(factory=list)
    closed: int = 0

    def check(self, act: Act, /) -> None:
        self.asked.append(act)
        for permission in act.permissions:
            if (act.tclass, permission) in self.refused:
                raise Denied(f"{act.source} may not {permission} {act.tclass}")

    def label(self, act: Act, name: str, /) -> str | None:
        return f"{act.source.partition(':')[0]}:{name}" if act.tclass in ("device", "machine") else None

    def release(self, label: str, tclass: str, /) -> None:
        self.released.append(label)

    def subscribe(self, changed: Callable[[], None], /) -> Callable[[], None]:
        self.callbacks.append(changed)
        return lambda: self.callbacks.remove(changed)

    def close(self) -> None:
        self.closed += 1

    def now(self, *refused: tuple[str, str]) -> None:
        """Change the policy."""
        self.refused = set(refused)
        for changed in list(self.callbacks):
            changed()


@frozen
class Options:
    char: str = "none"


class Unit:
    """A device that opens a back end, if told to."""

    def __init__(self, options: Options) -> None:
        self.options, self.back = options, None

    def plug(self, slot: Slot, /) -> None:
        self.slot = slot
        if self.options.char != "none":
            self.back = slot.host.open("char", self.options.char)

    def read(self, offset: int, size: int, /) -> int:
        return self.slot.board.name and 1  # asks for "reach" each time

    def write(self, offset: int, size: int, value: int, /) -> None:
        self.slot.board.pause()


class Back:
    """A char back end that asks for its file; ``made`` are all of them."""

    made: ClassVar[list[Back]] = []

    def __init__(self, slot: Slot) -> None:
        self.made.append(self)
        slot.host.ask("image", "/the/file", ("open", "write"))
        self.written: list[bytes] = []
        self.received: Any = None

    def start(self, received: Callable[[bytes], None], /) -> None:
        self.received = received

    def write(self, data: bytes, /) -> None:
        self.written.append(data)

    def close(self) -> None: ...


class Cards:
    def __init__(self, guard: Any = None) -> None:
        self.guard = guard

    @hookimpl
    def cardcage_register(self, registry: Registry) -> None:
        registry.device("unit", Unit, options=Options, regions=(Pio(4, 0x100),))
        registry.backend("char", "back", Back)
        registry.security("guard", lambda: self.guard)


def machine(guard: Any, *cards: Any, **more: Any) -> Machine:
    """A bare scripted machine that only *guard* watches, with *cards* beside its own."""
    host = Host([Scripted(), Cards(guard), *cards], installed=False)
    keys = {"platform": "none", "memory": "1M", "accel": "scripted", "name": "vm"}
    return Machine(host=host, machine=keys, fragments=[{"security": {"checkers": ["guard"]}}], **more)
