"""The roster of running machines: who is on it, who was killed, and what strangers and hostile files cannot do."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import cardcage_fleet
import pytest
from cardcage.errors import HostError
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage_fleet import roster, stats_of
from cardcage_fleet.membership import record_of
from cardcage_fleet.oom import why_ended
from cardcage_fleet.roster import Roster, RosterEntry, ask, parse_entry, pid_namespace
from cardcage_fleet.rundir import run_directory
from hypothesis import given
from hypothesis import strategies as st
from scripted import Scripted

LONER = """
import sys
sys.path.insert(0, {tests!r})
import cardcage_fleet
from cardcage.host import Host
from cardcage.machine import Machine
from scripted import Scripted
table = {{"machine": {{"name": "loner", "memory": "2M", "platform": "none", "accel": ["scripted"]}}}}
vm = Machine(host=Host([Scripted(), cardcage_fleet], installed=False), fragments=[table])
print("built", flush=True)
sys.stdin.read()
"""


pytestmark = pytest.mark.usefixtures("runtime")


def machine(name: str = "lab", **keys: object) -> Machine:
    table = {"machine": {"name": name, "memory": "2M", "platform": "none", "accel": ["scripted"], **keys}}
    return Machine(host=Host([Scripted(), cardcage_fleet], installed=False), fragments=[table])


def loner() -> subprocess.Popen[str]:
    """A machine in a process of its own, which waits."""
    program = LONER.format(tests=str(Path(__file__).parents[1]))
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "built\n"
    return process


def test_a_machine_is_on_the_roster_while_it_lives(runtime: Path) -> None:
    """From build to close a machine of this or another process is there, with its state, and nothing is left then."""
    other = loner()
    with machine(priority=-5) as vm:
        alive, ended, problems = Roster().read()
        assert sorted(one.name for one in alive) == ["lab", "loner"]
        assert (ended, problems) == ([], [])
        (mine,) = (one for one in alive if one.name == "lab")
        assert (mine.pid, mine.size, mine.promised, mine.priority) == (os.getpid(), 2 << 20, 2 << 20, -5)
        assert mine.start == vm.memory.ranges[0].block.host_address
        assert mine.here
        vm.start()
        assert next(one for one in Roster().read()[0] if one.name == "lab").state == "running"
    other.communicate("")
    assert Roster().read() == ([], [], [])
    assert sorted(one.name for one in runtime.rglob("*")) == ["lock", "machines"]
    assert stat.S_IMODE(runtime.stat().st_mode) == 0o700


def test_a_machine_that_cannot_be_built_leaves_no_entry() -> None:
    """What fails after admission takes the machine off the roster again."""
    from cardcage.errors import ConfigError

    with pytest.raises(ConfigError):
        machine(console="stdio")
    assert Roster().read() == ([], [], [])


def test_a_killed_machine_is_told_from_a_live_one() -> None:
    """After SIGKILL the entry stays, its lock is gone, and it counts as ended whatever becomes of its pid."""
    other = loner()
    other.send_signal(signal.SIGKILL)
    other.communicate()
    alive, ended, _ = Roster().read()
    assert ([one.name for one in alive], [one.name for one in ended]) == ([], ["loner"])
    assert why_ended(ended[0], {}) == "its process was killed or crashed"
    assert why_ended(ended[0], {other.pid: "Out of memory"}) == "killed by the kernel's OOM killer of the host"
    Roster().forget(ended[0])
    assert Roster().read() == ([], [], [])


def forged(runtime: Path, number: int, name: str) -> Path:
    """The place of an entry that is not written by a machine of ours."""
    folder = runtime / "machines" / f"{number}-0+{name}"
    folder.mkdir(mode=0o700, parents=True)
    return folder / f"{number}-0.json"


def test_an_old_ended_entry_is_tidied_away(runtime: Path) -> None:
    """An entry that nobody asked about for a day goes when the next machine starts; a fresh one stays."""
    Roster()
    for number, age in ((1, 90000), (2, 10)):
        path = forged(runtime, number, "old")
        path.write_text(json.dumps({"name": "old", "pid": number, "size": 1, "since": time.time() - age}))
        os.utime(path, (time.time() - age,) * 2)
    with machine():
        assert [one.pid for one in Roster().read()[1]] == [2]


def test_two_machines_of_one_process_are_two_entries() -> None:
    """Each machine has a file of its own."""
    with machine("one"), machine("two"):
        assert [one.name for one in Roster().read()[0]] == ["one", "two"]


def test_a_host_reads_an_entry_once(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A further machine of a host looks at all entries, and parses those that are new or have changed."""
    parse, parsed = roster.parse_entry, []
    monkeypatch.setattr(roster, "parse_entry", lambda text, file: parsed.append(file) or parse(text, file))
    host = Host([Scripted(), cardcage_fleet], installed=False)
    runtime.mkdir(mode=0o700, exist_ok=True)
    other = forged(runtime, 1, "other")
    other.write_text(json.dumps({"name": "other", "pid": 1, "size": 1, "since": time.time()}))

    def build() -> None:
        parsed.clear()
        table = {"machine": {"name": "lab", "memory": "2M", "platform": "none", "accel": ["scripted"]}}
        Machine(host=host, fragments=[table]).close()

    build()
    assert parsed == [str(other)]
    build()
    assert parsed == []
    other.write_text(json.dumps({"name": "other-2", "pid": 1, "size": 1, "since": time.time()}))
    build()
    assert parsed == [str(other)]


