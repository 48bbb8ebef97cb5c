"""Stops for a debugger on each accelerator, by the contract that strangers' accelerators have."""

from __future__ import annotations

import pytest
from cardcage.accelerator import VmSpec
from cardcage.errors import AcceleratorError
from cardcage.host import Host
from cardcage.registry import AcceleratorOffer
from cardcage_conformance.debugging import check_guest_debug
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
