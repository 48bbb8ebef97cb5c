"""Stops for a debugger: KVM_SET_GUEST_DEBUG, with the processor's own debug registers, which the guest does not see.

While points are set, the guest's own debug registers have no effect, as under QEMU (KVM API, 4.87).
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from cardcage.errors import AcceleratorError

from cardcage_kvm import abi

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cardcage_kvm.vcpu import KvmVCpu
    from cardcage_kvm.vm import KvmVm

Point = tuple[str, int, int]
REGISTERS = 4
TYPES = {"execute": 0, "write": 1, "read": 3, "access": 3}
"""DR7's R/W field; the processor has no breakpoint on reads alone."""
LENGTHS = {1: 0, 2: 1, 4: 3, 8: 2}
STEP, HITS = 1 << 14, 15
"""Bits of DR6."""


def split(point: Point) -> list[Point]:
    """*point* in aligned pieces of 1, 2, 4 or 8 bytes."""
    kind, address, size = point
    if kind == "execute":
        return [(kind, address, 1)]
    found, end = [], address + size
    while address < end:
        piece = next(one for one in (8, 4, 2, 1) if address % one == 0 and one <= end - address)
        found.append((kind, address, piece))
        address += piece
    return found


class DebugStops:
    """The points of a VM, and what each vCPU does between its stops."""

    def __init__(self, vm: KvmVm) -> None:
        self._vm = vm
        self._points: list[tuple[Point, Point]] = []  # what was asked for, and a piece of it
        self._how: dict[int, str] = {}
        self._stops: dict[int, Point | None] = {}
        self._blocks_interrupts = 0

    def usable(self) -> bool:
        """True when this KVM has it."""
        supported = abi.ioctl(self._vm.fd, abi.CHECK_EXTENSION, int(abi.Cap.SET_GUEST_DEBUG2))
        self._blocks_interrupts = supported & abi.GUESTDBG_BLOCKIRQ
        return bool(abi.ioctl(self._vm.fd, abi.CHECK_EXTENSION, int(abi.Cap.SET_GUEST_DEBUG)))

    def set_points(self, points: Sequence[Point]) -> None:
        """See :class:`cardcage.accelerator.GuestDebug`."""
        pieces = [(point, piece) for point in points for piece in split(point)]
        if len(pieces) > REGISTERS:
            raise AcceleratorError(
                f"kvm: {len(pieces)} breakpoints and watchpoints (of 8 aligned bytes); the processor has {REGISTERS}"
            )
        if self._vm.emulated() and any(kind != "execute" for kind, _, _ in points):
            raise AcceleratorError("kvm: this host's KVM emulates instructions, and knows no watchpoints; tcg does")
        self._points = pieces
        self.renew()

    def set_how(self, cpu: int, how: str) -> None:
        """Run, step or hold."""
        self._how[cpu] = how
        self._stops.pop(cpu, None)
        for vcpu in self._vm.vcpus:
            if vcpu.index == cpu:
                vcpu.held = threading.Event() if how == "hold" else None
                self._apply(vcpu)

    def stop_of(self, cpu: int) -> Point | None:
        """The point that it stopped at."""
        return self._stops.get(cpu)

    def renew(self) -> None:
        """KVM has made the vCPUs anew."""
        for vcpu in self._vm.vcpus:
            self._apply(vcpu)

    def _apply(self, vcpu: KvmVCpu, extra: int = 0) -> None:
        request = abi.GuestDebug(control=extra)
        if self._points:
            request.control |= abi.GUESTDBG_ENABLE | abi.GUESTDBG_USE_HW_BP
            request.debugreg[7] = 0x600
            for at, (_, (kind, address, size)) in enumerate(self._points):
                request.debugreg[at] = address
                request.debugreg[7] |= 2 << 2 * at | TYPES[kind] << 16 + 4 * at | LENGTHS[size] << 18 + 4 * at
        if self._how.get(vcpu.index) == "step":
            request.control |= abi.GUESTDBG_ENABLE | abi.GUESTDBG_SINGLESTEP | self._blocks_interrupts
        abi.ioctl(vcpu.fd, abi.SET_GUEST_DEBUG, request)

    def stopped(self, vcpu: KvmVCpu, status: int) -> bool:
        """The vCPU met #DB with DR6 *status*: whether that is a stop. The guest's own is given to it."""
        met = [point for at, (point, _) in enumerate(self._points) if status >> at & 1]
        if met or self._how.get(vcpu.index) == "step":
            self._stops[vcpu.index] = met[0] if met else None
            return True
        own = abi.DebugRegs()
        abi.ioctl(vcpu.fd, abi.GET_DEBUGREGS, own)
        own.dr6 = own.dr6 & ~HITS | status
        abi.ioctl(vcpu.fd, abi.SET_DEBUGREGS, own)
        self._apply(vcpu, abi.GUESTDBG_INJECT_DB | abi.GUESTDBG_ENABLE)
        return False
