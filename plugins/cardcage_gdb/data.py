"""A machine's registers, memory and points, as gdb's packets ask for them."""

from __future__ import annotations

import binascii
from typing import TYPE_CHECKING

from cardcage.errors import CardcageError, StateError, UsageError
from cardcage.machine import State

from cardcage_gdb.registers import REGISTERS, SIZE, read, read_all, said_along, write
from cardcage_gdb.stops import Stops
from cardcage_gdb.wire import MOST, hexadecimal, unescape

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.x86 import VCpuState

__all__ = ["BAD", "CUT", "Data", "numbers", "unhex"]

BAD, FAULT, NO_SPACE = b"E16", b"E0e", b"E1c"
"""EINVAL, EFAULT, ENOSPC, in hexadecimal as gdb shows them: gdb itself knows no numbers."""
CUT = MOST // 2 - 8
"""Bytes of memory in an answer."""


class Data(Stops):
    """Registers, memory and points of a machine."""

    def _state(self, cpu: int) -> VCpuState:
        """Its registers. Raises StateError while it runs."""
        if self.machine.state is State.RUNNING:
            raise StateError("registers can be read while the machine is paused")
        if cpu not in self._states:
            self._states[cpu] = self.machine.vcpus[cpu].get_state()
        return self._states[cpu]

    def _set_state(self, cpu: int, state: VCpuState) -> None:
        self._states.clear()
        self.machine.vcpus[cpu].set_state(state)

    def _said(self, signal: int, why: bytes = b"") -> bytes:
        """With the registers that gdb looks at after each step, once it knows their numbers: it asks for none then."""
        found = super()._said(signal, why)
        return found + said_along(self._state(self._cpu)) if self._described else found

    def _read_all(self, _: bytes) -> bytes:
        return read_all(self._state(self._cpu)).hex().encode()

    def _write_all(self, text: bytes) -> bytes:
        data, at = unhex(text), 0
        if data is None or len(data) != SIZE:
            return BAD
        for one in REGISTERS:
            if (found := self._written(one.name, data[at : at + one.size])) != b"OK":
                return found
            at += one.size
        return b"OK"

    def _read_one(self, text: bytes) -> bytes:
        number = hexadecimal(text)
        if number is None or number >= len(REGISTERS):
            return BAD
        return read(self._state(self._cpu), REGISTERS[number]).hex().encode()

    def _write_one(self, text: bytes) -> bytes:
        head, _, value = text.partition(b"=")
        number, data = hexadecimal(head), unhex(value)
        if number is None or number >= len(REGISTERS) or data is None or len(data) != REGISTERS[number].size:
            return BAD
        return self._written(REGISTERS[number].name, data)

    def _written(self, name: str, data: bytes) -> bytes:
        cpu, register = self._cpu, next(one for one in REGISTERS if one.name == name)
        state = self._state(cpu)
        if read(state, register) == data:
            return b"OK"
        try:
            write(state, register, data, lambda address, size: self._memory.read(state, address, size, whole=True))
            self._set_state(cpu, state)
        except (ValueError, UsageError) as error:
            self._states.clear()
            self.machine.log.warning("gdb cannot set a register", register=name, error=str(error))
            return BAD
        return b"OK"

    def _read_memory(self, text: bytes) -> bytes:
        where = numbers(text)
        if where is None:
            return BAD
        found = self._memory.read(self._state(self._cpu), where[0], min(where[1], CUT))
        return found.hex().encode() if found or not where[1] else FAULT

    def _write_memory(self, text: bytes) -> bytes:
        head, _, body = text.partition(b":")
        return self._put(head, unhex(body))

    def _write_binary(self, text: bytes) -> bytes:
        head, _, body = text.partition(b":")
        return self._put(head, unescape(body))

    def _put(self, head: bytes, data: bytes | None) -> bytes:
        where = numbers(head)
        if where is None or data is None or len(data) != where[1]:
            return BAD
        return b"OK" if self._memory.write(self._state(self._cpu), where[0], data) else FAULT

    def _insert(self, text: bytes) -> bytes:
        return self._point(text, self._points.add)

    def _remove(self, text: bytes) -> bytes:
        return self._point(text, self._points.remove)

    def _point(self, text: bytes, act: Callable[[int, int, int], None]) -> bytes:
        kind, _, rest = text.partition(b",")
        where = numbers(rest.partition(b";")[0])
        if kind not in (b"0", b"1", b"2", b"3", b"4") or where is None:
            return b"" if kind > b"4" else BAD
        if self.machine.state is State.RUNNING:
            return BAD
        try:
            act(int(kind), where[0], where[1])
        except CardcageError as error:
            self.machine.log.warning("gdb cannot have a breakpoint", error=str(error))
            return NO_SPACE
        return b"OK"


def unhex(text: bytes) -> bytes | None:
    """Bytes in hexadecimal; None for anything else."""
    try:
        return binascii.unhexlify(text)
    except ValueError:
        return None


def numbers(text: bytes) -> tuple[int, int] | None:
    """``ADDRESS,LENGTH``, whose end is an address too; None for anything else."""
    first, _, second = text.partition(b",")
    address, length = hexadecimal(first), hexadecimal(second)
    if address is None or length is None or address + length > 1 << 64:
        return None
    return address, length
