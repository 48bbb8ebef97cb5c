"""Compiled policies that are kept in the user's cache: what is taken, and what is compiled again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cardcage_selinux.server.kept as room
import pytest
from cardcage.errors import UsageError
from cardcage_selinux.card import DEFAULT
from cardcage_selinux.errors import PolicyError
from cardcage_selinux.server.kept import FILES, frozen, kept, store
from cardcage_selinux.server.policy import load
from selinux_sink import SINK

TEXT = """
(class file (read write)) (type a) (type b) (role r) (user u) (userrole u r) (roletype r a) (roletype r b)
(allow a b (file (read)))
"""


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A cache of its own, and a list that grows when something is compiled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls: list[int] = []
    real = room.compiled

    def counted(texts: list[tuple[str, str]]) -> object:
        calls.append(1)
        return real(texts)

    monkeypatch.setattr(room, "compiled", counted)
    return calls


def only() -> Path:
    """The one file in the cache."""
    (found,) = Path(store()).iterdir()
    return found


@pytest.mark.parametrize("source", [DEFAULT, SINK], ids=["default", "every statement"])
def test_a_kept_policy_is_the_compiled_one(source: str | Path, compiled: list[int]) -> None:
    """Tables that were kept are equal to those compiled, in every field."""
    first, second = kept([source]), kept([source])
    assert len(compiled) == 1
    assert frozen(first.tables) == frozen(second.tables) == frozen(load([source]).tables)
    assert second.booleans == first.booleans
    with pytest.raises(UsageError, match="cache of compiled policies"):
        _ = second.origins


def test_a_kept_policy_needs_no_compiler(tmp_path: Path) -> None:
    """A start that finds its policy kept does not import the compiler."""
    code = (
        "import sys; from cardcage_selinux.card import *; Selinux(SelinuxOptions(labels='none'));"
        "print(sorted(one.rpartition('.')[2] for one in sys.modules if one.startswith('cardcage_selinux.')))"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    runs = [
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert "'build'" in runs[0]
    for name in ("build", "sexpr", "expand", "rules", "classes", "family", "scope", "syntax", "origins"):
        assert f"'{name}'" not in runs[1]


def test_another_text_is_another_policy(compiled: list[int]) -> None:
    """A change in a file, or in the order or borders of files, is compiled; a policy with an error is not kept."""
    more = "(allow a b (file (write)))"
    kept([TEXT, more])
    assert "write" in kept([TEXT, more]).permissions("file", kept([TEXT, more]).compute_av(*ASKED).allowed)
    assert len(compiled) == 1
    for sources in ([TEXT], [TEXT + more], [more, TEXT], [TEXT, more, ""]):
        kept(sources)
    assert len(compiled) == 5
    for _ in range(2):
        with pytest.raises(PolicyError):
            kept([TEXT, "(allow a nobody (file (read)))"])
    assert len(compiled) == 7
    assert len(list(Path(store()).iterdir())) == 5


ASKED = ("u:r:a", "u:r:b", "file")


def test_damaged_files_are_compiled_again(compiled: list[int]) -> None:
    """Whatever byte is wrong or missing, the policy is compiled again and the file put right."""
    kept([TEXT])
    place = only()
    good = place.read_bytes()
    damaged = [bytes([*good[:at], good[at] ^ 1, *good[at + 1 :]]) for at in range(0, len(good), 29)]
    for number, data in enumerate([b"", good[:10], good[:64], good[:-1], good + b"\0", *damaged]):
        place.write_bytes(data)
        for _ in range(2):
            assert kept([TEXT]).compute_av(*ASKED).allowed == 1
        assert len(compiled) == number + 2


def test_files_that_others_could_have_written_are_not_taken(compiled: list[int], tmp_path: Path) -> None:
    """A file that others may write, a link, a pipe, a policy under another's name: each is compiled again."""
    kept([TEXT])
    place = only()
    good = place.read_bytes()
    spoils = [lambda: place.chmod(0o620), lambda: place.chmod(0o602)]
    if os.geteuid() == 0:
        spoils.append(lambda: os.chown(place, 65534, -1))

    def link() -> None:
        (tmp_path / "elsewhere").write_bytes(good)
        place.unlink()
        place.symlink_to(tmp_path / "elsewhere")

    def pipe() -> None:
        place.unlink()
        os.mkfifo(place)

    def exchanged() -> None:
        kept([TEXT, "(allow a b (file (write)))"])
        (other,) = (one for one in place.parent.iterdir() if one != place)
        other.rename(place)
        compiled.pop()

    for number, spoil in enumerate([*spoils, link, pipe, exchanged]):
        spoil()
        for _ in range(2):
            assert kept([TEXT]).compute_av(*ASKED).allowed == 1
        assert len(compiled) == number + 2
        assert place.lstat().st_mode & 0o777 == 0o600


def test_a_cache_that_cannot_be_written(compiled: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a cache each start compiles, and nothing else is different."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for number in (1, 2):
        assert kept([TEXT]).compute_av(*ASKED).allowed == 1
        assert len(compiled) == number


def test_old_policies_leave_the_cache(compiled: list[int]) -> None:
    """No more than FILES policies are kept, and the one that was written last is among them."""
    for number in range(FILES + 3):
        kept([TEXT, f"(type t{number})"])
    assert len(list(Path(store()).iterdir())) == FILES
    kept([TEXT, f"(type t{FILES + 2})"])
    assert len(compiled) == FILES + 3
