"""Machines that are left running, and their end by SIGTERM: whole processes, with guests of a few instructions."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from attrs import field, frozen
from cardcage_fleet.roster import pid_namespace
from cardcage_verbs.keep import KeptFile, log_of
from installed import PROGRAM, cardcage

LISTENS = bytes.fromhex("ba0206 b80001 ef ba0006 ed f6c401 74fa")
"""Enables the power button's event (PM1_EN bit 8 at 0x602), and waits for it (PM1_STS at 0x600)."""
OFF = bytes.fromhex("ba0406 b80020 ef f4")
"""Powers off (S5)."""
FOR_EVER = bytes.fromhex("ebfe")
SAYS = bytes.fromhex("baf803 b068 ee b069 ee b00a ee")
"""Writes "hi" to COM1."""
MACHINE = """
[machine]
memory = "4M"
accel = "tcg"
name = "lab"
stop_timeout = "50ms"
[boot]
protocol = "raw"
image = "guest.bin"
"""


@frozen
class Lab:
    """A folder with a machine, and a run directory of its own."""

    folder: Path
    ran: list[str] = field(factory=list)

    def guest(self, code: bytes) -> None:
        (self.folder / "guest.bin").write_bytes(code)
        (self.folder / "vm.toml").write_text(MACHINE)

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return cardcage(*words, folder=self.folder)


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return Lab(tmp_path)


def begun(lab: Lab, *words: str) -> subprocess.Popen[str]:
    """``cardcage run`` of the machine, once its guest has written to its console."""
    process = subprocess.Popen(
        [*PROGRAM, "run", "vm.toml", *words],
        cwd=lab.folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "hi\n"
    return process


@pytest.mark.parametrize(
    ("listens", "end", "status", "outcome"),
    [
        (True, OFF, 0, "the guest powered off"),
        (True, FOR_EVER, 143, "ended by: SIGTERM"),
        (False, FOR_EVER, 143, "ended by: SIGTERM"),
    ],
    ids=["obeys", "hears", "deaf"],
)
def test_sigterm_presses_the_power_button(lab: Lab, listens: bool, end: bytes, status: int, outcome: str) -> None:
    """SIGTERM: a guest that hears its power button may power off; after stop_timeout, or where none hears, it ends."""
    lab.guest((LISTENS[:7] if listens else b"") + SAYS + (LISTENS[7:] if listens else b"") + end)
    process = begun(lab)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said.splitlines()[-1]) == (status, f"outcome: {outcome}")


def test_a_machine_is_left_running_and_stopped(lab: Lab) -> None:
    """``--detach`` prints the name once the guest runs; the verbs find it, its log is kept, and it ends as told."""
    lab.guest(LISTENS[:7] + SAYS + LISTENS[7:] + OFF)
    done = lab.run("run", "--detach", "vm.toml")
    assert (done.returncode, done.stdout) == (0, "lab\n")
    assert "accelerator: tcg" in done.stderr
    assert "outcome" not in done.stderr
    second = lab.run("run", "-d", "vm.toml")
    assert (second.returncode, second.stdout) == (0, "lab-2\n")
    assert lab.run("ps", "-q").stdout == "lab\nlab-2\n"
    ended = lab.run("stop", "lab", "lab-2", "--timeout", "60")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert lab.run("ps", "-q").stdout == ""
    log = lab.run("logs", "lab")
    assert (log.returncode, log.stdout.splitlines()) == (0, ["hi", "outcome: the guest powered off"])
    assert lab.run("logs", "lab-2", "-f").stdout == log.stdout
    assert lab.run("logs", "other").returncode == 2


HAS = "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"


