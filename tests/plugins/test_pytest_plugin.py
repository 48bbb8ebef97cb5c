"""The plugin for pytest: guests as fixtures, limits, reports, and the contracts of a stranger's card."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest_plugins = "pytester"

FAKE = """
import time
from types import SimpleNamespace
import pytest
from cardcage.machine import State

made = []

class Fake:
    outcome = None

    def __init__(self, **keys):
        self.keys, self.name, self.state, self.services, self.log = keys, f"fake{len(made)}", State.BUILT, {}, []
        self.console = SimpleNamespace(output="\\x1b[31mline\\n" * 200 + "last words\\n")
        self.agent = SimpleNamespace(wait=lambda: None, set_time=lambda: None, reseed=lambda: self.log.append("seed"))
        made.append(self)

    def start(self):
        self.state = State.RUNNING

    def stop(self, why):
        self.state, self.outcome = State.STOPPED, why

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.state = State.STOPPED
        self.log.append("closed")

class Reverts(Fake):
    def checkpoint(self):
        self.log.append("checkpoint")

    def revert(self):
        self.log.append("revert")

def fake(cls, **keys):
    return Fake(**keys)

def reverts(cls, **keys):
    return Reverts(**keys)

"""
"""Machines that no guest runs in: what becomes of them is the plugin's doing."""


def run(pytester: pytest.Pytester, source: str, *args: str) -> pytest.RunResult:
    """pytest in a process of its own, over a module of this source."""
    pytester.makepyfile(test_it=source)
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", *args, timeout=240)


def test_a_run_without_guests_imports_nothing_of_ours(pytester: pytest.Pytester) -> None:
    """A project's tests that use no guest cost one small module."""
    source = """
import sys
def test_it():
    assert [one for one in sys.modules if one.startswith("cardcage")] == ["cardcage_pytest", "cardcage_pytest.plugin",
        "cardcage", "cardcage.lazy"] or sorted(one for one in sys.modules if one.startswith("cardcage"))
    assert "cardcage.machine" not in sys.modules and "attrs" not in sys.modules and "attr" not in sys.modules
"""
    run(
        pytester, source, "-p", "no:hypothesispytest", "-p", "no:anyio"
    )  # other plugins have attrs.assert_outcomes(passed=1)


def test_between_tests_a_guest_goes_back_to_when_it_had_booted(pytester: pytest.Pytester) -> None:
    """One that can revert is booted once for each kind, with new randomness each time; one that cannot, for each."""
    source = (
        FAKE
        + """
@pytest.mark.cardcage(maker=reverts)
@pytest.mark.parametrize("turn", [0, 1, 2])
def test_reverts(guest, turn):
    assert len(made) == 1 and guest is made[0]
    assert guest.log == ["checkpoint"] + ["revert", "seed"] * turn

@pytest.mark.cardcage(maker=reverts, memory="1G")
def test_another_kind(guest):
    assert len(made) == 2 and guest.keys == {"memory": "1G"}

@pytest.mark.cardcage(maker=reverts)
def test_ends(guest):
    assert len(made) == 2
    guest.stop("by the test")

@pytest.mark.cardcage(maker=reverts)
def test_after_an_end(guest):
    assert len(made) == 3 and guest.log == ["checkpoint"]

@pytest.mark.cardcage(maker=fake)
@pytest.mark.parametrize("turn", [0, 1])
def test_cannot(guest, turn):
    assert len(made) == 4 + turn
    assert [one.state for one in made[3:]] == ["stopped"] * turn + ["running"]
"""
    )
    run(pytester, source).assert_outcomes(passed=8)


