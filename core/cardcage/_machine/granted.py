"""What a device holds while there are security checkers: memory, lines and back ends that can be revoked.

Of each there are two objects: what the device holds, which can do nothing but serve, and its gate, which the slot keeps
and which is shut and opened as policy says. Shut, what the device holds refuses as that thing refuses anyway (no RAM
there, an I/O error, a lost frame). Every device gets along with that, and the guest and the machine go on.

What is not listed here is refused while a gate is shut, and so is a method that the device has kept from before.
"""

from __future__ import annotations

import errno
import inspect
from typing import TYPE_CHECKING, Any

from cardcage.errors import Denied
from cardcage.interrupts import Line
from cardcage.memory import GuestMemoryError, RamMap

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.memory import PhysicalMemory


class MemoryDenied(GuestMemoryError):
    """The security policy does not let this device reach guest memory (so)."""


class BackendDenied(Denied, PermissionError):
    """The security policy does not let this device use its back end any more.

    For a device it is an I/O error, EACCES; where a device lets it pass, the machine goes on as after any denial.
    """


# memory


class GrantedMap(RamMap):
    """RAM as far as one right goes: shown all of it, or nothing.

    Its calls are handed out bound. So an access costs what it costs without it, and a call that was kept finds no RAM
    once the right is gone.
    """

    __slots__ = ("_log", "_physical", "on")

    def __init__(self, physical: PhysicalMemory, log: Any) -> None:
        super().__init__()
        self._physical, self._log, self.on = physical, log, False
        self.turn(True)

    def turn(self, on: bool) -> None:
        """Show RAM, or nothing."""
        if on is not self.on:
            self.on = on
            self._physical.follow(self, on)

    def written(self, address: int, size: int, /) -> None:
        self._physical.written(address, size)

    def discard(self, address: int, size: int, /) -> bool:
        """See :class:`~cardcage.memory.GuestMemory`."""
        if not self.on:
            raise self._missing(address, "")
        return self._physical.discard(address, size)

    def _missing(self, address: int, what: str) -> GuestMemoryError:
        if self.on:
            return super()._missing(address, what)
        self._log.warning("security: DMA refused", address=hex(address))
        return MemoryDenied(f"guest memory {address:#x}: refused by the security policy")


class GrantedMemory:
    """Guest memory as a device with DMA sees it; satisfies :class:`~cardcage.memory.GuestMemory`.

    What says nothing of the contents is no right: where RAM is, and that bytes were written.
    """

    __slots__ = ("_generation", "contains", "discard", "read", "span", "view", "write", "written", "written_many")

    def __init__(self, physical: PhysicalMemory, readable: GrantedMap, writable: GrantedMap, whole: GrantedMap) -> None:
        self._generation: Callable[[], int] = lambda: physical.generation
        self.contains, self.written, self.written_many = physical.contains, physical.written, physical.written_many
        self.read, self.write, self.discard = readable.read, writable.write, writable.discard
        self.view, self.span = whole.view, whole.span

    @property
    def generation(self) -> int:
        """See :attr:`~cardcage.memory.PhysicalMemory.generation`."""
        return self._generation()


class MemoryGate:
    """What grants :attr:`memory`, and revokes it: ``reads``, ``writes``; views, which are writable, take both."""

    __slots__ = ("_rights", "_whole", "memory")

    def __init__(self, physical: PhysicalMemory, log: Any) -> None:
        self._rights = {"reads": GrantedMap(physical, log), "writes": GrantedMap(physical, log)}
        self._whole = GrantedMap(physical, log)
        self.memory = GrantedMemory(physical, self._rights["reads"], self._rights["writes"], self._whole)

    def switch(self, which: str, on: bool) -> Callable[[], None]:
        """What grants (*on*) or revokes ``reads`` or ``writes``."""

        def turn() -> None:
            self._rights[which].turn(on)
            self._whole.turn(all(one.on for one in self._rights.values()))

        return turn


# interrupts


