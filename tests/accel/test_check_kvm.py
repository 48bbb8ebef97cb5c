"""The accelerator kvm against the conformance programs."""

from __future__ import annotations

import pytest
from cardcage_conformance.accelerator import check_program, programs
from cardcage_conformance.conformance import Program
from cardcage_kvm.accel import Kvm


@pytest.mark.parametrize("program", programs(), ids=str)
def test_program_runs_alike_on_kvm(program: Program) -> None:
    """Each conformance program ends on KVM as its table says, or is skipped for a limit of this host that is named."""
    accelerator = Kvm()
    found = accelerator.probe()
    if not found.usable:
        pytest.skip(found.reason)
    reason = check_program(accelerator, program)
    if reason:
        pytest.skip(reason)
