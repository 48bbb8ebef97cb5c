"""Hypothesis profiles: ``pytest tests/devices --hypothesis-profile=long -k hostile`` tries 100,000 cases of each."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

for name, examples in (("medium", 3000), ("long", 100_000)):
    settings.register_profile(name, max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
