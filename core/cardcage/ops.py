"""What guest code asks of the machine while it runs: the concrete :class:`~cardcage.vcpu.Ops`, one for all vCPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cardcage.machine import Machine

__all__ = ["MachineOps", "ObservedOps"]


class MachineOps:
    """Serves accesses under the machine's lock."""

    __slots__ = ("_lock", "_machine", "_mmio_read", "_mmio_write", "_pio_read", "_pio_write")

    def __init__(self, machine: Machine) -> None:
        self._machine, self._lock = machine, machine.lock
        self._pio_read, self._pio_write = machine.pio.read, machine.pio.write
        self._mmio_read, self._mmio_write = machine.mmio.read, machine.mmio.write

    def pio_read(self, port: int, size: int, /) -> int:
        with self._lock:
            return self._pio_read(port, size)

    def pio_write(self, port: int, size: int, value: int, /) -> None:
        with self._lock:
            self._pio_write(port, size, value)

    def mmio_read(self, address: int, size: int, /) -> int:
        with self._lock:
            return self._mmio_read(address, size)

    def mmio_write(self, address: int, size: int, value: int, /) -> None:
        with self._lock:
            self._mmio_write(address, size, value)

    def acknowledge_extint(self) -> int | None:
        with self._lock:
            return self._machine.wiring.acknowledge()

    def end_of_interrupt(self, vector: int, /) -> None:
        with self._lock:
            self._machine.wiring.end_of_interrupt(vector)


class ObservedOps(MachineOps):
    """The same, and tells the observers of ``pio`` and ``mmio``."""

    __slots__ = ()

    def pio_read(self, port: int, size: int, /) -> int:
        value = super().pio_read(port, size)
        self._machine.observers.emit("pio", port, size, value, False)
        return value

    def pio_write(self, port: int, size: int, value: int, /) -> None:
        super().pio_write(port, size, value)
        self._machine.observers.emit("pio", port, size, value, True)

    def mmio_read(self, address: int, size: int, /) -> int:
        value = super().mmio_read(address, size)
        self._machine.observers.emit("mmio", address, size, value, False)
        return value

    def mmio_write(self, address: int, size: int, value: int, /) -> None:
        super().mmio_write(address, size, value)
        self._machine.observers.emit("mmio", address, size, value, True)
