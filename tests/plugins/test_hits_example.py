"""A stranger's card on the accelerators' ``guest-debug``, from a wheel of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from installed import cardcage, install

pytestmark = pytest.mark.once
EXAMPLE = Path(__file__).parents[2] / "examples" / "hits-card"
GUEST = bytes.fromhex("b90500 e80600 e2fb b000 e6f4 90 c3")
"""CX = 5; calls 0x7c0c so often, at 0x7c03; then writes 0 to port 0xf4."""
MACHINE = """
[machine]
memory = "4M"
platform = "none"
accel = "tcg"
[boot]
protocol = "raw"
image = "guest.bin"
[[device]]
type = "isa-debug-exit"
iobase = 0xf4
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(EXAMPLE, tmp_path_factory.mktemp("hits") / "site")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "vm.toml").write_text(MACHINE)
    (tmp_path / "guest.bin").write_bytes(GUEST)
    return tmp_path


def test_passages_are_counted(site: Path, folder: Path) -> None:
    """Each passage is counted, in the jail, and the guest comes to its own end."""
    found = cardcage("run", "--hits", "0x7c03,0x7c0c", "vm.toml", sites=(site,), folder=folder)
    assert found.returncode == 1, found.stderr
    assert found.stderr.count("times=5") == 2, found.stderr


def test_mistakes_are_one_line(site: Path, folder: Path) -> None:
    """A wrong address, and a second debugger, are told in one line."""
    found = cardcage("run", "--hits", "there", "vm.toml", sites=(site,), folder=folder)
    assert (found.returncode, "Traceback" in found.stderr) == (2, False)
    assert "--hits" in found.stderr
    found = cardcage("run", "--hits", "0x7c03", "--gdb", "0", "vm.toml", sites=(site,), folder=folder)
    assert found.returncode == 2
    assert "guest-debug" in found.stderr
    assert "Traceback" not in found.stderr
    found = cardcage("run", "--hits", "-1", "vm.toml", sites=(site,), folder=folder)
    assert found.returncode == 2
    assert "expected addresses" in found.stderr
