"""The translator with SMAP and protection keys switched on."""

from __future__ import annotations

import struct

import pytest
from attrs import evolve
from cardcage.accelerator import Probe, VmSpec
from cardcage_conformance.accelerator import check_program, programs
from cardcage_conformance.conformance import Program
from cardcage_tcg.accel import Tcg
from cardcage_tcg.vm import TcgVm


class _Protected:
    """The translator, with SMAP and PKU asked for whatever a program asks."""

    name = "tcg"

    def probe(self) -> Probe:
        return Tcg().probe()

    def create_vm(self, spec: VmSpec, /) -> TcgVm:
        return Tcg().create_vm(evolve(spec, features={**spec.features, "smap": True, "pku": True}))


NAMES = (
    *("smep-smap", "smap-follows-ac", "smap-and-syscall", "protection-keys", "protection-keys-in-xsave"),
    *("xsave-xrstor", "avx-across-exits", "user-mode-fault", "interrupt-from-user", "syscall-sysret", "page-crossing"),
    *("device-not-available", "fxsave-fxrstor", "state-round-trip"),
)


@pytest.mark.parametrize("program", programs(*NAMES), ids=str)
def test_programs_with_protection(program: Program) -> None:
    """SMAP and protection keys do what the manual says, and nothing to those who do not use them."""
    reason = check_program(_Protected(), program)
    if reason and "AVX" in reason:
        pytest.skip(reason)
    assert not reason


def test_keys_are_part_of_the_state() -> None:
    """PKRU is in the state's XSAVE image, as component 9, and comes back from it."""
    vm = _Protected().create_vm(VmSpec(cpus=1, irqchip="none", cpu="max"))
    try:
        cpu = vm.create_vcpu(0)
        state = cpu.get_state()
        assert (len(state.fpu.xsave), state.fpu.xsave[832:840]) == (840, bytes(8))
        image = bytearray(state.fpu.xsave)
        image[832:836], image[513] = struct.pack("<I", 0x55555554), 2
        state.fpu.xsave, state.fpu.xcr0 = bytes(image), 0x207
        cpu.set_state(state)
        again = cpu.get_state().fpu
        assert (again.xcr0, again.xsave[832:840]) == (0x207, struct.pack("<Q", 0x55555554))
        image[513] = 0
        state.fpu.xsave = bytes(image)
        cpu.set_state(state)
        assert cpu.get_state().fpu.xsave[832:840] == bytes(8)
    finally:
        vm.close()
