"""A vCPU's thread: through the gate, run, and what each exit means."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.errors import AcceleratorError
from cardcage.vcpu import Exit

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage._machine.life import Life
    from cardcage._machine.observers import Observers
    from cardcage._machine.wiring import Wiring
    from cardcage.vcpu import Ops, VCpu


def run_vcpu(life: Life, wiring: Wiring, ops: Callable[[], Ops], observers: Observers, vcpu: VCpu) -> None:
    """The body of a vCPU's thread, whose accesses *ops()* serves now; returns once the machine has ended."""
    gate, index = life.gate, vcpu.index
    halted, wakes = index in gate.halts, gate.halts.pop(index, 0)
    try:
        while gate.enter(index):
            if halted and not gate.halt(wakes, lambda: wiring.extint_level):
                continue  # paused or ended while in HLT, where it stays
            halted, wakes = False, gate.wakes
            leave = vcpu.run(ops())
            observers.emit("exit", index, leave)
            reason = leave.reason
            if reason is Exit.KICKED:
                continue
            if reason is Exit.HALTED:
                halted = True
            elif reason is Exit.SHUTDOWN:
                life.crash(index, leave.detail)
            elif reason is Exit.RESET:
                life.request_reset("the processor asked")
            elif reason is Exit.DEBUG:
                gate.leave(index)  # nobody has to wait for it
                life.debug_stop(index)
            else:
                raise AcceleratorError(leave.detail or f"cpu {index}: the accelerator cannot go on")
    except BaseException as error:  # whatever a card or the accelerator raised stops the machine; wait() raises it
        life.fail(error)
    finally:
        if halted:
            gate.halts[index] = wakes
        gate.leave(index)
