"""The example card, and what becomes of cards with mistakes: each from an installed wheel of its own."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from installed import cardcage, install

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "debugcon-card"

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "mistake"
version = "1.5"
dependencies = ["cardcage>=7"]
[project.entry-points.cardcage]
mistake = "mistake"
[tool.hatch.build.targets.wheel]
packages = ["mistake"]
"""

MISTAKES = {
    "raises at register": (
        "@hookimpl\ndef cardcage_register(registry):\n    registry.device('half', 'x:X')\n    raise OSError('boom')\n",
        "OSError: boom",
    ),
    "raises at import": ("raise OSError('no such luck')\n", "OSError: no such luck"),
    "is no Python": ("def (\n", "SyntaxError"),
    "imports what is missing": ("import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module'"),
    "wrong signature": ("@hookimpl\ndef cardcage_register(registry, machine):\n    pass\n", "machine"),
    "misspelt hook": ("@hookimpl\ndef cardcage_registr(registry):\n    pass\n", "cardcage_registr"),
    "unknown option": (
        "@hookimpl\ndef cardcage_register(registry):\n    registry.device('x', 'mistake:X', colour='red')\n",
        "unexpected keyword argument 'colour'",
    ),
    "a name that is taken": (
        "@hookimpl\ndef cardcage_register(registry):\n    registry.device('isa-serial', 'mistake:X')\n",
        "device 'isa-serial': already offered by card pc (cardcage ",
    ),
}


def install_mistake(site: Path, source: str) -> None:
    """A card with this source, as pip would install it."""
    project = site.parent / "project"
    (project / "mistake").mkdir(parents=True)
    (project / "pyproject.toml").write_text(PYPROJECT)
    (project / "mistake" / "__init__.py").write_text("from cardcage.hookspecs import hookimpl\n\n\n" + source)
    install(project, site)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_card_with_a_mistake_is_named_and_left_out(mistake: str, tmp_path: Path) -> None:
    """A broken card is listed with its distribution and the reason, and every other card still works."""
    source, reason = MISTAKES[mistake]
    install_mistake(tmp_path / "site", source)
    listed = cardcage("cards", sites=(tmp_path / "site",))
    assert listed.returncode == 0
    (line,) = (one for one in listed.stdout.splitlines() if one.startswith("mistake "))
    assert "mistake 1.5" in line
    assert "broken: " in line
    assert reason in line
    if mistake in ("wrong signature", "misspelt hook", "unknown option"):
        assert "(this is cardcage 0.1.0; the card asks for cardcage>=7)" in line
    assert "platform pc" in listed.stdout
    assert listed.stderr == ""


def test_a_missing_name_mentions_the_broken_card(tmp_path: Path) -> None:
    """When nobody offers a device and a card is broken, the error says so: it may have been that card's."""
    install_mistake(tmp_path / "site", MISTAKES["raises at register"][0])
    (tmp_path / "vm.toml").write_text('[machine]\nplatform = "none"\n[[device]]\ntype = "half"\n')
    done = cardcage("run", "vm.toml", sites=(tmp_path / "site",), folder=tmp_path)
    assert done.returncode == 2
    assert 'no card offers device "half"' in done.stderr
    assert 'card "mistake" (mistake 1.5) is broken and was left out: OSError: boom' in done.stderr
    assert "Traceback" not in done.stderr


def test_the_example_is_found_by_entry_point() -> None:
    """The example card is installed from its own distribution and announced by its own entry point."""
    (point,) = entry_points(group="cardcage", name="debug-console")
    assert point.dist is not None
    assert point.dist.name == "debugcon-card"
    assert len((EXAMPLE / "src" / "debugcon_card" / "device.py").read_text().splitlines()) <= 25


def test_the_example_serves_a_guest(tmp_path: Path) -> None:
    """A guest's bytes reach the example's device, from TOML to the back end, on the accelerator of this host."""
    # mov dx,0xe9; in al,dx; mov [0x500],al; 'o' and 'k' to dx; mov dx,0xf4; mov al,1; out dx,al
    code = "bae900eca20005b06feeb06beebaf400b001ee"
    (tmp_path / "guest.bin").write_bytes(bytes.fromhex(code))
    (tmp_path / "vm.toml").write_text(
        """
[machine]
platform = "none"
memory = "2M"
[boot]
protocol = "raw"
image = "guest.bin"
address = 0x1000
[[device]]
type = "debug-console"
char = "file:out.txt"
[[device]]
type = "isa-debug-exit"
iobase = 0xf4
"""
    )
    done = cardcage("run", "vm.toml", "--timeout", "60", folder=tmp_path)
    assert done.returncode == 3, done.stderr
    assert done.stderr.splitlines()[-1] == "outcome: debug exit with code 1"
    assert (tmp_path / "out.txt").read_bytes() == b"ok"


def test_the_example_keeps_the_contract() -> None:
    """The example's device passes the public device contract."""
    from cardcage.device import Pio
    from cardcage_testing import check_device
    from debugcon_card.device import DebugConsole, Options

    check_device(lambda: DebugConsole(Options()), Pio(1, base=0xE9))


@pytest.mark.once
def test_a_strangers_tests_get_the_fixtures(tmp_path: Path) -> None:
    """``pytest_plugins = "cardcage_testing.pytest"`` brings a slot, and machines that are closed."""
    (tmp_path / "conftest.py").write_text('pytest_plugins = "cardcage_testing.pytest"\n')
    (tmp_path / "test_stranger.py").write_text(
        """
def test_slot(slot):
    slot.memory.write(0, b"x")
    assert slot.memory.read(0, 1) == b"x"

def test_machine(make_machine):
    vm = make_machine(memory="16M", accel="tcg", devices=[{"type": "debug-console", "char": "null"}])
    assert vm.state == "built"

def test_failing(make_machine):
    vm = make_machine(memory="16M", accel="tcg")
    vm.fail(RuntimeError("a card's bug"))
"""
    )
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert "3 passed, 1 error" in done.stdout
    assert "RuntimeError: a card's bug" in done.stdout
