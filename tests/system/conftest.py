"""What the tests of whole guests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from cardcage.errors import HostError
from cardcage_boot.cache import cache_root
from cardcage_boot.fetch import Shelf, distribution

EVERYWHERE = {f"test_{name}.py" for name in "debian_boot pc_guest system_outcomes".split()}
"""Modules whose guests boot on each Python version. Those of the others take minutes, and say the same on each."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is run on one Python version only."""
    for item in items:
        if item.path.parent == Path(__file__).parent and item.path.name not in EVERYWHERE:
            item.add_marker(pytest.mark.once)


@pytest.fixture(scope="session")
def kernel() -> Path:
    """The distribution's kernel, from the cache or fetched; the tests are skipped where it cannot be had."""
    try:
        return Shelf(cache_root(), lambda what, percent: None, lambda line: None).kernel().path
    except HostError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def generic() -> Path:
    """A cache folder that has Debian's generic kernel, fetched once: its cloud kernels have no 9p."""
    if distribution()[0] != "debian":
        pytest.skip("needs Debian, whose generic kernel is fetched")
    folder = cache_root() / "tests" / "generic"
    try:
        Shelf(folder / "cardcage", lambda what, percent: None, lambda line: None, ("linux-image-amd64",)).kernel()
    except HostError as error:
        pytest.skip(str(error))
    return folder


@pytest.fixture(scope="session")
def initramfs(kernel: Path) -> Path:
    """cardcage's own, whose shell is on the serial port."""
    shelf = Shelf(cache_root(), lambda what, percent: None, lambda line: None)
    return shelf.initramfs(shelf.kernel())
