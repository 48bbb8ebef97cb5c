"""The interrupt controllers and the timer in the kernel (irqchip ``full``), as they outlive their VM."""

from __future__ import annotations

from ctypes import sizeof
from typing import TYPE_CHECKING

from cardcage.errors import AcceleratorError, UsageError

from cardcage_kvm import abi

if TYPE_CHECKING:
    from cardcage_kvm.vm import KvmVm

__all__ = ["load", "save"]

CHIPS = (abi.IRQCHIP_PIC_MASTER, abi.IRQCHIP_PIC_SLAVE, abi.IRQCHIP_IOAPIC)
SIZE = len(CHIPS) * sizeof(abi.Irqchip) + sizeof(abi.PitState)


def save(vm: KvmVm) -> bytes:
    """Both 8259s, the IOAPIC and the 8254; empty where they are not KVM's."""
    if vm.irqchip != "full":
        return b""
    found = [abi.Irqchip(chip_id=one) for one in CHIPS]
    for chip in found:
        abi.ioctl(vm.fd, abi.GET_IRQCHIP, chip)
    pit = abi.PitState()
    abi.ioctl(vm.fd, abi.GET_PIT2, pit)
    return b"".join(map(bytes, (*found, pit)))


def load(vm: KvmVm, data: bytes) -> None:
    """Put :func:`save`'s back. Raises :exc:`~cardcage.errors.UsageError` for what they cannot hold."""
    if len(data) != (SIZE if vm.irqchip == "full" else 0):
        raise UsageError(f"{len(data)} bytes of KVM's interrupt controllers, with irqchip {vm.irqchip}")
    try:
        for at, one in enumerate(CHIPS if data else ()):
            chip = abi.Irqchip.from_buffer_copy(data, at * sizeof(abi.Irqchip))
            if chip.chip_id != one:
                raise UsageError(f"interrupt controller {chip.chip_id}: expected {one}")
            abi.ioctl(vm.fd, abi.SET_IRQCHIP, chip)
        if data:
            abi.ioctl(vm.fd, abi.SET_PIT2, abi.PitState.from_buffer_copy(data, SIZE - sizeof(abi.PitState)))
    except AcceleratorError as error:
        raise UsageError(f"KVM's interrupt controllers cannot hold this state: {error}") from error
