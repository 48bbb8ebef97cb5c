"""The jail around a process with a running machine: what host code that a guest got to run could still do."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cardcage.errors import ConfigError, HostError
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage.security import Needs
from cardcage_jail import landlock, seccomp
from cardcage_jail.calls import NUMBERS, name_of
from cardcage_jail.jail import CAPABILITIES, joined

GUEST = bytes.fromhex("baf400b000eef4")  # mov dx,0xf4; mov al,0; out dx,al; hlt

CARD = '''
"""A card with a hole: at the guest's first access, it runs host code that does what an intruder would."""

import json, os
from cardcage.device import Pio
from cardcage.hookspecs import hookimpl


class Hole:
    def plug(self, slot):
        self._power = slot.power

    def read(self, offset, size):
        return 0

    def write(self, offset, size, value):
        import acts
        found = acts.all_of_them(json.loads(os.environ["ACTS"]))
        os.write(int(os.environ["TOLD"]), json.dumps(found).encode())
        self._power.exit(0)


@hookimpl
def cardcage_register(registry):
    registry.device("hole", Hole, regions=(Pio(8, base=0xF4),))
'''

ACTS = '''
"""Each act is a raw system call, as an intruder's would be; the result is an error in words, or "done"."""

import ctypes, mmap, os

READ, PAGE = 0, 4096
libc = ctypes.CDLL(None, use_errno=True)


def call(number, *values):
    """The raw system call: the C library's wrappers and Python's checks are not between it and the kernel."""
    libc.syscall.restype = ctypes.c_long
    kept = [ctypes.c_long(one) if isinstance(one, int) else one for one in values]
    found = libc.syscall(ctypes.c_long(number), *kept)
    return "done" if found >= 0 else os.strerror(ctypes.get_errno())


def all_of_them(given):
    secret, disk = given["secret"].encode(), given["disk"].encode()
    null, at = None, ctypes.c_long(-100)
    unix = (ctypes.c_char * 110)(*b"\\x01\\x00" + given["unix"].encode())
    argv = (ctypes.c_char_p * 2)(b"/bin/true", None)
    void = (ctypes.c_long * 64)()
    mine = os.open(__file__, os.O_RDONLY)
    return {
        "read a file": call(257, at, secret, os.O_RDONLY),
        "write another machine's disk": call(257, at, disk, os.O_RDWR),
        "cut a file short": call(76, secret, 0),
        "make a file": call(257, at, secret + b".new", os.O_WRONLY | os.O_CREAT, 0o600),
        "remove a file": call(87, secret),
        "rename a file": call(82, secret, secret + b".old"),
        "make a directory": call(83, secret + b".d", 0o700),
        "make a device": call(133, secret + b".dev", 0o20600, 0x103),
        "make a block device in a directory": call(259, at, secret + b".blk", 0o60600, 0x800),
        "make a link": call(88, b"/etc/passwd", secret + b".l"),
        "write memory by /proc": call(257, at, b"/proc/self/mem", os.O_RDWR),
        "open a device": call(257, at, b"/dev/tty", os.O_RDWR),
        "make a TCP socket": call(41, 2, 1, 0),
        "make a Unix socket": call(41, 1, 1, 0),
        "connect": call(42, mine, unix, 110),
        "execute a program": call(59, b"/bin/true", argv, null),
        "execute an open program": call(322, mine, b"", argv, null, 0x1000),
        "make a process": call(56, 17, 0, 0, 0, 0),
        "make a process by fork": call(57),
        "trace a process": call(101, 16, given["victim"], 0, 0),
        "read a process's memory": call(310, given["victim"], void, 1, void, 1, 0),
        "signal a process": call(62, given["victim"], 9),
        "signal a process's thread": call(234, given["victim"], given["victim"], 9),
        "signal all processes": call(62, -1, 0),
        "map a file writable and executable": call(9, 0, PAGE, 7, 2, mine, 0),
        "make memory executable": call(10, ctypes.c_void_p(ctypes.addressof(void) & -PAGE), PAGE, 7),
        "map executable memory": call(9, 0, PAGE, 5, 0x22, -1, 0),
        "make a namespace": call(272, 0x10000000),
        "mount": call(165, b"none", b"/mnt", b"tmpfs", 0, null),
        "load a module": call(313, mine, b"", 0),
        "use io_uring": call(425, 1, void),
        "load a BPF program": call(321, 5, void, 64),
        "type into the terminal": call(16, 0, 0x5412, b"x"),
        "make itself dumpable": call(157, 4, 1, 0, 0, 0),
        "become another user": call(105, 12345),
        "change the root": call(161, b"/"),
        "open a file by handle": call(304, -100, void, 0),
        "watch files": call(300, 0, 0),
    }
