"""Functions of the PIIX3 and PIIX4 that firmware looks for: the ISA bridge and power management.

OVMF finds COM1 behind the ISA bridge; in the power management function, firmware says where the ACPI registers answer:
OVMF at 0xB000, SeaBIOS at 0x600. Both are there when a machine boots firmware. Interrupt routing is kept for who reads
it again, and changes nothing: links lead where the host bridge's option ``pirqs`` says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from cardcage.errors import ConfigError, Denied
from cardcage.values import define

from cardcage_pc.acpi.pm import SCI

if TYPE_CHECKING:
    from cardcage.device import Slot

__all__ = ["IsaBridge", "PowerManagement", "PowerManagementState"]

ROUTES, PM_BASE, PM_MISC = 0x60, 0x40, 0x80
APMC = 0x5B
"""Bit 1: port 0xB2 raises an SMI. It reads as set, as in QEMU without SMM: SeaBIOS takes it that SMM is in use already,
and does not wait for an SMI that never comes."""
OURS = {"subsystem_vendor": 0x1AF4, "subsystem": 0x1100}


class IsaBridge:
    """82371SB (PIIX3), function 0, at 01.0."""

    def __init__(self) -> None:
        self.pci: dict[str, Any] = {
            "vendor": 0x8086,
            "device": 0x7000,
            "class_code": 0x060100,
            **OURS,
            "multifunction": True,
            "config": {ROUTES: b"\x80" * 4},
            "writable": {ROUTES: b"\x8f" * 4},
        }

    def read(self, offset: int, size: int, /) -> int:
        return 0

    def write(self, offset: int, size: int, value: int, /) -> None:
        """No BARs."""


@define
class PowerManagementState:
    """Where the registers answer; None while they are off."""

    version: ClassVar[int] = 1
    base: int | None = None


class PowerManagement(IsaBridge):
    """82371AB (PIIX4), function 3, at 01.3: moves the registers of ``acpi-pm``, which are off after a reset."""

    def __init__(self) -> None:
        self.pci = {
            "vendor": 0x8086,
            "device": 0x7113,
            "class_code": 0x068000,
            "revision": 3,
            **OURS,
            "config": {0x3C: bytes((SCI, 1)), PM_BASE: b"\1", APMC: b"\2"},
            "writable": {PM_BASE: b"\xc0\xff", PM_MISC: b"\1"},
        }

    def plug(self, slot: Slot, /) -> None:
        self._board, self._log = slot.board, slot.log
        self._move(None)

    def plug_pci(self, function: Any) -> None:
        self._config = function.config

    def config_written(self, offset: int, size: int) -> None:
        """The base, or whether there is one, may have changed."""
        if offset <= PM_MISC < offset + size or offset < PM_BASE + 2 <= offset + size or offset == PM_BASE:
            base = int.from_bytes(self._config[PM_BASE : PM_BASE + 2], "little") & 0xFFC0
            self._move(base if base and self._config[PM_MISC] & 1 else None)

    def _move(self, base: int | None) -> None:
        self._base = base
        for one in self._board.devices.values():
            if one.type == "acpi-pm":
                try:
                    one.slot.ranges.mappings[0].move(base)
                except (ConfigError, Denied) as error:
                    self._log.warning("ACPI registers stay where they are", wanted=base, why=str(error))

    def reset(self) -> None:
        self._move(None)

    def save(self) -> PowerManagementState:
        return PowerManagementState(self._base)

    def load(self, state: PowerManagementState, /) -> None:
        self._move(state.base)
