"""What guest code asks of the machine while it runs: the concrete :class:`~cardcage.vcpu.Ops`, one for all vCPUs.

This is the hottest path that is Python. Measured on 3.11: ``with lock`` costs 0.22 µs, ``acquire`` and ``release`` by
bound methods 0.09 µs; closures spare an attribute look-up each. So the four accesses are closures, made once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage._machine.bus import MASKS
from cardcage._machine.faults import SPARED

if TYPE_CHECKING:
    from collections.abc import Callable
    from threading import RLock

    from cardcage._machine.bus import Bus
    from cardcage._machine.faults import Faults
    from cardcage._machine.wiring import Wiring


class MachineOps:
    """Serves accesses under the machine's lock.

    ``pio_read(port, size)``, ``pio_write(port, size, value)``, ``mmio_read``, ``mmio_write``: see the protocol.
    """

    def __init__(self, lock: RLock, pio: Bus, mmio: Bus, wiring: Wiring, faults: Faults) -> None:
        self._lock, self._wiring = lock, wiring
        acquire, release = lock.acquire, lock.release
        self.pio_read = reader(acquire, release, pio, faults)
        self.pio_write = writer(acquire, release, pio, faults)
        self.mmio_read = reader(acquire, release, mmio, faults)
        self.mmio_write = writer(acquire, release, mmio, faults)
        self._faults = faults

    def acknowledge_extint(self) -> int | None:
        with self._lock:
            try:
                return self._wiring.acknowledge()
            except SPARED as error:
                self._faults.spare(error)
                return None

    def end_of_interrupt(self, vector: int, /) -> None:
        with self._lock:
            try:
                self._wiring.end_of_interrupt(vector)
            except SPARED as error:
                self._faults.spare(error)


def reader(
    acquire: Callable[[], bool], release: Callable[[], None], bus: Bus, faults: Faults
) -> Callable[[int, int], int]:
    """Reads of *bus* under a lock. What a device was denied, or made to raise, is no reason to stop: open bus."""
    read = bus.read

    def locked(address: int, size: int, /) -> int:
        acquire()
        try:
            return read(address, size)
        except SPARED as error:
            faults.spare(error, bus.owner(address))
            return MASKS[size]
        finally:
            release()

    return locked


def writer(
    acquire: Callable[[], bool], release: Callable[[], None], bus: Bus, faults: Faults
) -> Callable[[int, int, int], None]:
    """Writes to *bus* under a lock; see :func:`reader`."""
    write = bus.write

    def locked(address: int, size: int, value: int, /) -> None:
        acquire()
        try:
            write(address, size, value)
        except SPARED as error:
            faults.spare(error, bus.owner(address))
        finally:
            release()

    return locked


class ObservedOps(MachineOps):
    """The same, and tells the observers of ``pio`` and ``mmio`` by *emit*."""

    def __init__(
        self, lock: RLock, pio: Bus, mmio: Bus, wiring: Wiring, faults: Faults, emit: Callable[..., None]
    ) -> None:
        super().__init__(lock, pio, mmio, wiring, faults)
        self.pio_read = observed_reader("pio", self.pio_read, emit)
        self.pio_write = observed_writer("pio", self.pio_write, emit)
        self.mmio_read = observed_reader("mmio", self.mmio_read, emit)
        self.mmio_write = observed_writer("mmio", self.mmio_write, emit)


def observed_reader(
    event: str, read: Callable[[int, int], int], emit: Callable[..., None]
) -> Callable[[int, int], int]:
    """*read*, told to observers of *event*."""

    def observed(address: int, size: int, /) -> int:
        value = read(address, size)
        emit(event, address, size, value, False)
        return value

    return observed


def observed_writer(
    event: str, write: Callable[[int, int, int], None], emit: Callable[..., None]
) -> Callable[[int, int, int], None]:
    """*write*, told to observers of *event*."""

    def observed(address: int, size: int, value: int, /) -> None:
        write(address, size, value)
        emit(event, address, size, value, True)

    return observed
