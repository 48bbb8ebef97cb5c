"""What the process inherited is not what a guest sees of a shared directory: each thing, by both protocols."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.once

HERE = Path(__file__).parent
LOCALES = [("C", "0"), ("POSIX", "0"), ("C.UTF-8", "0"), ("C", "1")]


@pytest.fixture(params=["fs", "9p"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def guest_sees(
    kind: str,
    path: Path | str,
    act: str = "names_and_modes",
    *,
    inherit: Callable[[], Any] | None = None,
    folder: Path | None = None,
    prefix: tuple[str, ...] = (),
    **environment: str,
) -> list[str]:
    """The lines of the program that serves *path*, started after *inherit* was called, with *environment* alone."""
    Path(folder or "/", path).mkdir(parents=True)
    done = subprocess.run(
        [*prefix, sys.executable, HERE / "share_transcript.py", kind, path, act],
        preexec_fn=inherit,
        env={"PATH": os.defpath, **environment},
        capture_output=True,
        cwd=folder or "/",
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr).decode("utf8", "replace")
    return done.stdout.decode("utf8", "surrogateescape").splitlines()


def keep_signals(action: Any) -> None:
    """Have each signal that can be changed ignored, or blocked where *action* is SIG_BLOCK."""
    if action == signal.SIG_BLOCK:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        return
    for one in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(one, action)


@pytest.mark.parametrize("mask", [0o077, 0o777, 0o000])
def test_the_umask_is_not_the_guests(kind: str, mask: int, tmp_path: Path) -> None:
    """Files, directories, FIFOs and nameless files have the modes that the guest gave; the process's umask stays."""
    plain = guest_sees(kind, tmp_path / "plain", inherit=lambda: os.umask(0o022))
    assert guest_sees(kind, tmp_path / "masked", inherit=lambda: os.umask(mask)) == plain
    modes = {name: (tmp_path / "masked" / name).stat().st_mode & 0o7777 for name in ("d1777", "n777", "f640", "f0")}
    assert modes == {"d1777": 0o1777, "n777": 0o777, "f640": 0o640, "f0": 0}


def test_a_default_acl_is_the_umasks_master(kind: str, tmp_path: Path) -> None:
    """Where the shared directory has a default ACL, it says what is taken from a mode, as for the host's programs."""
    acl = b"".join(word.to_bytes(4, "little") for word in (2, 1 | 7 << 16, 2**32 - 1, 4 | 5 << 16, 2**32 - 1))
    acl += b"".join(word.to_bytes(4, "little") for word in (0x20 | 0 << 16, 2**32 - 1))
    try:
        os.setxattr(tmp_path, "system.posix_acl_default", acl)
    except OSError as error:
        pytest.skip(f"needs a file system with ACLs: {error}")
    (tmp_path / "host").mkdir()
    guest_sees(kind, tmp_path / "share", inherit=lambda: os.umask(0o077))
    os.mkdir(tmp_path / "host" / "d777", 0o777)
    assert (tmp_path / "share" / "d777").stat().st_mode == (tmp_path / "host" / "d777").stat().st_mode
    assert (tmp_path / "share" / "d777").stat().st_mode & 0o777 == 0o750


def test_the_current_directory_is_not_the_guests(kind: str, tmp_path: Path) -> None:
    """A relative path is of where the process began, and stays so when it goes elsewhere."""
    plain = guest_sees(kind, tmp_path / "plain")
    assert guest_sees(kind, "here/below", "own_directory", folder=tmp_path) == plain
    (tmp_path / "gone").mkdir()

    def leave() -> None:
        os.chdir(tmp_path / "gone")
        os.rmdir(tmp_path / "gone")

    assert guest_sees(kind, tmp_path / "other", inherit=leave) == plain


@pytest.mark.parametrize("action", [signal.SIG_IGN, signal.SIG_BLOCK])
def test_ignored_and_blocked_signals_are_not_the_guests(kind: str, action: int, tmp_path: Path) -> None:
    """A process all of whose signals are ignored, or blocked, serves as any other."""
    plain = guest_sees(kind, tmp_path / "plain")
    assert guest_sees(kind, tmp_path / "other", inherit=lambda: keep_signals(action)) == plain


