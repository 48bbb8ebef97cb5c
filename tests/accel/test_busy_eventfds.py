"""Doorbells and irqfds in whole machines, on the accelerators that have them."""

from __future__ import annotations

import pytest
from cardcage_conformance import check_busy_eventfds


@pytest.mark.parametrize("accel", ["tcg", "kvm"])
def test_busy_eventfds_outlive_pause_reset_and_save(accel: str) -> None:
    """No kick and no interrupt is lost over a pause or a saved state, and none comes to a device that was reset."""
    reason = check_busy_eventfds(accel)
    if reason:
        pytest.skip(reason)
