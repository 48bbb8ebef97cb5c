"""Machines whose time stands still, on each accelerator, by the contract that strangers' accelerators have."""

from __future__ import annotations

import pytest
from cardcage_conformance import check_parking

pytestmark = pytest.mark.once


def test_parking(accel: str) -> None:
    """The counter and the timers of a parked machine stand; none interrupts early, twice or never."""
    reason = check_parking(accel)
    assert not reason or "the host's own time-stamp counter" in reason