class LineGate:
    """Takes one :attr:`source` of a line off it, which is low then, and puts it back.

    The device holds the source itself and may keep its calls: meanwhile they drive a line that leads nowhere, which
    knows what the device has wanted last.
    """

    __slots__ = ("_line", "source")

    def __init__(self, line: Line) -> None:
        self._line, self.source = line, line.source()

    def revoke(self) -> None:
        self.source.move(Line(_nowhere))

    def restore(self) -> None:
        """Drive what the device has wanted last."""
        self.source.move(self._line)


def _nowhere(level: bool, /) -> None:
    pass


# back ends


REFUSED = {
    "char": ("write",),
    "block": ("readv", "writev", "try_readv", "try_writev", "flush", "discard", "write_zeroes"),
    "net": ("send",),
}
"""What each kind of back end does for a device, and refuses in its own way: I/O errors, and bytes and frames lost."""

HARMLESS = {
    "char": ("close", "forked", "may_fork", "needs", "start"),
    "block": ("close", "forked", "info", "may_fork", "needs"),
    "net": ("close", "features", "forked", "may_fork", "needs", "resume", "set_offloads", "start"),
}
"""What passes all the same: the end, what does not change, and what a back end has to know once it is open again.
Nothing reaches a device that has called ``start``."""


class GrantedBackend:
    """Stands before a char, block or network back end, and can do what it can while its gate is open."""

    __slots__ = ("_other", "start", *(name for names in REFUSED.values() for name in names))

    def __init__(self, backend: Any, guard: Callable[[Any, str], Any], names: tuple[str, ...]) -> None:
        self._other: Callable[[str], Any] = lambda name: guard(backend, name)
        for name in names:
            if hasattr(backend, name):
                setattr(self, name, self._other(name))

    def __getattr__(self, name: str) -> Any:
        return self._other(name)


class BackendGate:
    """Shuts when what a back end was granted is revoked.

    Shut, block requests fail with EACCES; bytes and frames are lost in both directions. Whatever else the back end has,
    that :mod:`cardcage.backends` does not know, raises BackendDenied.

    Args:
        kind: ``char``, ``block``, ``net``, or of something of which nothing is known.
    """

    __slots__ = ("_harmless", "_kind", "_refused", "_shut")

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._refused, self._harmless = REFUSED.get(kind, ()), HARMLESS.get(kind, ())
        self._shut: frozenset[str] = frozenset()

    def before(self, backend: Any) -> GrantedBackend:
        """What stands before *backend*, which was opened under these grants."""
        return GrantedBackend(backend, self._guard, (*self._refused, "start"))

    def shut(self, why: str) -> Callable[[], None]:
        """What shuts it for as long as *why* is not allowed."""
        return lambda: self._settle(self._shut | {why})

    def open(self, why: str) -> Callable[[], None]:
        """What undoes :meth:`shut`; open when nothing keeps it shut."""
        return lambda: self._settle(self._shut - {why})

    def _settle(self, shut: frozenset[str]) -> None:
        self._shut = shut

    def _guard(self, backend: Any, name: str) -> Any:
        """What is handed out for the attribute *name*. Raises AttributeError, or BackendDenied while shut."""
        if name in self._harmless:
            return self._start(backend.start) if name == "start" else getattr(backend, name)
        if self._shut and name not in self._refused:
            inspect.getattr_static(backend, name)  # a property's code is the back end's, and must not run
            self._fail()
        found = getattr(backend, name)
        if not callable(found):
            return found
        instead = self._lose if name in self._refused and self._kind != "block" else self._fail

        def guarded(*values: Any, **more: Any) -> Any:
            return instead() if self._shut else found(*values, **more)

        return guarded

    def _fail(self) -> Any:
        raise BackendDenied(errno.EACCES, "refused by the security policy")

    def _lose(self) -> None:
        pass

    def _start(self, start: Callable[[Callable[..., Any]], None]) -> Callable[[Callable[..., Any]], None]:
        def started(received: Callable[..., Any], /) -> None:
            start(lambda *values: True if self._shut else received(*values))

        return started


