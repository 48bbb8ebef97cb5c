"""Guest memory for gdb, by the addresses of a processor or by physical ones. Devices are not looked at: reads of theirs
have effects."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import ref

from cardcage.errors import StateError
from cardcage.memory import GuestMemoryError
from cardcage_qmp.walk import translate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cardcage.machine import Machine
    from cardcage.memory import PhysicalMemory
    from cardcage.x86 import VCpuState

__all__ = ["Memory"]

PAGE = 4096


class Memory:
    """A machine's memory.

    Attributes:
        physical: addresses are guest-physical.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = ref(machine)
        self.physical = False

    @property
    def _space(self) -> PhysicalMemory:
        machine = self._machine()
        if machine is None:
            raise StateError("the machine is gone")
        return machine.memory

    def _pieces(self, state: VCpuState, address: int, size: int) -> Iterator[tuple[int, int]]:
        """(physical address, size) of the parts in RAM, up to the first that is not."""
        space = self._space
        while size:
            take = min(size, PAGE - address % PAGE)
            where = address if self.physical else translate(space, state, address)
            if where is None or not space.contains(where, take):
                return
            yield where, take
            address, size = address + take, size - take

    def read(self, state: VCpuState, address: int, size: int, *, whole: bool = False) -> bytes:
        """The bytes from *address* on, as many as are there. Raises ValueError where *whole* and they are not all."""
        space, found = self._space, bytearray()
        for where, take in self._pieces(state, address, size):
            try:
                found += space.read(where, take)
            except GuestMemoryError:  # it moved meanwhile
                break
        if whole and len(found) < size:
            raise ValueError(f"no memory at {address:#x}")
        return bytes(found)

    def write(self, state: VCpuState, address: int, data: bytes) -> bool:
        """Write all of *data*, or nothing; whether it was."""
        space, at = self._space, 0
        pieces = list(self._pieces(state, address, len(data)))
        if sum(size for _, size in pieces) < len(data):
            return False
        try:
            for where, size in pieces:
                space.write(where, data[at : at + size])
                at += size
        except GuestMemoryError:
            return False
        return True