def test_a_look_at_a_log_does_not_disturb_it(tmp_path: Path) -> None:
    """A log is begun also while another process looks whether it is written, which takes its lock for a moment."""
    path = tmp_path / "log"
    path.touch()
    words = [sys.executable, "-c", HAS, str(path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as looker:
        assert looker.stdin is not None
        assert looker.stdout is not None
        looker.stdout.readline()
        made: list[KeptFile] = []
        thread = threading.Thread(target=lambda: made.append(KeptFile(path, 1 << 20, held=True)))
        thread.start()
        looker.communicate(b"\n", timeout=60)
        thread.join(60)
    made[0].close()


@pytest.mark.parametrize("follow", [False, True], ids=["once", "follow"])
def test_the_log_of_one_that_ends_has_its_outcome(lab: Lab, follow: bool) -> None:
    """A machine that is off the roster may have its outcome to say yet: its log is read until its process has ended."""
    file = KeptFile(log_of("lab"), 1 << 20, held=True)
    file.write(b"hi\n")
    words = [*PROGRAM, "logs", "lab", *(["-f"] if follow else [])]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, cwd=lab.folder)
    assert process.stdout is not None
    assert process.stdout.readline() == b"hi\n"
    file.write(b"outcome: the guest powered off\n")
    file.close()
    assert process.communicate(timeout=60)[0] == b"outcome: the guest powered off\n"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["vm.toml", "--set", "machine.cpus=0"], "bad configuration: --set: machine.cpus"),
        (["vm.toml", "--set", "boot.image=none.bin"], "bad configuration: none.bin: raw image cannot be read"),
    ],
    ids=["value", "image"],
)
def test_an_error_of_the_start_is_the_commands(lab: Lab, words: list[str], text: str) -> None:
    """What is wrong before the guest runs is said where the command was given, with its status; no machine is left."""
    lab.guest(OFF)
    done = lab.run("run", "--detach", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"outcome: {text}" in done.stderr.splitlines()[-1]
    assert lab.run("ps", "-q").stdout == ""


def test_a_machine_left_running_is_in_its_jail(lab: Lab) -> None:
    """The process of a detached machine is confined as any, leads a session of its own, and has no terminal."""
    lab.guest(SAYS + FOR_EVER)
    assert lab.run("run", "--detach", "vm.toml", "--set", "security.jail=require").stdout == "lab\n"
    try:
        (name,) = (lab.folder / "cardcage" / "machines").rglob("*.json")
        pid = int(name.stem.partition("-")[0])
        status = Path(f"/proc/{pid}/status").read_text()
        assert "NoNewPrivs:\t1" in status
        assert "Seccomp:\t2" in status
        assert os.getsid(pid) == pid
        assert os.readlink(f"/proc/{pid}/fd/0") == "/dev/null"
        assert [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (1, 2)] == [
            str(lab.folder / "cardcage" / "logs" / "lab.log")
        ] * 2
    finally:
        assert lab.run("kill", "lab").returncode == 0


def test_a_process_that_hangs_is_killed(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """``kill`` ends a process that takes no command, and says so."""
    lab.guest(SAYS + FOR_EVER)
    process = begun(lab)
    process.send_signal(signal.SIGSTOP)
    done = subprocess.run(
        [*PROGRAM[:2], f"import cardcage_verbs.acts; cardcage_verbs.acts.PATIENCE = 0.2\n{PROGRAM[2]}", "kill", "lab"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (process.wait(60), done.returncode) == (-signal.SIGKILL, 0), done.stderr
    assert done.stderr == f"lab: did not answer, and was killed (pid {process.pid})\n"
    process.communicate()


@pytest.mark.parametrize("who", ["another", "heir", "nobody"])
def test_a_pid_that_only_the_roster_names_is_not_killed(lab: Lab, who: str) -> None:
    """``kill`` leaves a process alone that an entry names and that did not lock it, whoever wrote the entry."""
    (lab.folder / "cardcage").mkdir(mode=0o700)
    folder = lab.folder / "cardcage" / "machines" / "1-0+lab"
    folder.mkdir(mode=0o700, parents=True)
    forged = folder / "1-0.json"
    with forged.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        inherited = (held.fileno(),) if who == "heir" else ()  # it has the open file, but did not lock it
        with subprocess.Popen(["sleep", "600"], pass_fds=inherited) as bystander:
            pid = 1 << 22 if who == "nobody" else bystander.pid
            forged.write_text(json.dumps({"name": "lab", "pid": pid, "size": 1, "namespace": pid_namespace()}))
            done = lab.run("kill", "lab")
            alive = bystander.poll() is None
            bystander.kill()
    assert (done.returncode, "is not the one that holds" in done.stderr, alive) == (2, True, True), done.stderr
