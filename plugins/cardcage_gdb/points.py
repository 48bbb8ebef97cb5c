"""gdb's breakpoints and watchpoints, and those that the accelerator has.

gdb removes all of them at each stop and inserts them again before it goes on. So the accelerator is told of what is not
there any more only when the machine goes on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cardcage.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from cardcage.accelerator import GuestDebug
    from cardcage.machine import Machine

__all__ = ["MOST", "Points", "guest_debug"]

Point = tuple[str, int, int]
KINDS = ("execute", "execute", "write", "read", "access")
"""By gdb's number: software, hardware."""
MOST, LONGEST = 1000, 4096


def guest_debug(machine: Machine) -> GuestDebug:
    """The accelerator's part. Raises ConfigError where it has none."""
    vm: Any = machine.vm
    if "guest-debug" not in vm.capabilities:
        raise ConfigError(f"accelerator {machine.accelerator.name} cannot debug guests here: it has no guest-debug")
    found: GuestDebug = vm
    return found


class Points:
    """The points that gdb has set.

    Attributes:
        vm: the accelerator's part. set: by gdb's kind, address and size.
    """

    def __init__(self, machine: Machine) -> None:
        self.vm = guest_debug(machine)
        self.set: dict[tuple[int, int, int], Point] = {}
        self._applied: set[Point] = set()

    def add(self, kind: int, address: int, size: int) -> None:
        """Insert one. Raises AcceleratorError for what the accelerator cannot hold, UsageError."""
        execute = kind < 2
        if not execute and not 0 < size <= LONGEST:
            raise UsageError(f"{size} bytes cannot be watched; expected 1 to {LONGEST}")
        if len(self.set) >= MOST:
            raise UsageError(f"more than {MOST} breakpoints")
        point = KINDS[kind], address, 1 if execute else size
        if point not in self._applied:
            self._apply({*self.set.values(), point})
        self.set[kind, address, size] = point

    def remove(self, kind: int, address: int, size: int) -> None:
        """Remove one; nothing where it is not there."""
        self.set.pop((kind, address, size), None)

    def clear(self) -> None:
        """Remove all."""
        self.set.clear()
        self.apply()

    def apply(self) -> None:
        """Have the accelerator hold what is set, and nothing else."""
        self._apply(set(self.set.values()))

    def _apply(self, points: set[Point]) -> None:
        if points != self._applied:
            self.vm.set_breakpoints(sorted(points))
            self._applied = points

    def stop_of(self, cpu: int) -> Point | None:
        """The point that *cpu* stopped at, if gdb has it."""
        point = self.vm.debug_stop(cpu)
        return point if point in self.set.values() or point in self._applied else None

    def watched(self, cpu: int) -> bool:
        """True when *cpu* stopped behind an access."""
        point = self.stop_of(cpu)
        return point is not None and point[0] != "execute"

    def word(self, address: int) -> bytes:
        """gdb's word for a code breakpoint that was met: ``hwbreak`` or ``swbreak``."""
        kinds = {kind for kind, at, _ in self.set if kind < 2 and at == address}
        return b"hwbreak" if kinds == {1} else b"swbreak"
