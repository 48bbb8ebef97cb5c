"""Stops for a debugger: points by address, without a change of the guest's memory; see native/system/debug.c."""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING

from cardcage.errors import AcceleratorError
from cardcage.vcpu import Exit, VCpuExit

from cardcage_tcg import layout as L
from cardcage_tcg.library import Area

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cardcage_tcg.cpu.vcpu import TcgVCpu
    from cardcage_tcg.vm import TcgVm

Point = tuple[str, int, int]
MOST, LONGEST = 1024, 1 << 20
KINDS = {
    "execute": L.POINT_EXECUTE,
    "write": L.POINT_WRITE,
    "read": L.POINT_READ,
    "access": L.POINT_READ | L.POINT_WRITE,
}


class DebugStops:
    """The points of a VM, and what each vCPU stopped at."""

    def __init__(self, vm: TcgVm) -> None:
        self._vm = vm
        self._points: tuple[Point, ...] = ()
        self._stops: dict[int, Point | None] = {}
        self._table: Area | None = None

    def set_points(self, points: Sequence[Point]) -> None:
        """See :class:`cardcage.accelerator.GuestDebug`."""
        vm = self._vm
        if len(points) > MOST:
            raise AcceleratorError(f"tcg: {len(points)} breakpoints and watchpoints; expected at most {MOST}")
        for kind, address, size in points:
            if not 0 < size <= LONGEST or address + size > 1 << 64:
                raise AcceleratorError(f"tcg: {kind} {size} bytes at {address:#x}: expected 1 to {LONGEST}")
        new = self._made(points) if points else None
        with vm.quiesce():
            vm.set_word(L.VM_POINTS, new.address if new is not None else 0)
            for cpu in vm.cpus:
                vm.native.points_changed(cpu.pointer)
            vm.native.unlink_pages(vm.pointer)
        old, self._table, self._points = self._table, new, tuple(points)
        if old is not None:
            old.close()

    def _made(self, points: Sequence[Point]) -> Area:
        """``struct points``."""
        table = Area(L.SIZEOF_POINTS + L.SIZEOF_POINT * len(points))
        watches = sum(kind != "execute" for kind, _, _ in points)
        struct.pack_into("<QQ", table.view, 0, len(points), watches)
        for at, (kind, address, size) in enumerate(points):
            bits = KINDS[kind]
            where = L.SIZEOF_POINTS + L.SIZEOF_POINT * at
            struct.pack_into("<QQII", table.view, where, address, 1 if kind == "execute" else size, bits, 0)
        return table

    def set_how(self, cpu: int, how: str) -> None:
        """Run, step or hold."""
        self._stops.pop(cpu, None)
        for vcpu in self._vm.cpus:
            if vcpu.index == cpu:
                vcpu.held = threading.Event() if how == "hold" else None
                vcpu.halves[L.STEPPING // 4] = how == "step"
                vcpu.halves[L.POLL // 4] = 1  # interrupts that waited
                self._vm.native.update_mode(vcpu.pointer)

    def stop_of(self, cpu: int) -> Point | None:
        """The point that it stopped at."""
        return self._stops.get(cpu)

    def stopped(self, vcpu: TcgVCpu) -> VCpuExit:
        """It stopped: note where."""
        met = vcpu.halves[L.STOP // 4] == L.STOP_POINT
        at = vcpu.halves[L.STOPPED_AT // 4] - 1
        vcpu.halves[L.STOP // 4] = 0
        self._stops[vcpu.index] = self._points[at] if met and 0 <= at < len(self._points) else None
        return VCpuExit(Exit.DEBUG, f"at {vcpu.registers.rip:#x}")

    def close(self) -> None:
        """Give the table back."""
        if self._table is not None:
            self._table.close()
            self._table = None
