"""Hypothesis profiles: ``long`` tries 100,000 cases of each property, which takes up to an hour for a device.

nice -n 19 pytest tests/devices --hypothesis-profile=long --timeout=0 -k hostile
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

for name, examples in (("medium", 3000), ("long", 100_000)):
    settings.register_profile(name, max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
