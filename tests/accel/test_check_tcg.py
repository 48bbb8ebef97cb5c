"""The accelerator tcg against the conformance programs."""

from __future__ import annotations

import pytest
from cardcage_conformance.accelerator import check_program, programs
from cardcage_conformance.conformance import Program
from cardcage_tcg.accel import Tcg


@pytest.mark.parametrize("program", programs(), ids=str)
def test_program_runs_alike_on_tcg(program: Program) -> None:
    """Each conformance program ends in the translator as its table says, or is skipped for a feature that is named."""
    reason = check_program(Tcg(), program)
    if reason:
        pytest.skip(reason)
