"""The translator with AVX switched on."""

from __future__ import annotations

import pytest
from attrs import evolve
from cardcage.accelerator import Probe, VmSpec
from cardcage.testing.accelerator import check_program, programs
from cardcage.testing.conformance import Program
from cardcage_tcg.accel import Tcg
from cardcage_tcg.vm import TcgVm


class _Wide:
    """The translator, with AVX asked for whatever a program asks."""

    name = "tcg"

    def probe(self) -> Probe:
        return Tcg().probe()

    def create_vm(self, spec: VmSpec, /) -> TcgVm:
        return Tcg().create_vm(evolve(spec, features={**spec.features, "avx": True, "avx2": True}))


NAMES = (
    "avx-across-exits",
    "xsave-xrstor",
    "fxsave-fxrstor",
    "sse-moves-across-exits",
    "device-not-available",
    "mxcsr",
)


@pytest.mark.parametrize("program", programs(*NAMES), ids=str)
def test_programs_of_wide_state(program: Program) -> None:
    """XSAVE, AVX and what is kept across exits are right when AVX is switched on."""
    reason = check_program(_Wide(), program)
    if reason:
        pytest.skip(reason)
