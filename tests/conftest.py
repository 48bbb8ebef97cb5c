"""For all tests: how Hypothesis behaves."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# A busy host is no reason to fail: no test asserts how long something takes. What proves a submission (.ci/run says so
# by CARDCAGE_CI) tries the same examples each time; elsewhere they are new ones.
settings.register_profile(
    "cardcage",
    deadline=None,
    derandomize="CARDCAGE_CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("cardcage")
