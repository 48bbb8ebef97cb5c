"""Copies of machines in their jail, and the broker outside: what a process that was taken over gets of it."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cardcage_fleet import Roster, command, find
from cardcage_snapshot.running import create
from installed import PROGRAM, open_files
from snapshot_kit import image

pytestmark = pytest.mark.once
GUEST = bytes.fromhex("baf400b000eef4")  # mov dx,0xf4; mov al,0; out dx,al; hlt

CARD = '''
"""A card with a hole, whose process may become three more."""

import json, os
from cardcage.device import Pio
from cardcage.errors import Denied
from cardcage.hookspecs import hookimpl
from cardcage.security import Needs


class Hole:
    def plug(self, slot):
        self._power = slot.power

    def needs(self):
        own, *scratch = json.loads(os.environ["STATED"])
        return Needs(write=(own,), scratch=tuple(scratch), processes=3, programs=(("/bin/false", "{fd}"),))

    def read(self, offset, size):
        return 0

    def write(self, offset, size, value):
        import acts
        found = acts.all_of_them(json.loads(os.environ["ACTS"]))
        os.write(int(os.environ["TOLD"]), json.dumps(found).encode())
        self._power.exit(0)


class Strict:
    """Refuses programs, and files without a name in one folder."""

    def check(self, act):
        if act.tclass == "program" or str(act.facts.get("name")).endswith("/refused"):
            raise Denied("not this")


@hookimpl
def cardcage_built(machine):
    machine.mediator.checkers = (*machine.mediator.checkers, Strict())


@hookimpl
def cardcage_register(registry):
    registry.device("hole", Hole, regions=(Pio(8, base=0xF4),))
'''

ACTS = '''
"""What an intruder does with forks and with the broker; each result is an error in words, or "done"."""

import ctypes, json, os, select, socket, signal
from cardcage_jail import listen_at, open_file, outside, start_program

libc = ctypes.CDLL(None, use_errno=True)


def tried(act, *values):
    try:
        found = act(*values)
    except OSError as error:
        return os.strerror(error.errno)
    if isinstance(found, int) and found > 2:
        os.close(found)
    return "done"


def asked(path, flags):
    return tried(outside.ask, {"do": "open", "path": path, "flags": flags})


def call(number, *values):
    libc.syscall.restype = ctypes.c_long
    kept = [ctypes.c_long(one) if isinstance(one, int) else one for one in values]
    return "done" if libc.syscall(ctypes.c_long(number), *kept) >= 0 else os.strerror(ctypes.get_errno())


def bombs():
    """Let nobody know, until no fork is left: those of whom the broker knew may be counted a moment longer."""
    total = 0
    while True:
        count, why = bomb(False)
        total += count
        if not count or total > 50:
            return total, why


def bomb(known):
    """Fork until it is refused; return how often it was not, and the refusal."""
    hold, release = os.pipe()
    children, why = [], "none"
    while len(children) < 50:
        ready, told = os.pipe()
        try:
            pid = os.fork()
        except OSError as error:
            why = os.strerror(error.errno)
            break
        if pid == 0:
            os.close(release)
            if known:
                os.setsid()
            try:  # one of its own is one too many, in the end
                if os.fork() == 0:
                    os.setsid() if known else None
                    os._exit(0)
            except OSError:
                pass
            os.write(told, b"x")
            os.read(hold, 1)
            os._exit(0)
        os.read(ready, 1)
        children.append(pid)
    os.close(release)
    for pid in children:
        os.waitpid(pid, 0)
    return len(children), why


def in_a_copy(given):
    """The acts of a forked process."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        argv = (ctypes.c_char_p * 2)(b"/bin/true", None)
        mine = os.open(__file__, os.O_RDONLY)
        found = {
            "execute a program": call(59, b"/bin/true", argv, None),
            "execute an open program": call(322, mine, b"", argv, None, 0x1000),
            "read a file": call(257, -100, given["secret"].encode(), os.O_RDONLY),
            "trace its parent": call(101, 16, os.getppid(), 0, 0),
            "trace the broker": call(101, 16, given["broker"], 0, 0),
            "signal a process": call(62, given["victim"], 9),
            "signal the broker": call(62, given["broker"], 9),
            "signal a thread of another": call(234, given["victim"], given["victim"], 9),
            "make a socket": call(41, 1, 1, 0),
            "make a namespace": call(56, 0x10000000 | 17, 0, 0, 0, 0),
            "make a process by fork": call(57),
            "have another's memory told": tried(open_file, f"/proc/{given['victim']}/maps", os.O_RDONLY),
            "write its memory": tried(open_file, "/proc/self/mem", os.O_RDWR),
            "its own memory told": tried(open_file, "/proc/self/maps", os.O_RDONLY),
            "a file without a name": tried(open_file, given["scratch"], os.O_TMPFILE | os.O_RDWR),
            "signal its own thread": call(234, os.getpid(), os.getpid(), 0),
        }
        os.write(writer, json.dumps(found).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    return json.loads(os.read(reader, 1 << 16))


def nonsense():
    """What is no request: none ends the broker, and none is answered but by a refusal."""
    told = set()
    for text in (b"", b"x", b"[" * 4000, b"9" * 5000, b"{}", b'{"do": 1}', b'{"do": "open"}', b"x" * 100000,
                 b'{"do": "open", "path": 1, "flags": 1}', b'{"do": "open", "path": "/", "flags": 1e99}',
                 b'{"do": "open", "path": "/", "flags": true, "more": 1}', b'{"do": "listen", "path": "a\\\\u0000b"}'):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if not text:
            continue  # an empty datagram is how the broker is told to end
        socket.send_fds(outside._ways[0], [text], [theirs.fileno()])
        theirs.close()
        ours.settimeout(30)
        answer = ours.recv(100)
        told.add(json.loads(answer)["errno"] if answer else 0)
    null = os.open("/dev/null", os.O_RDWR)
    reader, writer = os.pipe()
    for fds in ([], [null], [writer], [null, reader, writer]):
        socket.send_fds(outside._ways[0], [b'{"do": "open", "path": "/proc/self/maps", "flags": 0}'], fds)
    return sorted(os.strerror(one) for one in told)


def all_of_them(given):
    own, other, entry = given["own"], given["other"], given["entry"]
    broker = [int(one) for one in open("/proc/self/task/%d/children" % os.getpid()).read().split()]
    given["broker"] = given["broker"] or (broker or [1])[0]
    return {
        "refused": {
            "read a file": tried(open_file, given["secret"], os.O_RDONLY),
            "write a file": tried(open_file, given["secret"], os.O_RDWR),
            "make a file": tried(open_file, other + "/new", os.O_RDWR | os.O_CREAT),
            "a file without a name in another folder": tried(open_file, other, os.O_TMPFILE | os.O_RDWR),
            "by a way around": asked(given["scratch"] + "/../other", os.O_TMPFILE | os.O_RDWR),
            "by a link": (os.symlink(other, own + "/link"), asked(own + "/link", os.O_TMPFILE | os.O_RDWR))[1],
            "with other flags": asked(given["scratch"], os.O_DIRECTORY),
            "another's memory": tried(open_file, f"/proc/{given['victim']}/maps", os.O_RDONLY),
            "listen elsewhere": tried(listen_at, other + "/s"),
            "listen by a way around": tried(outside.ask, {"do": "listen", "path": own + "/../other/s"}),
            "listen at a folder": tried(outside.ask, {"do": "listen", "path": own + "/.."}),
            "listen in place of a file": (open(own + "/f", "w").close(), tried(listen_at, own + "/f"))[1],
            "write another machine's entry": call(257, -100, entry.encode(), os.O_RDWR),
            "make another machine's entry": call(257, -100, (entry + ".json").encode(), os.O_RDWR | os.O_CREAT, 0o600),
            "remove another machine's entry": call(87, entry.encode()),
            "replace another machine's folder": call(82, os.path.dirname(entry).encode(), (own + "/gone").encode()),
            "make a machine": call(83, (os.path.dirname(os.path.dirname(entry)) + "/7-0+web").encode(), 0o700),
            "hold the roster's lock": call(257, -100, given["lock"].encode(), os.O_RDONLY),
            "signal the broker": call(62, given["broker"], 9),
            "start a program": tried(start_program, ["/bin/true"]),
            "start a program otherwise": tried(start_program, ["/bin/false", "{fd}", "more"]),
            "start nothing": tried(start_program, [[], 1, None]),
            "start what policy refuses": tried(start_program, ["/bin/false", "{fd}"]),
            "make a file that policy refuses": tried(open_file, given["refused"], os.O_TMPFILE | os.O_RDWR),
        },
        "copy": in_a_copy(given),
        "known": bomb(True),
        "again": bomb(True),
        "nonsense": nonsense(),
        "still there": tried(open_file, given["scratch"], os.O_TMPFILE | os.O_RDWR),
        "listens": tried(listen_at, own + "/socket"),
        "unknown": bombs(),
        "in the end": bomb(True),
    }
'''


def test_an_intruder_with_forks_gets_nowhere(tmp_path: Path, runtime: Path) -> None:
    """Forks end at the bound, whoever forks and whether the broker knows the processes; a copy runs no program and has
    no right more; of the broker comes what was stated and nothing else; no other's entry is touched; 40 acts."""
    home, own, other = tmp_path / "home", tmp_path / "own", tmp_path / "other"
    entry = runtime / "machines" / "1-0+web" / "1-0.json"
    stated = [str(own), str(tmp_path / "scratch"), str(tmp_path / "refused")]
    for one in (home, other, entry.parent, *map(Path, stated)):
        one.mkdir(parents=True)
    runtime.chmod(0o700)
    entry.write_text(json.dumps({"name": "web", "pid": 1, "size": 1}))
    (other / "secret").write_text("kept")
    (home / "guest.bin").write_bytes(GUEST)
    (home / "card.py").write_text(CARD)
    (home / "acts.py").write_text(ACTS)
    (home / "run.py").write_text("import sys, card\nfrom cardcage_cli import main\nsys.exit(main(cards=[card]))\n")
    (home / "vm.toml").write_text(
        '[machine]\nmemory = "16M"\nplatform = "none"\naccel = ["tcg"]\n[boot]\nprotocol = "raw"\n'
        'image = "guest.bin"\n[[device]]\ntype = "hole"\n'
    )
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as victim:
        given: dict[str, object] = {
            "own": str(own),
            "other": str(other),
            "secret": str(other / "secret"),
            "entry": str(entry),
        }
        given |= {
            "lock": str(runtime / "lock"),
            "victim": victim.pid,
            "broker": 0,
            "scratch": stated[1],
            "refused": stated[2],
        }
        reader, writer = os.pipe()
        done = subprocess.run(
            [sys.executable, "run.py", "run", "vm.toml"],
            cwd=home,
            env={**os.environ, "ACTS": json.dumps(given), "TOLD": str(writer), "STATED": json.dumps(stated)},
            pass_fds=(writer,),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        os.close(writer)
        with os.fdopen(reader) as told:
            text = told.read()
        assert text, done.stderr
        assert victim.poll() is None
        victim.communicate(b"\n")
    found = json.loads(text)
    allowed = {"its own memory told", "a file without a name", "signal its own thread"}
    acts = {**found["refused"], **{f"copy: {act}": why for act, why in found["copy"].items() if act not in allowed}}
    refusals = ("Permission denied", "Operation not permitted", "Invalid cross-device link")
    assert {act: why for act, why in acts.items() if why not in refusals} == {}
    assert {found["copy"][one] for one in allowed} == {"done"}
    for bomb in ("known", "again"):
        assert 0 < found[bomb][0] <= 3, found
        assert found[bomb][1] == "Resource temporarily unavailable"
    assert found["nonsense"] == ["Permission denied"]
    assert (found["still there"], found["listens"]) == ("done", "done")
    assert found["unknown"][0] <= 3
    assert found["in the end"] == [0, "Resource temporarily unavailable"]  # what nobody knew counts for ever
    assert sorted(one.name for one in other.iterdir()) == ["secret"]
    assert (other / "secret").read_text() == "kept"
    assert json.loads(entry.read_text())["name"] == "web"
    for call in ("execve", "kill", "tgkill", "socket", "clone", "fork", "ptrace"):
        assert f"jail: refused {call}" in done.stderr


def brokers(pid: int) -> list[int]:
    """The brokers among a process's children."""
    found = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return [one for one in found if status(one).get("Name") == "jail-broker"]


def status(pid: int) -> dict[str, str]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return {}
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def test_a_machine_of_the_command_line_is_forked(
    tmp_path: Path, runtime: Path, accel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``cardcage fork`` copies a machine that runs in its jail, and a copy of it: each copy is jailed as its parent is,
    has its own entry, socket and disk, and is saved by its name; the broker ends with the last of them."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "disk.raw").write_bytes(b"a disk".ljust(65536))
    (tmp_path / "vm.toml").write_text(
        f"""
        machine = {{ name = "count", memory = "16M", accel = ["{accel}"] }}
        boot = {{ protocol = "raw", image = "{image(tmp_path)}", address = 0x7C00, mode = 16 }}
        device = [{{ type = "virtio-blk", drive = {{ file = "disk.raw", format = "raw" }} }}]
        """
    )

    def cardcage(*words: str) -> str:
        done = subprocess.run([*PROGRAM, *words], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert cardcage("run", "--detach", "vm.toml") == "count\n"
    first = int(next((runtime / "machines").rglob("*.json")).stem.partition("-")[0])
    (broker,) = brokers(first)
    with open(os.pidfd_open(broker), "rb", buffering=0) as ended:
        copies = [line.split("\t") for line in cardcage("fork", "count", "-n", "2").splitlines()]
        copies += [list(one.values()) for one in command(find(copies[0][0]), "fork", {"copies": 1})["copies"]]
        pids = [int(pid) for _, pid in copies]
        assert [name for name, _ in copies] == [f"count-{pids[0]}", f"count-{pids[1]}", f"count-{pids[0]}-{pids[2]}"]
        for pid in pids:
            for key in ("NoNewPrivs", "Seccomp", "Seccomp_filters", "CapEff", "CapPrm", "CapBnd"):
                assert status(pid)[key] == status(first)[key]
            files = open_files(pid)
            assert not [one for one in files if one.endswith("disk.raw")]
            assert [one for one in files if one.endswith(f"{pid}-0.json")]
        assert {one.name for one in Roster().read()[0]} == {"count", *(name for name, _ in copies)}
        os.kill(first, signal.SIGTERM)
        made = create(find(copies[2][0]), tmp_path / "saved", compress=False, replace=False)
        assert next(made.path.glob("disk-*")).read_bytes().startswith(b"a disk ")
        for pid in pids:
            with open(os.pidfd_open(pid), "rb", buffering=0) as gone:
                os.kill(pid, signal.SIGKILL)
                assert select.select([gone], [], [], 60)[0]  # its lock goes with it, after its sockets
        assert select.select([ended], [], [], 60)[0]
    assert Roster().read()[0] == []


@pytest.mark.skipif(not shutil.which("passt"), reason="needs passt")
def test_a_networks_engine_is_started_again(tmp_path: Path, runtime: Path) -> None:
    """When the engine of user networking dies, a machine in its jail has a new one, from the broker; and a newer one
    when that dies. They end with the machine."""
    (tmp_path / "vm.toml").write_text(
        f"""
        machine = {{ name = "net", memory = "16M", accel = ["tcg"] }}
        boot = {{ protocol = "raw", image = "{image(tmp_path)}", address = 0x7C00, mode = 16 }}
        device = [{{ type = "virtio-net", net = "user" }}]
        """
    )

    def engine(parent: int) -> list[int]:
        found = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        return [int(one) for one in found if "passt" in status(int(one)).get("Name", "")]

    with subprocess.Popen([*PROGRAM, "run", str(tmp_path / "vm.toml")], stderr=subprocess.PIPE) as process:
        try:
            while not (children := brokers(process.pid)):
                assert process.poll() is None
                time.sleep(0.01)
            (parent,), (last,) = children, engine(process.pid)
            for _ in range(2):
                os.kill(last, signal.SIGKILL)
                while not (new := [one for one in engine(parent) if one != last]):
                    time.sleep(0.01)
                (last,) = new
            with open(os.pidfd_open(last), "rb", buffering=0) as ended:
                process.terminate()
                assert select.select([ended], [], [], 60)[0]
        finally:
            process.terminate()
            _, said = process.communicate()
    assert said.count(b"user networking ended, restarting it") == 2
