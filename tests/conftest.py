"""What all tests share: Hypothesis has no time limit for an example, which a busy host would miss."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")