@pytest.mark.parametrize("action", ["", "default"])
def test_a_limit_of_file_sizes_is_an_error(kind: str, action: str, tmp_path: Path) -> None:
    """A write beyond RLIMIT_FSIZE is short, then EFBIG, and never the end of the process, whatever SIGXFSZ means."""
    extra = {"SIGXFSZ_AS_THE_SYSTEM_HAS_IT": "1"} if action else {}
    limit = (8192, 8192)
    lines = guest_sees(
        kind, tmp_path / "s", "long_file", inherit=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit), **extra
    )
    assert lines == ["0 400 400", "8000 192 8192", "8192 EFBIG 8192", "100000 EFBIG 8192", "EFBIG 8192", "alive"]


def test_the_soft_limit_of_open_files_is_not_the_guests(kind: str, tmp_path: Path) -> None:
    """A guest opens many files where the soft limit is low, and hears ENFILE, not EMFILE, where the hard one is."""
    plain = guest_sees(kind, tmp_path / "plain", "many_files")
    assert "str" not in plain[0]
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    soft = guest_sees(
        kind,
        tmp_path / "soft",
        "many_files",
        inherit=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard)),
    )
    assert soft == plain
    low = guest_sees(
        kind, tmp_path / "low", "many_files", inherit=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    )
    assert low[0].endswith(" ENFILE")
    assert low[1] == "alive"


@pytest.mark.parametrize(("name", "mode"), LOCALES)
def test_the_locale_is_not_the_guests(kind: str, name: str, mode: str, tmp_path: Path) -> None:
    """Names of files and attributes are the bytes that they are, in each locale."""
    plain = guest_sees(kind, tmp_path / "plain")
    given = {"LC_ALL": name, "PYTHONUTF8": mode, "PYTHONCOERCECLOCALE": "0"}
    assert guest_sees(kind, tmp_path / "other", **given) == plain
    assert "ü".encode() in os.listdir(os.fsencode(tmp_path / "other"))


def test_the_groups_are_not_the_guests(kind: str, tmp_path: Path) -> None:
    """Of a VMM that runs as root, what the guest makes is its user's and group's, whatever groups the VMM has."""
    if os.geteuid() != 0:
        pytest.skip("needs root, which may give files to others")
    plain = guest_sees(kind, tmp_path / "plain")

    def join() -> None:
        os.setgroups([1000, 1001])
        os.setgid(1000)

    assert guest_sees(kind, tmp_path / "other", inherit=join) == plain
    for name in ("d777", "n777", "f777", "link"):
        found = (tmp_path / "other" / name).lstat()
        assert (found.st_uid, found.st_gid) == (7, 8)


def test_the_environment_is_not_the_guests(kind: str, tmp_path: Path) -> None:
    """Variables that programs heed change nothing."""
    plain = guest_sees(kind, tmp_path / "plain")
    given = {"TZ": "Asia/Tokyo", "TMPDIR": "/nonexistent", "HOME": "/nonexistent", "POSIXLY_CORRECT": "1", "LANG": "xx"}
    assert guest_sees(kind, tmp_path / "other", **given) == plain


def test_limits_that_bound_the_process_bound_no_file(kind: str, tmp_path: Path) -> None:
    """Limits of locked memory, priority, core files, pending signals and locks change nothing."""
    plain = guest_sees(kind, tmp_path / "plain")

    def limit() -> None:
        for one in ("MEMLOCK", "CORE", "SIGPENDING", "MSGQUEUE", "NICE", "RTPRIO"):
            resource.setrlimit(getattr(resource, f"RLIMIT_{one}"), (0, 0))
        ctypes.CDLL(None).prctl(4, 0)  # PR_SET_DUMPABLE

    assert guest_sees(kind, tmp_path / "other", inherit=limit) == plain


def test_the_user_namespace_is_not_the_guests(kind: str, tmp_path: Path) -> None:
    """Of a VMM that is root of a user namespace alone, as in a rootless container, other users can work."""
    prefix = ("unshare", "--user", "--map-root-user")
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs user namespaces")
    plain = [line.partition(" [")[0] for line in guest_sees(kind, tmp_path / "plain")]
    there = [line.partition(" [")[0] for line in guest_sees(kind, tmp_path / "other", prefix=prefix)]
    assert there == plain
    assert (tmp_path / "other" / "f640").stat().st_uid == os.getuid()