'''


@pytest.fixture
def victim() -> Iterator[int]:
    """A process that an intruder would like to reach."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid
        assert process.poll() is None, "it was ended"
        process.communicate(b"\n")


def run_hole(tmp_path: Path, victim: int, accel: str) -> tuple[dict[str, str], str]:
    """Run a guest that gets the card to run its acts; return what became of each, and what was written to stderr."""
    home, other = tmp_path / "home", tmp_path / "other"
    home.mkdir()
    other.mkdir()
    (home / "guest.bin").write_bytes(GUEST)
    (home / "card.py").write_text(CARD)
    (home / "acts.py").write_text(ACTS)
    (home / "run.py").write_text(
        "import sys, card\nfrom cardcage_cli import main\nif __name__ == '__main__': sys.exit(main(cards=[card]))\n"
    )
    (home / "vm.toml").write_text(
        f'[machine]\nmemory = "16M"\nplatform = "none"\naccel = ["{accel}"]\n[boot]\nprotocol = "raw"\n'
        f'image = "guest.bin"\n[[device]]\ntype = "hole"\n'
    )
    for name in ("secret", "disk"):
        (other / name).write_text("kept")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(other / "socket"))
        unix.listen()
        given = {
            "secret": str(other / "secret"),
            "disk": str(other / "disk"),
            "unix": str(other / "socket"),
            "victim": victim,
        }
        reader, writer = os.pipe()
        done = subprocess.run(
            [sys.executable, "run.py", "run", "vm.toml"],
            cwd=home,
            env={**os.environ, "ACTS": json.dumps(given), "TOLD": str(writer)},
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
    assert (other / "secret").read_text() == (other / "disk").read_text() == "kept"
    assert sorted(one.name for one in other.iterdir()) == ["disk", "secret", "socket"]
    return json.loads(text), done.stderr


@pytest.mark.parametrize("kind", ["tcg", "kvm"])
def test_an_intruder_gets_nowhere(tmp_path: Path, victim: int, kind: str) -> None:
    """Host code in the VMM's process is refused each of 38 acts that no machine needs; the log names them."""
    if kind == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("/dev/kvm is missing, or may not be used")
    found, log = run_hole(tmp_path, victim, kind)
    assert len(found) == 38
    assert {act: why for act, why in found.items() if why not in ("Permission denied", "Operation not permitted")} == {}
    for call in (
        "socket",
        "connect",
        "execve",
        "clone",
        "fork",
        "ptrace",
        "process_vm_readv",
        "kill",
        "io_uring_setup",
    ):
        assert f"jail: refused {call}" in log


STATUS = """
import glob, sys
from cardcage.device import Pio
from cardcage.hookspecs import hookimpl
from cardcage.security import Needs

class Panel:
    def plug(self, slot):
        self._power = slot.power
    def read(self, offset, size):
        return 0
    def needs(self):
        return Needs(read=("{allowed}",))
    def write(self, offset, size, value):
        seen = set()
        for name in glob.glob("/proc/self/task/*/status"):
            lines = dict(line.split(":", 1) for line in open(name).read().splitlines())
            seen.add(tuple(lines[key].strip() for key in ("NoNewPrivs", "Seccomp", "CapEff", "CapPrm")))
        print(sorted(seen))
        for path in ("{allowed}", "{other}"):
            try:
                print(open(path).read())
            except PermissionError:
                print("refused")
        sys.stdout.flush()
        self._power.exit(0)

@hookimpl
def cardcage_register(registry):
    registry.device("panel", Panel, regions=(Pio(8, base=0xF4),))

from cardcage_cli import main
if __name__ == "__main__":
    sys.exit(main(cards=[sys.modules["__main__"]]))
"""


def run_panel(tmp_path: Path, *words: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """A machine with a device that says what its process may do, and needs one file of two."""
    (tmp_path / "guest.bin").write_bytes(GUEST)
    (tmp_path / "vm.toml").write_text(
        '[machine]\nmemory = "16M"\nplatform = "none"\naccel = ["tcg"]\n[boot]\nprotocol = "raw"\n'
        'image = "guest.bin"\n[[device]]\ntype = "panel"\n'
    )
    files = tmp_path / "files"
    files.mkdir()
    (files / "a").write_text("of the panel")
    (files / "b").write_text("of somebody else")
    program = tmp_path / "code" / "run.py"
    program.parent.mkdir()
    program.write_text(before + STATUS.replace("{allowed}", str(files / "a")).replace("{other}", str(files / "b")))
    return subprocess.run(
        [sys.executable, str(program), "run", "vm.toml", *words],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_all_threads_are_in_the_jail_and_needs_are_met(tmp_path: Path) -> None:
    """Every thread has given up its capabilities and has a filter; a file that a device states is still opened."""
    done = run_panel(tmp_path)
    assert done.returncode == 1, done.stderr
    threads, first, second = done.stdout.splitlines()
    assert threads == "[('1', '2', '0000000000000000', '0000000000000000')]"
    assert (first, second) == ("of the panel", "refused")


def test_files_that_the_configuration_names_are_opened_later(tmp_path: Path) -> None:
    """What ``security.open_later`` names beside its file is opened in the jail; a wrong value is refused by its key."""
    done = run_panel(tmp_path, before="")
    assert done.stdout.splitlines()[1:] == ["of the panel", "refused"], done.stderr
    table = tmp_path / "vm.toml"
    table.write_text(f'{table.read_text()}[security]\nopen_later = ["files/b"]\n')
    run = [sys.executable, str(tmp_path / "code" / "run.py"), "run", str(table)]
    done = subprocess.run(run, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[1:] == ["of the panel", "of somebody else"], done.stderr
    for value, words in (
        ("files", "security.open_later: expected a list of paths, got 'files'"),
        ('["nothing"]', "security.open_later[0]: /nothing: expected a file or directory that is there"),
    ):
        done = subprocess.run(
            [*run, "--set", f"security.open_later={value}"], cwd="/", capture_output=True, text=True, check=False
        )
        assert done.returncode not in (0, 1), done.stderr
        assert done.stderr.splitlines()[-1].endswith(words)
        assert done.stdout == ""


DEAF = """
import signal, threading
from cardcage_jail.threads import in_all_threads

def deaf():
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    ready.set()
    done.wait()

ready, done = threading.Event(), threading.Event()
thread = threading.Thread(target=deaf)
thread.start()
ready.wait()
in_all_threads([(157, (38, 1, 0, 0, 0))])  # prctl(PR_SET_NO_NEW_PRIVS)
print("NoNewPrivs:\\t1" in open(f"/proc/self/task/{thread.native_id}/status").read())
done.set()
"""


def test_a_thread_that_blocks_all_signals_is_reached() -> None:
    """A thread that blocks every signal that it can, as one that serves a disk does, is in the jail too."""
    ran = subprocess.run([sys.executable, "-c", DEAF], capture_output=True, text=True, timeout=60)
    assert (ran.stdout, ran.stderr) == ("True\n", "")


def test_the_jail_can_be_left_off(tmp_path: Path) -> None:
    """With ``security.jail = "off"`` nothing is given up."""
    done = run_panel(tmp_path, "--set", "security.jail=off")
    assert done.returncode == 1, done.stderr
    threads, first, second = done.stdout.splitlines()
    assert "'0', '0'" in threads
    assert (first, second) == ("of the panel", "of somebody else")


WITHOUT = f"""
import ctypes, struct
steps = [(0x20, 0, 0, 0), (0x15, 0, 1, {landlock.CREATE_RULESET}), (6, 0, 0, 0x50026), (6, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *one) for one in steps))
libc = ctypes.CDLL(None)
libc.prctl(38, 1, 0, 0, 0)
program = struct.pack("<HxxxxxxQ", len(steps), ctypes.addressof(code))
assert libc.prctl(22, 2, program, 0, 0) == 0
"""
"""Makes the kernel answer as one without Landlock."""


def test_a_host_without_landlock(tmp_path: Path) -> None:
    """Where the kernel has no Landlock, the rest is given up with one line, and ``require`` refuses to run."""
    done = run_panel(tmp_path, before=WITHOUT)
    assert done.returncode == 1, done.stderr
    assert "no jail, or half a jail" in done.stderr
    assert "the host's kernel has no Landlock" in done.stderr
    assert "('1', '2', '0000000000000000', '0000000000000000')" in done.stdout
    again = tmp_path / "again"
    again.mkdir()
    done = run_panel(again, "--set", "security.jail=require", before=WITHOUT)
    assert done.returncode == 70
    assert done.stderr.splitlines()[-1] == (
        'outcome: host or accelerator failure: security.jail = "require": the host\'s kernel has no Landlock'
    )
    assert done.stdout == ""


def test_a_library_users_process_is_left_alone() -> None:
    """A machine made from Python has no jail unless it asks for one; a wrong value is refused by its key."""
    from cardcage_jail.jail import wanted

    def machine(**security: str) -> Machine:
        return Machine(memory="16M", machine={"platform": "none"}, fragments=[{"security": security}], host=host)

    with Host() as host:
        assert [wanted(machine()), wanted(machine(jail="require"))] == ["off", "require"]
        with pytest.raises(ConfigError, match=r'security.jail: expected one of "on", "off", "require", got \'maybe\''):
            wanted(machine(jail="maybe"))
        host.owns_process = True
        assert wanted(machine()) == "on"


def test_needs_are_joined() -> None:
    """The needs of all cards together are each one's."""
    one, two = Needs(read=("/a",), sockets=("unix",)), Needs(read=("/b", "/a"), write=("/c",), capabilities=("chown",))
    assert joined([one, two]) == Needs(("/a", "/b"), ("/c",), (), ("unix",), ("chown",))


def test_numbers_and_names_are_the_kernels() -> None:
    """The tables of system calls and capabilities agree with the headers of the C library."""
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    lines = [line.split() for line in header.read_text().splitlines() if line.startswith("#define __NR_")]
    theirs = {name.removeprefix("__NR_"): int(number) for _, name, number in lines}
    assert {name: NUMBERS[name] for name in theirs} == theirs
    assert name_of(9999) == "9999"
    header = Path("/usr/include/linux/capability.h")
    found = [line.split() for line in header.read_text().splitlines() if line.startswith("#define CAP_")]
    numbers = {line[1][4:].lower(): int(line[2]) for line in found if len(line) == 3 and line[2].isdigit()}
    assert {name: number for name, number in numbers.items() if name != "last_cap"} == {
        name: number for number, name in enumerate(CAPABILITIES)
    }


def test_a_capability_that_there_is_not() -> None:
    """A card that needs a capability by a wrong name is told."""
    from cardcage_jail.jail import capset

    with pytest.raises(HostError, match='a card needs the capability "cap_chown", which there is not'):
        capset(["cap_chown"])


def test_the_filter_is_within_the_kernels_limit() -> None:
    """The program has at most 4096 instructions (BPF_MAXINSNS), with as many children as a machine may have."""
    assert len(seccomp.program(range(100, 200), ("unix", "inet"))) // 8 < 4096
