"""``cardcage new card``: what it writes installs, is listed, runs, keeps its contract and is typed; bad names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cardcage_cli import main
from cardcage_new.kinds import KINDS
from cardcage_new.skeleton import contents
from installed import cardcage

pytestmark = pytest.mark.once

NAMES = {kind: f"fresh-{kind}" for kind in KINDS}
SLIPS = {
    "device": ("def reset(", "def rset(", 'has "rset": did you mean "reset"'),
    "virtio": ("def handle(", "def handel(", 'has "handel": did you mean "handle"'),
    "pci": ("def reset(", "def rest(", 'has "rest": did you mean "reset"'),
    "char": ("def write(", "def wriet(", 'has "wriet": did you mean "write"'),
    "policy": ("def detach(", "def detatch(", 'has "detatch": did you mean "detach"'),
    "checker": ("def check(", "def chekc(", 'has "chekc": did you mean "check"'),
    "command": ("def configure(", "def configrue(", "name 'configure' is not defined"),
}
"""For each kind a method that is misspelt in a generated card, and what is said about it."""


def program(*words: str, folder: Path, sites: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
    """Run Python with *words*, with what is installed in *sites* too."""
    environment = {**os.environ, **more, **({"PYTHONPATH": str(sites)} if sites else {})}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


def pip(folder: Path, site: Path, *projects: str) -> None:
    """Install *projects* of *folder* in *site*; what builds them, and cardcage, is there already."""
    words = ("install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    done = program("-m", "pip", *words, "--target", str(site), *projects, folder=folder)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a new card of each kind."""
    folder = tmp_path_factory.mktemp("written")
    for kind, name in NAMES.items():
        done = cardcage("new", "card", name, "--kind", kind, folder=folder)
        assert done.returncode == 0, done.stderr
        assert f"pip install -e './{name}[test]'\n    pytest {name}\n    cardcage " in done.stdout
    return folder


@pytest.fixture(scope="module")
def site(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pip installed them."""
    site = tmp_path_factory.mktemp("site")
    pip(written, site, *(f"./{name}" for name in NAMES.values()))
    return site


def test_the_device_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ``--kind`` the card is a device, and its folder holds these files and nothing else."""
    monkeypatch.chdir(tmp_path)
    assert main(["new", "card", "status-lamp"]) == 0
    made = {str(one.relative_to("status-lamp")) for one in Path("status-lamp").rglob("*") if one.is_file()}
    assert made == {
        *("pyproject.toml", "README.md", "tests/test_status_lamp.py"),
        *("src/status_lamp/__init__.py", "src/status_lamp/py.typed"),
    }
    assert all(
        (Path("status-lamp") / path).read_text() == text for path, text in contents("device", "status-lamp").items()
    )
    assert os.listdir() == ["status-lamp"]
    assert os.stat("status-lamp").st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["Lamp"], '"Lamp" cannot name a card: expected at most 64 lower case letters, digits and single hyphens'),
        (["../lamp"], '"../lamp" cannot name a card'),
        (["a--b"], '"a--b" cannot name a card'),
        (["1st"], '"1st" cannot name a card'),
        (["lämp"], '"lämp" cannot name a card'),
        (["lamp\n"], "cannot name a card"),
        (["l" * 65], "cannot name a card"),
        (["class"], '"class" cannot name a card: it is a word of Python'),
        (["there"], '"there" exists already'),
        (["dangling"], '"dangling" exists already'),
        (["pc"], '"pc" is taken: a card of cardcage 0.1.0 has that name'),
        (["isa-serial"], '"isa-serial" is taken: card pc (cardcage 0.1.0) offers device isa-serial'),
        (["stdio", "--kind", "char"], '"stdio" is taken: card pc (cardcage 0.1.0) offers backend char:stdio'),
        (["run", "--kind", "command"], '"run" is taken: cardcage has a command of that name'),
        (["json"], '"json" is taken: Python imports another package as json'),
        (["cardcage-pc"], '"cardcage-pc" is taken: Python imports another package as cardcage_pc'),
        (["hatchling"], '"hatchling" is taken: a distribution of that name is installed'),
    ],
)
def test_a_bad_name_is_one_line(
    words: list[str], error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A name that no card can have is refused in one line with status 2, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    Path("dangling").symlink_to("nowhere")
    assert main(["new", "card", *words]) == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.startswith("outcome: bad configuration: ")
    assert error in said.err
    assert said.err.count("\n") == 1
    assert sorted(os.listdir()) == ["dangling", "there"]
    assert os.listdir("there") == []


def test_a_failed_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A disk that fills up while the card is written is one line with status 2, and nothing is left of it."""
    monkeypatch.chdir(tmp_path)
    written, count = Path.write_text, iter(range(3))

    def full(self: Path, *values: Any) -> int:
        if next(count, None) is None:
            raise OSError(28, "No space left on device")
        return written(self, *values)

    monkeypatch.setattr(Path, "write_text", full)
    assert main(["new", "card", "lamp"]) == 2
    assert capfd.readouterr().err == "outcome: bad configuration: lamp: cannot be written: No space left on device\n"
    assert os.listdir() == []


def test_each_is_listed(site: Path) -> None:
    """``cardcage cards -v`` shows each installed card with what it offers, whole."""
    done = cardcage("cards", "-v", sites=(site,))
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    for kind, name in NAMES.items():
        word, offered = KINDS[kind].offers[0], KINDS[kind].offers[1].replace("$name", name)
        (line,) = (one for one in lines if one.startswith(f"{name} "))
        assert f"{name} 0.1.0" in line
        assert f"{word} {offered}" in line
        assert any(one.startswith(f"    {word} {offered}: ") for one in lines)
    assert "not usable" not in "".join(one for one in lines if "fresh" in one)
    assert "broken" not in done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_each_passes_its_own_test(kind: str, written: Path, site: Path) -> None:
    """The test that comes with the card passes: the contract, a machine that has it, and its error."""
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", NAMES[kind])
    done = program(*words, folder=written, sites=site)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def test_all_are_typed(written: Path, site: Path) -> None:
    """``mypy --strict`` finds nothing in any card or its test."""
    pytest.importorskip("mypy")
    places = [f"{name}/{part}" for name in NAMES.values() for part in ("src", "tests")]
    done = program("-m", "mypy", "--strict", *places, folder=written)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_a_slip_is_told(kind: str, written: Path, site: Path, tmp_path: Path) -> None:
    """A misspelt method is named with the word that was expected, by ``cardcage`` itself or by the card's own test."""
    right, wrong, said = SLIPS[kind]
    package = NAMES[kind].replace("-", "_")
    text = (written / NAMES[kind] / "src" / package / "__init__.py").read_text()
    assert text.count(right) == 1
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(text.replace(right, wrong))
    words = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", NAMES[kind])
    search = os.pathsep.join((str(tmp_path), str(site)))
    done = program(*words, folder=written, sites=None, PYTHONPATH=search)
    listed = cardcage("cards", "-v", sites=(tmp_path, site))
    assert done.returncode == 1
    assert said in done.stdout + listed.stdout