def test_scopes_and_markers(pytester: pytest.Pytester) -> None:
    """Keys come from the nearest marker, then the command line, then the ini-file; scopes share, factories do not."""
    source = (
        FAKE
        + """
pytestmark = pytest.mark.cardcage(maker=fake, memory="1G")

class TestOne:
    pytestmark = pytest.mark.cardcage(cpus=3)

    def test_1(self, class_guest, module_guest):
        assert class_guest.keys == {"memory": "1G", "cpus": 3, "accel": "tcg", "append": "quiet"}
        assert module_guest.keys == {"memory": "1G", "cpus": 2, "accel": "tcg", "append": "quiet"}

    @pytest.mark.cardcage(memory="2G")
    def test_2(self, class_guest, guest, module_guest):
        assert module_guest is made[0] and class_guest is made[1] and guest.keys["memory"] == "2G"

def test_factory(machine_factory, module_guest):
    assert made[1].state == "stopped" and module_guest is made[0]
    one, two = machine_factory(cpus=7), machine_factory.boot()
    assert (one.state, two.state, one.keys["cpus"]) == ("built", "running", 7)

def test_after():
    assert [one.state for one in made] == ["running", "stopped", "stopped", "stopped", "stopped"]
"""
    )
    pytester.makeini("[pytest]\ncardcage_cpus = 2\ncardcage_accel = kvm\ncardcage_append = quiet\n")
    run(pytester, source, "--cardcage-accel", "tcg").assert_outcomes(passed=4)


@pytest.mark.once
def test_limits_name_their_phase(pytester: pytest.Pytester) -> None:
    """A phase that takes too long ends its guests and fails its test, whatever that makes of it; booting is aside."""
    source = (
        FAKE
        + """
pytestmark = pytest.mark.cardcage(maker=fake, setup_timeout=1, call_timeout=1)

def until_it_ends(guest):
    while guest.state != "stopped":
        time.sleep(0.01)

@pytest.fixture
def slow(guest):
    until_it_ends(guest)

def test_setup(slow): pass

def test_call(guest):
    until_it_ends(guest)
    assert guest.outcome == "call: the limit of 1 s is over"

@pytest.mark.cardcage(call_timeout="soon")
def test_wrong(guest): pass

@pytest.mark.cardcage(memroy="1G", maker="debian")
def test_typo(guest): pass

@pytest.mark.cardcage("1G")
def test_no_key(guest): pass

@pytest.mark.cardcage(maker="debain")
def test_no_maker(guest): pass
"""
    )
    done = run(pytester, source)
    done.assert_outcomes(failed=2, errors=4, passed=0)
    text = done.stdout.str()
    assert "setup: the limit of 1 s is over" in text
    assert "call: the limit of 1 s is over" in text
    assert "call_timeout: expected seconds, more than 0, got 'soon'" in text
    assert 'no key "memroy". Did you mean "memory"?' in text
    assert "expected keys, such as memory='1G', got '1G'" in text
    assert 'Did you mean "debian"?' in text


@pytest.mark.once
def test_a_console_is_shown_by_the_lines(pytester: pytest.Pytester) -> None:
    """The last lines, of which none controls a terminal, and only of guests that the test has; by each worker."""
    source = (
        FAKE
        + """
pytestmark = pytest.mark.cardcage(maker=fake)

def test_passes(guest): pass

@pytest.mark.parametrize("turn", [0, 1])
def test_fails(guest, turn):
    assert not guest

def test_has_none():
    assert False, "without"
"""
    )
    done = run(pytester, source, "-n", "2")
    done.assert_outcomes(failed=3, passed=1)
    text = done.stdout.str()
    assert text.count("last words") == 2
    assert text.count("\N{REPLACEMENT CHARACTER}[31mline") == 2 * 99
    assert "\x1b[31mline" not in text


def test_a_setting_that_is_no_number_is_a_usage_error(pytester: pytest.Pytester) -> None:
    """One line says which, before any test runs."""
    pytester.makeini("[pytest]\ncardcage_booted = many\n")
    done = run(pytester, "def test_it(): pass")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["ERROR: cardcage_booted: expected a number of guests, from 1, got 'many'"])


def test_keep_wants_a_process_of_its_own(pytester: pytest.Pytester) -> None:
    """It waits at the terminal, which workers do not have."""
    done = run(pytester, "def test_it(): pass", "--cardcage-keep", "-n", "2")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    assert "--cardcage-keep waits at this terminal: omit -n" in done.stderr.str()


