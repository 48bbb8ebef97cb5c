"""A VM whose time stands still: see :class:`cardcage.accelerator.Parkable`. It has no threads of its own.

KVM's clocks go on whatever happens, and its timers fire; so what they showed is put back at the end. A timer that fired
meanwhile is no interrupt before a vCPU runs, and is forgotten when it is set.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from cardcage_kvm import abi, state

if TYPE_CHECKING:
    from cardcage_kvm.vcpu import KvmVCpu
    from cardcage_kvm.vm import KvmVm

__all__ = ["Parking"]

U64 = (1 << 64) - 1
LVT_TIMER, CURRENT_COUNT = 0x320, 0x390
DEADLINE = 2
"""The timer's mode in bits 17 and 18 of its entry (Intel SDM vol. 3, 11.5.4): until the TSC has a value."""


class Parking:
    """The clocks of a VM, as they were when it was parked."""

    def __init__(self, vm: KvmVm) -> None:
        self._vm = vm
        self._host = self._clock = 0
        self._offsets: list[int] = []
        self._counts: list[int] = []
        self._pit: abi.PitState | None = None

    def may_park(self) -> str:
        """Nothing is in the way."""
        return ""

    def park(self) -> None:
        """TSC, kvmclock and the timers stand still from here on, and irqfds deliver nothing."""
        vm = self._vm
        vm.events.park()
        found = abi.ClockData()
        abi.ioctl(vm.fd, abi.GET_CLOCK, found)
        self._clock, self._host = found.clock, self._now()
        self._offsets = [_offset(vcpu) for vcpu in vm.vcpus]
        self._counts = [_word(state.read_lapic(vcpu.fd), CURRENT_COUNT) for vcpu in vm.vcpus if vm.irqchip != "none"]
        if vm.irqchip == "full":
            self._pit = abi.PitState()
            abi.ioctl(vm.fd, abi.GET_PIT2, self._pit)
            still = abi.PitState.from_buffer_copy(self._pit)
            still.flags |= abi.PIT_HPET_LEGACY  # KVM's word for a counter that is to interrupt nobody
            abi.ioctl(vm.fd, abi.SET_PIT2, still)

    def unpark(self) -> None:
        """The guest's time goes on where it stood; a counter of KVM's own 8254 begins its period anew."""
        vm, passed = self._vm, self._now() - self._host
        for vcpu, offset in zip(vm.vcpus, self._offsets, strict=True):
            # by its offset: KVM takes a value within a second of what it expects for an attempt to bring vCPUs in step
            _attribute(vcpu, abi.SET_DEVICE_ATTR, offset - passed & U64)
        abi.ioctl(vm.fd, abi.SET_CLOCK, abi.ClockData(clock=self._clock))
        for vcpu, count in zip(vm.vcpus, self._counts, strict=False):  # without local APICs, none
            _set_timer(vcpu, count)
        if self._pit is not None:
            abi.ioctl(vm.fd, abi.SET_PIT2, self._pit)
            self._pit = None
        vm.events.unpark()

    def _now(self) -> int:
        """The host's time-stamp counter, as KVM has it."""
        if not self._vm.vcpus:
            return 0
        vcpu = self._vm.vcpus[0]
        offset = _offset(vcpu)
        return state.read_msrs(vcpu.fd, (state.MSR_TSC,))[state.MSR_TSC] - offset & U64


def _attribute(vcpu: KvmVCpu, request: abi.Request, value: int) -> int:
    """Get or set what is between the host's time-stamp counter and the guest's."""
    kept = ctypes.c_uint64(value)
    abi.ioctl(vcpu.fd, request, abi.DeviceAttr(group=abi.TSC_CTRL, attr=abi.TSC_OFFSET, addr=ctypes.addressof(kept)))
    return kept.value


def _offset(vcpu: KvmVCpu) -> int:
    return _attribute(vcpu, abi.GET_DEVICE_ATTR, 0)


def _set_timer(vcpu: KvmVCpu, count: int) -> None:
    """Start the local APIC's timer again, with *count* left. One that had run off is as it was."""
    page = bytearray(state.read_lapic(vcpu.fd))
    if _word(page, LVT_TIMER) >> 17 & 3 == DEADLINE:
        deadline = state.read_msrs(vcpu.fd, (state.MSR_TSC_DEADLINE,)).get(state.MSR_TSC_DEADLINE)
        if deadline:
            state.write_msrs(vcpu, {state.MSR_TSC_DEADLINE: deadline})
    elif count:
        page[CURRENT_COUNT : CURRENT_COUNT + 4] = count.to_bytes(4, "little")
        abi.ioctl(vcpu.fd, abi.SET_LAPIC, abi.LapicState.from_buffer_copy(page))


def _word(page: bytes | bytearray, at: int) -> int:
    return int.from_bytes(page[at : at + 4], "little")
