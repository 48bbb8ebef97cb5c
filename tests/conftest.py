"""What all tests share. Hypothesis has no time limit for an example, which a busy host would miss."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cardcage.host import Host
from cardcage.registry import AcceleratorOffer
from hypothesis import settings

settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")


@pytest.fixture(params=Host().registry.names(AcceleratorOffer))
def accel(request: pytest.FixtureRequest) -> str:
    """The name of each accelerator that this host can use."""
    name: str = request.param
    probe = Host().registry.get(AcceleratorOffer, name).load()().probe()
    if not probe.usable:
        pytest.skip(f"{name}: {probe.reason}")
    return name


@pytest.fixture(scope="session", autouse=True)
def session_runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A roster of the session's own: the account's other machines must not change the names of a test's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime")))
        yield


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A roster of the test's own."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "cardcage"
