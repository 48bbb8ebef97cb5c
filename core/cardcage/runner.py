"""A vCPU's thread: through the gate, run, and what each exit means."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.errors import AcceleratorError
from cardcage.vcpu import Exit

if TYPE_CHECKING:
    from cardcage.machine import Machine
    from cardcage.vcpu import VCpu

__all__ = ["run_vcpu"]


def run_vcpu(machine: Machine, vcpu: VCpu) -> None:
    """The body of a vCPU's thread; returns once the machine has ended."""
    gate, observers, index = machine.gate, machine.observers, vcpu.index
    halted, wakes = False, 0
    try:
        while gate.enter(index):
            if halted and not gate.halt(wakes, lambda: machine.wiring.extint_level):
                continue  # paused or ended while in HLT, where it stays
            halted, wakes = False, gate.wakes
            leave = vcpu.run(machine.ops)
            observers.emit("exit", index, leave)
            reason = leave.reason
            if reason is Exit.KICKED:
                continue
            if reason is Exit.HALTED:
                halted = True
            elif reason is Exit.SHUTDOWN:
                machine.crash(index, leave.detail)
            elif reason is Exit.RESET:
                machine.request_reset("the processor asked")
            elif reason is Exit.DEBUG:
                machine.debug_stop(index)
            else:
                raise AcceleratorError(leave.detail or f"cpu {index}: the accelerator cannot go on")
    except BaseException as error:  # whatever a card or the accelerator raised stops the machine; wait() raises it
        machine.fail(error)
    finally:
        gate.leave(index)
