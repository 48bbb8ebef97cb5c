"""What tests of devices share, and Hypothesis profiles.

``long`` tries 100,000 cases of each property, which takes up to an hour for a device:
``nice -n 19 pytest tests/devices --hypothesis-profile=long --timeout=0 -k hostile``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

for name, examples in (("medium", 3000), ("long", 100_000)):
    settings.register_profile(name, max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture
def share(tmp_path: Path) -> Path:
    """A directory to be shared, with links that lead out of it."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("secret")
    root = tmp_path / "share"
    (root / "sub").mkdir(parents=True)
    (root / "file").write_text("hello")
    (root / "sub" / "deep").write_text("deep")
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "up").symlink_to("../outside/secret")
    return root
