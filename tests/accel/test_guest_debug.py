"""Stops for a debugger on each accelerator, by the contract that strangers' accelerators have."""

from __future__ import annotations

import pytest
from cardcage.accelerator import VmSpec
from cardcage.errors import AcceleratorError
from cardcage.host import Host
from cardcage.registry import AcceleratorOffer
from cardcage.vcpu import Exit
from cardcage_conformance.debugging import Debugged, check_guest_debug
from cardcage_tcg.accel import Tcg

pytestmark = pytest.mark.once


def test_guest_debug(accel: str) -> None:
    """Steps, breakpoints by address, watchpoints where there are any, and holding; the guest sees nothing of them."""
    reason = check_guest_debug(Host().registry.get(AcceleratorOffer, accel).load()())
    assert not reason or "emulates instructions" in reason


def test_points_that_the_translator_refuses() -> None:
    """Too many points, and sizes that wrap or are none, are refused, and those that were there stay."""
    vm = Tcg().create_vm(VmSpec())
    try:
        vm.create_vcpu(0)
        vm.set_breakpoints([("execute", 0x1000, 1)])
        for wrong in ([("execute", at, 1) for at in range(1025)], [("write", 1, 0)], [("read", (1 << 64) - 1, 2)]):
            with pytest.raises(AcceleratorError, match="expected"):
                vm.set_breakpoints(wrong)
        vm.set_breakpoints([("write", (1 << 64) - 8, 8), ("access", 0x1FF8, 0x2010)])
        vm.set_breakpoints([])
    finally:
        vm.close()


CODE = {
    0x1000: "ff160020 40 ebf9",  # CALL [0x2000]; INC AX; and again
    0x2000: "0030",
    0x3000: "e9fb0f",  # JMP 0x3ffe
    0x3FFE: "bb3412 b90400 be0050 bf0060 f3a4 c3",  # MOV BX, 0x1234, over two pages; ...; REP MOVSB at 0x400a; RET
}


def test_points_are_met_in_code_that_is_hot() -> None:
    """Blocks that were joined before, from page to page and by indirect calls, stop at new breakpoints, wherever those
    lie; a repeated string instruction meets its breakpoint once, and a watchpoint between its iterations."""
    one = Debugged(Tcg())
    try:
        for address, code in CODE.items():
            one.memory.write(address, bytes.fromhex(code))
        one.go(Exit.KICKED, kick=0.05)
        for place in (0x1004, 0x3000, 0x3FFE, 0x4001, 0x400C, 0x1005):
            one.debug.set_breakpoints([("execute", place, 1), ("execute", place + 1, 1)])
            here = one.vcpu.get_state().registers.rip  # at one of the two by chance: then the other may be met first
            assert one.go() in ((place, place + 1) if here in (place, place + 1) else (place,))
            one.debug.set_breakpoints([])
            one.go(Exit.KICKED, kick=0.02)
        one.debug.set_breakpoints([("execute", 0x400A, 1), ("execute", 0x400C, 1)])
        while one.go() != 0x400A:
            one.debug.set_breakpoints([])
            one.step(1)
            one.debug.set_breakpoints([("execute", 0x400A, 1), ("execute", 0x400C, 1)])
        one.debug.set_breakpoints([])
        assert one.step(2) == [0x400A, 0x400A]
        one.debug.set_breakpoints([("execute", 0x400A, 1), ("execute", 0x400C, 1)])
        assert one.go() == 0x400C
        one.debug.set_breakpoints([("write", 0x6002, 1)])
        assert one.go() == 0x400A
        assert one.vcpu.get_state().registers.rcx & 0xFFFF == 1
        one.debug.set_breakpoints([("read", 0x5003, 1)])
        assert one.go() == 0x400C
        one.debug.set_breakpoints([("write", 0x7FFE, 2)])  # what CALL pushes
        assert one.go() == 0x3000
        assert one.debug.debug_stop(0) == ("write", 0x7FFE, 2)
    finally:
        one.close()