@pytest.mark.once
def test_guests_of_a_failure_are_kept(pytester: pytest.Pytester) -> None:
    """The run stops, each guest's console is a socket of its own, though two have one name, and all are closed then."""
    source = (
        FAKE
        + """
class Kept(Fake):
    def open_console(self, spec):
        assert spec["type"] == "socket"
        open(spec["path"], "x").close()

    def wait(self):
        print("waited for", self.state)

    def close(self):
        print("closed")

def kept(cls, **keys):
    one = Kept(**keys)
    one.name = "same"
    return one

@pytest.mark.cardcage(maker=kept)
def test_fails(machine_factory):
    machine_factory.boot(), machine_factory.boot()
    raise ValueError

def test_is_not_run():
    pass
"""
    )
    done = run(pytester, source, "--cardcage-keep")
    done.assert_outcomes(failed=1)
    text = done.stdout.str()
    assert len(set(re.findall(r"same is kept\. Its console: socat \S+ UNIX-CONNECT:(\S+)", text))) == 2, text
    assert text.count("waited for running") == 2
    assert text.index("closed") > text.rindex("waited for")


# contracts


def contracts(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """The suite for a card."""
    words = [sys.executable, "-m", "pytest", "-v", "-rs", "-p", "no:cacheprovider", *args]
    return subprocess.run(words, capture_output=True, text=True, cwd=folder, timeout=240)


@pytest.mark.once
def test_strangers_cards_are_held_to_their_contracts(tmp_path: Path) -> None:
    """Without tests named, a distribution's offers are all that is tested, each by the contracts of its kind."""
    (tmp_path / "test_other.py").write_text("def test_other(): pass\n")
    names = ("debugcon_card", "virtio-card", "memory-card", "coldmem-policy")
    done = contracts(tmp_path, *(word for name in names for word in ("--cardcage-card", name)))
    assert done.returncode == 0, done.stdout
    for one in (
        *(f"debugcon_card::device debug-console-{part}" for part in ("loads", "contract", "machine")),
        *(f"virtio-card::device {name}-machine" for name in ("number-disk", "number-disk-mmio")),
        "memory-card::memory locked-contract",
        "memory-card::admission count-contract",
        "coldmem-policy::policy coldmem-contract",
    ):
        assert f"card:{one} PASSED" in done.stdout, one
    assert "test_other" not in done.stdout
    assert "SKIPPED" not in done.stdout


@pytest.mark.once
def test_a_broken_contract_is_told_in_the_kits_words(tmp_path: Path) -> None:
    """What was broken, and the line that offered it; beside named tests; an unknown distribution is one line."""
    package = tmp_path / "site" / "wrong_card"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        """
from cardcage.device import Pio
from cardcage.hookspecs import hookimpl

class Wrong:
    def read(self, offset, size): return 1 << 40
    def write(self, offset, size, value): pass

@hookimpl
def cardcage_register(registry):
    registry.device("wrong", Wrong, regions=(Pio(1, base=0x2A0),), help="a mistake")
"""
    )
    info = tmp_path / "site" / "wrong_card-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: wrong-card\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[cardcage]\nwrong = wrong_card\n")
    (tmp_path / "test_other.py").write_text("def test_other(): pass\n")
    (tmp_path / "conftest.py").write_text("import sys\nsys.path.insert(0, 'site')\n")
    done = contracts(tmp_path, "--cardcage-card", "wrong-card", "test_other.py")
    assert "1 failed, 3 passed" in done.stdout
    assert "Wrong: read(0x0, 1) gave 0x10000000000, expected 0 to 0xff" in done.stdout
    assert "wrong_card/__init__.py:11: offered here" in done.stdout
    done = contracts(tmp_path, "--cardcage-card", "wrong-crad")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert 'no card of a distribution "wrong-crad" is installed. Did you mean "wrong-card"?' in done.stderr
