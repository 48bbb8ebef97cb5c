"""The verbs' part on the host: a machine's process, its service manager, completions and manual pages."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from cardcage.config import Place
from cardcage.errors import ConfigError, Denied
from cardcage.host import Host
from cardcage.security import Act
from cardcage_verbs.notify import notify
from cardcage_verbs.process import _enter, parse_cpus
from cardcage_verbs.shell import pages, parser_of
from hypothesis import given
from hypothesis import strategies as st
from installed import PROGRAM, cardcage
from verbs_kit import machine

ROOT = Path(__file__).parents[2]
OFF = bytes.fromhex("ba0406b80020eff4")
"""A boot sector that powers off by ACPI."""
MACHINE = '[machine]\naccel = "tcg"\nmemory = "4M"\n[boot]\nprotocol = "raw"\nimage = "guest.bin"\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "vm.toml").write_text(MACHINE)
    (tmp_path / "guest.bin").write_bytes(OFF)
    return tmp_path


@given(st.sets(st.integers(0, 200), min_size=1, max_size=20))
def test_cpus_are_read(numbers: set[int]) -> None:
    """Numbers and ranges of CPUs, in whichever order, are the set that they name."""
    assert parse_cpus(",".join(map(str, numbers))) == numbers
    assert parse_cpus(f"{min(numbers)}-{max(numbers)}") == set(range(min(numbers), max(numbers) + 1))


@pytest.mark.parametrize("text", ["", "a", "3-1", "1-", "-1", "1,,2", "1-2-3", "99999", "999999999999"])
def test_what_names_no_cpus_is_refused(text: str) -> None:
    """Anything else is an error."""
    with pytest.raises(ValueError, match="CPUs"):
        parse_cpus(text)


def test_a_process_has_its_cpus_and_niceness(folder: Path) -> None:
    """All threads of the machine's process run where and as it says; it is in its jail all the same."""
    (folder / "guest.bin").write_bytes(bytes.fromhex("ebfe"))
    cpu = min(os.sched_getaffinity(0))
    words = ("--set", f'policy.process.cpus="{cpu}"', "--set", "policy.process.nice=7", "--name", "lab")
    assert cardcage("run", "-d", "vm.toml", *words, folder=folder).stdout == "lab\n"
    try:
        (entry,) = (folder / "cardcage" / "machines").rglob("*.json")
        pid = int(entry.stem.partition("-")[0])
        threads = [int(one) for one in os.listdir(f"/proc/{pid}/task")]
        assert len(threads) > 1
        assert {(frozenset(os.sched_getaffinity(one)), os.getpriority(os.PRIO_PROCESS, one)) for one in threads} == {
            (frozenset({cpu}), 7)
        }
    finally:
        cardcage("kill", "lab")


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("cpus", '"x"', "policy.process.cpus: expected CPUs such as"),
        ("cpus", '"4999"', "may run on none of these CPUs"),
        ("nice", "20", "policy.process.nice"),
        ("cgroup", '"/tmp/x"', "expected a directory of a cgroup file system"),
        ("nise", "1", 'no such key. Did you mean "nice"?'),
    ],
)
def test_what_the_host_has_not_is_refused(key: str, value: str, why: str, folder: Path) -> None:
    """A CPU that is not there, a niceness or a group that is none: one line, status 2, and no machine."""
    done = cardcage("run", "vm.toml", "--set", f"policy.process.{key}={value}", folder=folder)
    assert (done.returncode, why in done.stderr.splitlines()[-1]) == (2, True), done.stderr


@pytest.mark.usefixtures("runtime")
def test_a_library_leaves_its_process_alone() -> None:
    """In a program that is not there for the machine, the keys are refused."""
    from cardcage.machine import Machine

    table = {"machine": {"memory": "2M", "platform": "none", "accel": ["scripted"]}, "policy": {"process": {}}}
    with machine() as vm:  # noqa: SIM117
        with pytest.raises(ConfigError, match="only for a process that is there for its machine"):
            Machine(host=vm.host, fragments=[table])