def test_where_the_roster_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """XDG_RUNTIME_DIR comes first when it is an absolute path, then the directories of the system."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", "relative")
    assert run_directory().is_absolute()
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert run_directory() == Path(f"/tmp/cardcage-{os.geteuid()}")


def test_a_directory_that_others_can_enter_is_refused(runtime: Path) -> None:
    """A directory with wider permissions, of another user, or behind a symlink is no roster; the machine still runs."""
    runtime.mkdir(mode=0o755)
    runtime.chmod(0o755)
    with pytest.raises(HostError, match="0700"):
        Roster()
    with machine() as vm:
        assert record_of(vm) is None
        assert stats_of(vm).size == 2 << 20
    runtime.rmdir()
    elsewhere = runtime.parent / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    runtime.symlink_to(elsewhere)
    with pytest.raises(HostError, match="0700"):
        Roster()
    runtime.unlink()
    if os.geteuid() == 0:
        runtime.mkdir(mode=0o700)
        os.chown(runtime, 65534, 65534)
        with pytest.raises(HostError, match="this user's"):
            Roster()


def test_hostile_files_are_named_and_passed_over(runtime: Path) -> None:
    """Nonsense, too long, of the wrong type, fifos, symlinks and directories stop nobody from reading the rest."""
    with machine() as vm:
        record = record_of(vm)
        assert record is not None
        runtime = record.folder
        (runtime / "a.json").write_text("nonsense")
        (runtime / "b.json").write_bytes(b'{"name": "' + b"x" * 100000 + b'"}')
        (runtime / "c.json").write_text('{"name": 5, "pid": 1, "size": 1}')
        (runtime / "d.json").write_text('{"name": "d", "pid": true, "size": 1}')
        (runtime / "e.json").symlink_to("/etc/passwd")
        os.mkfifo(runtime / "f.json")
        (runtime / "g.json").mkdir()
        (runtime / "h.json").write_text('{"name": "d", "pid": 1e999, "size": 1}')
        (runtime / "i.json").write_text("[" * 5000)
        alive, ended, problems = Roster().read()
        assert [one.name for one in alive] == ["lab"]
        assert ended == []
        assert len(problems) == 9


def test_a_folder_has_the_entries_of_its_own_machine_only(runtime: Path) -> None:
    """An entry with another machine's name is a problem, not that machine; copies are where their parent is, and of a
    folder with any number of files so many are looked at."""
    with machine("lab") as vm:
        record = record_of(vm)
        assert record is not None
        for name in ("web", "la", "labs", "lab-7", "lab 8"):
            (record.folder / f"{name}.json").write_text(json.dumps({"name": name, "pid": 1, "size": 1}))
        alive, ended, problems = Roster().read()
        assert ([one.name for one in alive], [one.name for one in ended]) == (["lab"], ["lab-7"])
        assert len(problems) == 4
        assert all("another name" in one for one in problems)
        for number in range(roster.FILES):
            (record.folder / f"x{number}.json").touch()
        assert sum(map(len, Roster().read())) <= roster.FILES


@pytest.mark.parametrize("name", ["a/b", "..", "ü" * 100, "a+b", "x" * 255, "%"])
def test_any_name_has_a_folder(name: str) -> None:
    """Whatever a machine is called, its folder is in the roster's directory, and it is found there."""
    with machine(name):
        assert [one.name for one in Roster().read()[0]] == [name]
    assert Roster().read() == ([], [], [])