# the accelerator


class GrantedVm:
    """What a device may do with the accelerator's VM: doorbells in its own ranges, and what it has added itself.

    Args:
        owns: whether the device answers at all of a range: ``owns(pio, address, size)``.
        route: asks for the permission ``route`` with ``(revoke, restore)``; returns what drops it.

    Telling what another process writes (foreign rings, writers) is no right.
    """

    def __init__(
        self,
        vm: Any,
        owns: Callable[[bool, int, int], bool],
        route: Callable[[Callable[[], None], Callable[[], None]], Callable[[], None]],
    ) -> None:
        self._vm, self._owns, self._route = vm, owns, route
        self.capabilities: frozenset[str] = vm.capabilities
        self._doorbells: set[tuple[int, int, int, bool, int | None]] = set()
        self._rings: set[int] = set()
        self._routes: dict[int, tuple[int, list[int], Callable[[], None]]] = {}
        self._next = 0

    def add_doorbell(self, fd: int, address: int, size: int, *, pio: bool, value: int | None) -> None:
        """See :class:`~cardcage.accelerator.Doorbells`. Raises Denied outside of the device's own ranges."""
        if not self._owns(pio, address, max(size, 1)):
            raise Denied(f"a doorbell at {address:#x}: the device does not answer there")
        self._vm.add_doorbell(fd, address, size, pio=pio, value=value)
        self._doorbells.add((fd, address, size, pio, value))

    def remove_doorbell(self, fd: int, address: int, size: int, *, pio: bool, value: int | None) -> None:
        """Raises Denied for one that the device did not add."""
        key = fd, address, size, pio, value
        self._own(key in self._doorbells, "doorbell")
        self._vm.remove_doorbell(fd, address, size, pio=pio, value=value)
        self._doorbells.discard(key)

    def add_foreign_ring(self, size: int, table: int, avail: int, used: int, /) -> int:
        number: int = self._vm.add_foreign_ring(size, table, avail, used)
        self._rings.add(number)
        return number

    def foreign_ring_heads(self, number: int, /) -> tuple[int, list[int]]:
        """Raises Denied for a ring that the device did not add."""
        self._own(number in self._rings, "ring")
        found: tuple[int, list[int]] = self._vm.foreign_ring_heads(number)
        return found

    def remove_foreign_ring(self, number: int, /) -> None:
        """Raises Denied for a ring that the device did not add."""
        self._own(number in self._rings, "ring")
        self._rings.discard(number)
        self._vm.remove_foreign_ring(number)

    def add_writer(self, writer: Any, /) -> None:
        self._vm.add_writer(writer)

    def remove_writer(self, writer: Any, /) -> None:
        self._vm.remove_writer(writer)

    def add_irqfd(self, fd: int, address: int, data: int, /) -> int:
        """See :class:`~cardcage.accelerator.IrqFds`. Without the permission, the route leads nowhere."""
        real = [self._vm.add_irqfd(fd, address, data)]

        def revoke() -> None:
            while real:
                self._vm.remove_irqfd(fd, real.pop())

        def restore() -> None:
            real.append(self._vm.add_irqfd(fd, address, data))

        self._next += 1
        self._routes[self._next] = fd, real, self._route(revoke, restore)
        return self._next

    def remove_irqfd(self, fd: int, route: int, /) -> None:
        """Raises Denied for a route that the device did not add."""
        self._own(route in self._routes and self._routes[route][0] == fd, "route")
        _, real, drop = self._routes.pop(route)
        drop()
        while real:
            self._vm.remove_irqfd(fd, real.pop())

    def close(self) -> None:
        """Undo what the device has left."""
        for fd, address, size, pio, value in [*self._doorbells]:
            self.remove_doorbell(fd, address, size, pio=pio, value=value)
        for route, (fd, _, _) in [*self._routes.items()]:
            self.remove_irqfd(fd, route)

    def _own(self, own: bool, what: str) -> None:
        if not own:
            raise Denied(f"the device has no such {what}")