def test_a_service_manager_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Word comes when the guest runs, and when it has ended; a socket that is not there costs one log line."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(folder / "notify"))
        manager.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", str(folder / "notify"))
        words = ("--name", "lab", "--set", "security.jail=require", "--set", 'policy.security="default"')
        done = cardcage("run", "vm.toml", *words, folder=folder)
        assert done.returncode == 0, done.stderr
        assert manager.recv(100) == b"STATUS=machine lab runs\nREADY=1"
        assert manager.recv(100) == b"STATUS=machine lab has ended\nSTOPPING=1"
    monkeypatch.setenv("NOTIFY_SOCKET", str(folder / "none"))
    done = cardcage("run", "vm.toml", folder=folder)
    assert (done.returncode, "the service manager cannot be told" in done.stderr) == (0, True)


class Refusing:
    """A security card's checker that refuses what it is asked, and keeps it."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, tuple[str, ...], object]] = []

    def check(self, act: Act, /) -> None:
        self.asked.append((act.tclass, act.permissions, act.facts["name"]))
        raise Denied(str(act))


@pytest.mark.usefixtures("runtime")
def test_what_the_host_gives_is_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control group and the service manager's socket are acts of the operator's: refused, neither is touched."""
    (tmp_path / "cgroup.procs").touch()
    monkeypatch.setenv("NOTIFY_SOCKET", "@manager")
    refusing = Refusing()
    with machine() as vm:
        with monkeypatch.context() as patched:
            patched.setattr(vm.mediator, "checkers", (refusing,))
            for group in (tmp_path, tmp_path / "new"):
                with pytest.raises(Denied):
                    _enter(vm, str(group), Place())
            with pytest.raises(Denied):
                notify(vm)
        assert refusing.asked == [
            ("image", ("write",), str(tmp_path)),
            ("image", ("create", "write"), str(tmp_path / "new")),
            ("socket", ("connect",), "unix:@manager"),
        ]
    assert (tmp_path / "cgroup.procs").read_text() == ""
    assert not (tmp_path / "new").exists()


@pytest.mark.once
def test_the_unit_is_one(tmp_path: Path) -> None:
    """systemd finds no fault in the example's unit."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd")
    text = (ROOT / "examples" / "systemd" / "cardcage@.service").read_text()
    unit = tmp_path / "cardcage@.service"
    unit.write_text(text.replace("/usr/local/bin/cardcage", shutil.which("true") or "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.once
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completions_are_a_shells(shell: str, tmp_path: Path) -> None:
    """Each shell takes its completions; all commands are in them, and where the names of machines come from."""
    pytest.importorskip("shtab")
    done = cardcage("completion", shell)
    assert done.returncode == 0, done.stderr
    for word in ("detach", "console", "cardcage ps -q", "drive"):
        assert word in done.stdout
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    (tmp_path / "made").write_text(done.stdout)
    told = subprocess.run([shell, "-n", tmp_path / "made"], capture_output=True, text=True, check=False)
    assert (told.returncode, told.stderr) == (0, "")


@pytest.mark.once
def test_bash_completes_commands() -> None:
    """In bash, the beginning of a command is completed by those there are."""
    pytest.importorskip("shtab")
    script = cardcage("completion", "bash").stdout + (
        "\nCOMP_WORDS=(cardcage res); COMP_CWORD=1; _shtab_cardcage_tab=; "
        "$(complete -p cardcage | sed 's/.*-F \\([^ ]*\\).*/\\1/'); echo \"${COMPREPLY[@]}\"\n"
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["resume"], done.stderr


@pytest.mark.once
def test_manual_pages_are_whole(tmp_path: Path) -> None:
    """There is a page for each command, with its flags; roff warns of none; an unknown command is an error."""
    made = pages(parser_of(Host()))
    assert {"cardcage", "cardcage-run", "cardcage-boot", "cardcage-exec", "cardcage-image"} <= made.keys()
    assert "\\fB\\-\\-detach\\fR" in made["cardcage-run"]
    assert ".SH CONVERT" in made["cardcage-image"]
    assert cardcage("man", "--directory", str(tmp_path / "man1")).returncode == 0
    assert {one.stem for one in (tmp_path / "man1").iterdir()} == made.keys()
    assert cardcage("man", "nothing").returncode == 2
    if shutil.which("groff"):
        files = sorted((tmp_path / "man1").iterdir())
        done = subprocess.run(["groff", "-man", "-ww", "-z", *files], capture_output=True, text=True, check=False)
        assert done.stderr == ""


def test_a_page_is_shown() -> None:
    """Where standard output is no terminal, a page is printed."""
    done = subprocess.run([*PROGRAM, "man", "stop"], capture_output=True, text=True, check=False)
    assert done.stdout.startswith('.TH "CARDCAGE-STOP" "1"')