@given(st.one_of(st.binary(max_size=200), st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.dictionaries(st.sampled_from(["name", "pid", "size", "start", "state", "since", "x"]), inner),
).map(lambda value: json.dumps(value).encode())))  # fmt: skip
def test_any_entry_parses_or_is_refused(text: bytes) -> None:
    """Whatever a file holds, the parser gives an entry with sane values or raises ValueError."""
    try:
        entry = parse_entry(text)
    except ValueError:
        return
    assert entry.pid > 0
    assert entry.size >= 0
    assert entry.start >= 0
    assert entry.name.isprintable()


def say(server: socket.socket, text: bytes) -> None:
    """Answer one caller; it may go away before it has read all."""
    caller, _ = server.accept()
    with caller, contextlib.suppress(BrokenPipeError):
        caller.sendall(text)


def test_asking_waits_for_nobody(runtime: Path) -> None:
    """A socket that never answers, answers nonsense or too much, or is not there gives None in time."""
    Roster()
    entry = RosterEntry("x", 1, 1, balloon=True, file=str(runtime / "1-0.json"))
    assert ask(entry) is None
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(runtime / "1-0.sock"))
    server.listen()
    assert ask(entry, timeout=0.01) is None
    for text in (b"nonsense", b"[1]", b'{"a": -1, "b": "x", "c": true, "d": 7}', b" " * 100000):
        server.close()
        (runtime / "1-0.sock").unlink()
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(runtime / "1-0.sock"))
        server.listen()
        thread = threading.Thread(target=say, args=(server, text))
        thread.start()
        assert ask(entry, timeout=5) in (None, {"d": 7})
        thread.join()
    server.close()


def test_another_user_gets_no_answer(runtime: Path) -> None:
    """The socket tells its owner and root; a caller with another uid is sent away empty, were it to get that far."""
    if os.geteuid():
        pytest.skip("needs root, to be another user for once")
    record = Roster().add(RosterEntry("x", os.getpid(), 1, namespace=pid_namespace()))
    server = record.listen()
    for folder in (record.folder, record.folder.parent, runtime, *list(runtime.parents)[:-1]):
        folder.chmod(folder.stat().st_mode | 0o055)
    Path(record.entry.file).with_suffix(".sock").chmod(0o777)
    program = (
        "import os, socket, sys; os.setuid(int(sys.argv[2])); s = socket.socket(socket.AF_UNIX); "
        "s.connect(f'/proc/self/fd/{os.open(sys.argv[1], os.O_PATH)}/' + sys.argv[3]); "
        "sys.stdout.write(str(len(s.recv(100))))"
    )
    name = Path(record.entry.file).with_suffix(".sock").name
    for user, length in ((65534, "0"), (0, "18")):
        caller = subprocess.Popen(
            [sys.executable, "-c", program, str(record.folder), str(user), name], stdout=subprocess.PIPE, text=True
        )
        server.setblocking(True)
        record.answer(lambda: {"ballooned": 4096})
        assert caller.communicate()[0][:2].strip() == length or user == 0
    record.close()


def test_admission_waits_for_its_turn(runtime: Path) -> None:
    """The roster's lock is held by one at a time, across processes (flock)."""
    roster = Roster()
    with roster.locked():
        fd = os.open(runtime / "lock", os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(fd)


def test_a_copys_entry_beside_one_left_behind(tmp_path: Path) -> None:
    """A copy's entry is in its parent's folder, and has another number where a killed process of its pid left one."""
    roster = Roster(tmp_path)
    parent = roster.add(RosterEntry("web", os.getpid(), 1 << 20, state="running"))
    (parent.folder / f"{os.getpid()}-1.json").write_text("{}")
    copy = parent.copy({"name": "web-7", "balloon": False})
    copy2 = parent.copy({"name": "web-8"})
    found = {one.name: one for one in roster.read()[0]}
    assert set(found) == {"web", "web-7", "web-8"}
    assert found["web-7"].state == "running"
    assert Path(found["web-7"].file).name == f"{os.getpid()}-2.json"
    for one in (copy, copy2, parent):
        one.close()
    assert [one.name for one in parent.folder.iterdir()] == [f"{os.getpid()}-1.json"]
