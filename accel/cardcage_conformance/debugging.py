"""``check_guest_debug``: what an accelerator with the capability ``guest-debug`` does for a debugger.

In a test of an accelerator::

    def test_debugging():
        reason = check_guest_debug(MyAccelerator())
        if reason:
            pytest.skip(reason)
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from cardcage.accelerator import VmSpec, check_vm
from cardcage.errors import AcceleratorError
from cardcage.memory import PhysicalMemory, RamBlock, RamRange
from cardcage.vcpu import Exit
from cardcage.x86 import Segment

if TYPE_CHECKING:
    from cardcage.accelerator import Accelerator

__all__ = ["Debugged", "check_guest_debug"]

START = 0x1000
CODE = bytes.fromhex("b80100 40 a30020 8b1e0020 ff060020 40 cd20 ebef")
"""16-bit: AX = 1; for ever INC AX; [0x2000] = AX; BX = [0x2000]; INC word [0x2000]; INC AX; INT 20h, an IRET at 0x1080;
and back."""
INC, STORE, LOAD, BOTH, AGAIN, CALL, JUMP, HANDLER = 0x1003, 0x1004, 0x1007, 0x100B, 0x100F, 0x1010, 0x1012, 0x1080
LOOP = [INC, STORE, LOAD, BOTH, AGAIN, CALL, HANDLER, JUMP]
LIMIT = 20.0


class _NoDevices:
    """The program touches none."""

    def pio_read(self, port: int, size: int, /) -> int:
        return 0

    def pio_write(self, port: int, size: int, value: int, /) -> None: ...

    def mmio_read(self, address: int, size: int, /) -> int:
        return 0

    def mmio_write(self, address: int, size: int, value: int, /) -> None: ...

    def acknowledge_extint(self) -> int | None:
        return None

    def end_of_interrupt(self, vector: int, /) -> None: ...


class Debugged:
    """The program on a processor of its own."""

    def __init__(self, accelerator: Accelerator) -> None:
        vm: Any = accelerator.create_vm(VmSpec(irqchip="split"))
        self.vm, self.debug = check_vm(vm, accelerator.name), vm
        self.memory, self._block = PhysicalMemory(), RamBlock(1 << 16, "debugged")
        self.memory.add(RamRange(0, 1 << 16, self._block))
        self.memory.attach(self.vm)
        self.memory.report_to(self.vm)
        self.memory.write(START, CODE)
        self.memory.write(HANDLER, b"\xcf")
        self.memory.write(0x80, HANDLER.to_bytes(4, "little"))
        self.vcpu = self.vm.create_vcpu(0)
        state = self.vcpu.get_state()
        state.registers.rip, state.registers.rsp = START, 0x8000
        state.system.cs = Segment(type=11)
        self.vcpu.set_state(state)

    def go(self, expected: Exit = Exit.DEBUG, *, kick: float = LIMIT) -> int:
        """Run until the next stop, which is of a kind; returns where."""
        late: list[bool] = []

        def end() -> None:
            late.append(True)
            self.vcpu.kick()

        timer = threading.Timer(kick, end)
        timer.start()
        try:
            leave = self.vcpu.run(_NoDevices())
            while leave.reason is Exit.KICKED and not late:  # a kick that came before is for the next run
                leave = self.vcpu.run(_NoDevices())
        finally:
            timer.cancel()
            timer.join()
        assert leave.reason is expected, f"it came out with {leave.reason.value}: {leave.detail}"
        found: int = self.vcpu.get_state().registers.rip
        return found

    def step(self, times: int) -> list[int]:
        """Where it is after each step."""
        self.debug.set_stepping(0, "step")
        found = []
        for _ in range(times):
            found.append(self.go())
            assert self.debug.debug_stop(0) is None, "a step told of a breakpoint"
        self.debug.set_stepping(0, "run")
        return found

    def close(self) -> None:
        self.vm.close()
        self.memory.close()


def check_guest_debug(accelerator: Accelerator) -> str:
    """Check steps, breakpoints, watchpoints and holding. Returns what had to be skipped, or an empty string.

    Raises AssertionError for what is wrong. An accelerator may refuse watchpoints by AcceleratorError.
    """
    one = Debugged(accelerator)
    try:
        if "guest-debug" not in one.vm.capabilities:
            return f"{accelerator.name} has no guest-debug"
        _steps(one)
        _breakpoints(one)
        _holds(one)
        return _watchpoints(one)
    finally:
        one.close()


def _steps(one: Debugged) -> None:
    assert one.step(17) == [*LOOP, *LOOP, INC], "steps go elsewhere"
    flags = one.vcpu.get_state()
    assert not flags.registers.rflags & 0x100, "the guest's trap flag is set"
    assert flags.debug[5] == 0x400, "the guest's DR7 changed"


def _breakpoints(one: Debugged) -> None:
    points = [("execute", LOAD, 1), ("execute", AGAIN, 1)]
    one.debug.set_breakpoints(points)
    for point in points * 2:
        assert (one.go(), one.debug.debug_stop(0)) == (point[1], point)
        assert one.go() == point[1], "a breakpoint that was not removed let its instruction pass"
        one.debug.set_breakpoints([])
        one.step(1)
        one.debug.set_breakpoints(points)
    assert one.memory.read(START, len(CODE)) == CODE, "breakpoints show in memory"
    one.debug.set_breakpoints([])
    one.go(Exit.KICKED, kick=0.05)


def _holds(one: Debugged) -> None:
    before = one.vcpu.get_state().registers
    one.debug.set_stepping(0, "hold")
    one.go(Exit.KICKED, kick=0.05)
    one.go(Exit.KICKED, kick=0.05)
    assert one.vcpu.get_state().registers == before, "a processor that is held went on"
    one.debug.set_stepping(0, "run")


def _watchpoints(one: Debugged) -> str:
    try:
        one.debug.set_breakpoints([("write", 0x2000, 2)])
    except AcceleratorError as error:
        return str(error)
    stops = {"write": {LOAD, AGAIN}, "access": {LOAD, BOTH, AGAIN}}
    for kind, places in stops.items():
        one.debug.set_breakpoints([(kind, 0x2001, 1)])
        one.step(1)
        found = {one.go() for _ in range(2 * len(places))}
        assert found == places, f"{kind}: {sorted(found)}"
        assert one.debug.debug_stop(0) == (kind, 0x2001, 1)
    one.debug.set_breakpoints([("read", 0x2001, 1)])  # one that tells of writes too says more than it has to
    found = {one.go() for _ in range(6)}
    assert {BOTH, AGAIN} <= found, f"read: {sorted(found)}"
    one.debug.set_breakpoints([])
    return ""
