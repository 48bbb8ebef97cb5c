"""A virtio function on a machine's PCI bus, driven as a guest's driver would, without guest code."""

from __future__ import annotations

import time
from typing import Any

from cardcage_virtio.testing import Driver

WINDOW = 0x100_0000


class Function:
    """A PCI function of a machine, found by its device id."""

    def __init__(self, vm: Any, device: int, *, enable: bool = True) -> None:
        self.vm = vm
        self.slot = next(slot for slot in range(32) if self.config(0, slot=slot) == device << 16 | 0x1AF4)
        if enable:
            self.set_config(4, 6)
        self.bar = self.config(0x20) & ~15

    def config(self, offset: int, *, slot: int | None = None) -> int:
        slot = self.slot if slot is None else slot
        with self.vm.lock:
            self.vm.pio.write(0xCF8, 4, 1 << 31 | slot << 11 | offset)
            found: int = self.vm.pio.read(0xCFC, 4)
        return found

    def set_config(self, offset: int, value: int) -> None:
        with self.vm.lock:
            self.vm.pio.write(0xCF8, 4, 1 << 31 | self.slot << 11 | offset)
            self.vm.pio.write(0xCFC, 4, value)

    def write(self, offset: int, size: int, value: int) -> None:
        with self.vm.lock:
            self.vm.mmio.write(self.bar + offset, size, value)

    def read(self, offset: int, size: int) -> int:
        with self.vm.lock:
            found: int = self.vm.mmio.read(self.bar + offset, size)
        return found

    def start(self, queues: int, window: int = WINDOW) -> list[Driver]:
        self.write(0x14, 1, 3)
        for half in (0, 1):
            self.write(0x00, 4, half)
            self.write(0x08, 4, half)
            self.write(0x0C, 4, self.read(0x04, 4))
        self.write(0x14, 1, 11)
        drivers = []
        for index in range(queues):
            driver = Driver(self.vm.memory, window + index * (1 << 20), 16)
            self.write(0x16, 2, index)
            self.write(0x18, 2, 16)
            for offset, address in ((0x20, driver.table), (0x28, driver.driver), (0x30, driver.device)):
                self.write(offset, 8, address)
            self.write(0x1C, 2, 1)
            drivers.append(driver)
        self.write(0x14, 1, 15)
        assert self.read(0x14, 1) == 15
        return drivers

    def call(self, driver: Driver, index: int, readable: list[bytes], writable: list[int]) -> bytes:
        driver.add(readable, writable)
        self.write(0x3000 + 4 * index, 2, index)
        end = time.monotonic() + 10
        while time.monotonic() < end:
            found = driver.used()
            if found:
                return found[0][1]
            self.vm.loop.call_soon(lambda: None)
        raise TimeoutError
