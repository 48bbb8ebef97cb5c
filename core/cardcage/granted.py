"""What a device holds while there are security checkers: memory, lines and back ends that can be revoked.

Each hands out the calls of what it stands for, bound, so that an access costs what it costs without it. Revoked, the
calls are exchanged for ones that refuse as that thing refuses anyway (no RAM there, an I/O error, a lost frame). Every
device gets along with that, and the guest and the machine go on.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

from cardcage.memory import GuestMemoryError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.interrupts import IrqSource
    from cardcage.memory import PhysicalMemory

__all__ = ["GrantedBackend", "GrantedLine", "GrantedMemory", "GrantedVm", "MemoryDenied"]


CALLS = ("readv", "writev", "try_readv", "try_writev", "flush", "discard", "write_zeroes", "write", "send")
"""What a device does to its back end."""


class MemoryDenied(GuestMemoryError):
    """The security policy does not let this device reach guest memory (so)."""


class GrantedMemory:
    """Guest memory as a device with DMA sees it; satisfies :class:`~cardcage.memory.GuestMemory`.

    Attributes:
        reads, writes: what is granted. Views, which are writable, take both.
    """

    __slots__ = (
        "_log",
        "_physical",
        "contains",
        "discard",
        "read",
        "reads",
        "span",
        "view",
        "write",
        "writes",
        "written",
        "written_many",
    )

    def __init__(self, physical: PhysicalMemory, log: Any) -> None:
        self._physical, self._log = physical, log
        self.reads = self.writes = True
        self.written, self.written_many = physical.written, physical.written_many
        self.contains = physical.contains
        self._settle()

    @property
    def generation(self) -> int:
        """See :attr:`~cardcage.memory.PhysicalMemory.generation`."""
        return self._physical.generation

    def switch(self, which: str, on: bool) -> Callable[[], None]:
        """What grants (*on*) or revokes ``reads`` or ``writes``."""

        def turn() -> None:
            setattr(self, which, on)
            self._settle()
            self._physical.generation += 1  # views that were kept are asked for again

        return turn

    def _settle(self) -> None:
        physical, whole, refuse = self._physical, self.reads and self.writes, self._refuse
        self.read: Callable[[int, int], bytes] = physical.read if self.reads else refuse
        self.write: Callable[[int, bytes | memoryview], None] = physical.write if self.writes else refuse
        self.discard: Callable[[int, int], bool] = physical.discard if self.writes else refuse
        self.view: Callable[[int, int], memoryview] = physical.view if whole else refuse
        self.span: Callable[[int], tuple[int, memoryview]] = physical.span if whole else refuse

    def _refuse(self, address: int, *_: Any) -> Any:
        self._log.warning("security: DMA refused", address=hex(address))
        raise MemoryDenied(f"guest memory {address:#x}: refused by the security policy")


class GrantedLine:
    """One source of an interrupt line; satisfies :class:`~cardcage.interrupts.IrqLine`. Revoked, it is low."""

    __slots__ = ("_source", "_wanted", "pulse", "set")

    def __init__(self, source: IrqSource) -> None:
        self._source, self._wanted = source, False
        self.restore()

    def revoke(self) -> None:
        self._wanted = self._source.high
        self._source.set(False)
        self.set: Callable[[bool], None] = self._note
        self.pulse: Callable[[], None] = self._lose

    def restore(self) -> None:
        """Drive what the device has wanted last."""
        self.set, self.pulse = self._source.set, self._source.pulse
        self._source.set(self._wanted)

    def _note(self, level: bool, /) -> None:
        self._wanted = level

    def _lose(self) -> None:
        pass


class GrantedBackend:
    """Stands before a char, block or network back end and shuts when what it was granted is revoked.

    Shut, block requests fail with EACCES; bytes and frames are lost in both directions.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._backend: Any = None
        self._shut: frozenset[str] = frozenset()

    def before(self, backend: Any) -> GrantedBackend:
        """Stand before *backend*, which was opened under these grants."""
        self._backend = backend
        self._settle(self._shut)
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def shut(self, why: str) -> Callable[[], None]:
        """What shuts it for as long as *why* is not allowed."""
        return lambda: self._settle(self._shut | {why})

    def open(self, why: str) -> Callable[[], None]:
        """What undoes :meth:`shut`; open when nothing keeps it shut."""
        return lambda: self._settle(self._shut - {why})

    def _settle(self, shut: frozenset[str]) -> None:
        self._shut = shut
        instead = self._fail if self._kind == "block" else self._lose
        for name in CALLS if self._backend is not None else ():
            if (call := getattr(self._backend, name, None)) is not None:
                self.__dict__[name] = instead if shut else call
        if self._kind != "block":
            self.__dict__["start"] = self._start

    def _fail(self, *_: Any, **__: Any) -> Any:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    def _lose(self, *_: Any) -> None:
        pass

    def _start(self, received: Callable[..., Any], /) -> None:
        def guarded(*values: Any) -> Any:
            return True if self._shut else received(*values)

        self._backend.start(guarded)


class GrantedVm:
    """What a device may do with the accelerator's VM: doorbells, and interrupts by eventfd where routing is granted.

    Args:
        route: asks for the permission ``route`` with ``(revoke, restore)``; returns what drops it.
    """

    def __init__(self, vm: Any, route: Callable[[Callable[[], None], Callable[[], None]], Callable[[], None]]) -> None:
        self._vm, self._route = vm, route
        self.capabilities: frozenset[str] = vm.capabilities
        if "foreign-rings" in vm.capabilities:  # telling what another process writes is no right
            self.add_foreign_ring = vm.add_foreign_ring
            self.remove_foreign_ring = vm.remove_foreign_ring
            self.foreign_ring_heads = vm.foreign_ring_heads
        if "dirty-log" in vm.capabilities:
            self.add_writer, self.remove_writer = vm.add_writer, vm.remove_writer
        self._routes: dict[int, tuple[int, list[int], Callable[[], None]]] = {}
        self._next = 0

    def add_doorbell(self, fd: int, address: int, size: int, *, pio: bool, value: int | None) -> None:
        self._vm.add_doorbell(fd, address, size, pio=pio, value=value)

    def remove_doorbell(self, fd: int, address: int, size: int, *, pio: bool, value: int | None) -> None:
        self._vm.remove_doorbell(fd, address, size, pio=pio, value=value)

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
        _, real, drop = self._routes.pop(route)
        drop()
        while real:
            self._vm.remove_irqfd(fd, real.pop())
