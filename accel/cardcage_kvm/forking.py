"""A VM in a forked process. KVM's belongs to the memory of the process that made it: the child makes another of the
same, on what it has of the RAM. ``/dev/kvm`` itself is nobody's, and need not be opened anew."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage_kvm import abi, chips, state

if TYPE_CHECKING:
    from cardcage.x86 import VCpuState

    from cardcage_kvm.vm import KvmVm

__all__ = ["Forking"]


class Forking:
    """A :class:`~cardcage_kvm.vm.KvmVm` in two processes. It is parked in all of this."""

    def __init__(self, vm: KvmVm) -> None:
        self._vm = vm
        self._states: list[tuple[VCpuState, abi.VcpuEvents]] = []
        self._chips = b""

    def may_fork(self) -> str:
        """Why it cannot be in a forked process as well, empty when it can."""
        return "eventfds of the host are joined to it" if self._vm.events.joined else ""

    def before_fork(self) -> None:
        """The process is about to fork: take what KVM keeps of the guest into its memory."""
        vm = self._vm
        vm.dirty.keep()
        self._states = [(vcpu.get_state(), state.read_events(vcpu.fd)) for vcpu in vm.vcpus]
        self._chips = chips.save(vm)

    def after_fork(self, *, child: bool) -> None:
        """It has forked."""
        if child:
            self._renew()
        self._states, self._chips = [], b""

    def _renew(self) -> None:
        """Another VM in place of the parent's, in the same state; what its clocks show is put right by unparking it."""
        vm = self._vm
        vm.forget()
        vm.open()
        for vcpu in vm.vcpus:
            vcpu.open()
            vm.prepare(vcpu)
        chips.load(vm, self._chips)
        for vcpu, (saved, events) in zip(vm.vcpus, self._states, strict=True):
            vcpu.set_state(saved)
            abi.ioctl(vcpu.fd, abi.SET_VCPU_EVENTS, events)
        vm.debug.renew()
