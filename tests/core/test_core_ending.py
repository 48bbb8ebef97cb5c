"""SIGTERM, SIGHUP and SIGINT at any moment: an orderly end, with nothing left behind."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cardcage_cli.ending import Ending, Terminated
from strangers import MAIN, Shop

TRACED = """
import _signal as signal, os, sys
at, signum, only = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
left = at
def trace(frame, event, argument):
    global left
    if only in frame.f_code.co_filename and ready():
        left -= 1
        if left == 0:
            sys.settrace(None)
            os.kill(os.getpid(), signum)
    return trace
before = signal.getsignal(signal.SIGINT)
def ready():
    return signal.getsignal(signal.SIGINT) != before
sys.argv = ["cardcage", *sys.argv[4:]]
from cardcage_cli import ending, main
sys.settrace(trace)
status = main()
sys.settrace(None)
print("moments", at - left, file=sys.stderr)
sys.exit(status)
"""
"""Runs the command, and sends itself a signal at the moment with a given number, among those in files of a name.

Moments count from when the handlers are there; before, a signal ends the interpreter in its own way.
"""

SIGNALS = {signal.SIGTERM: "ended by: SIGTERM", signal.SIGHUP: "ended by: SIGHUP", signal.SIGINT: "interrupted"}
ENDLESS = bytes.fromhex("f4 ebfd")  # hlt; jmp back


class Place:
    """A machine's folder with a run directory of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rundir = folder, folder / "run"
        self.rundir.mkdir()
        (folder / "tmp").mkdir()
        Shop(folder).machine()
        self.environment = {**os.environ, "XDG_RUNTIME_DIR": str(self.rundir), "TMPDIR": str(folder / "tmp")}

    def traced(self, at: int, signum: int, only: str, words: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        """Run ``cardcage run``, and send it a signal at moment *at*."""
        command = [sys.executable, "-c", TRACED, str(at), str(int(signum)), only, "run", "vm.toml", *words]
        environment = self.environment
        return subprocess.run(
            command, cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )

    def left(self) -> list[str]:
        """Files of a machine in the run directory and of the process among the temporary ones; locks may stay."""
        found = [*self.rundir.rglob("*"), *(self.folder / "tmp").rglob("*")]
        return [str(one) for one in found if not one.is_dir() and one.name != "lock"]

    @contextmanager
    def running(self, *before: str) -> Iterator[subprocess.Popen[str]]:
        """``cardcage run`` of a guest that does not end by itself."""
        (self.folder / "guest.bin").write_bytes(ENDLESS)
        command = [*before, sys.executable, "-c", MAIN, "run", "vm.toml"]
        with subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                yield process
            finally:
                process.kill()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A machine to run, by a command that ignores no signal, as it would if these tests were run by nohup."""
    ignored = [one for one in SIGNALS if signal.getsignal(one) == signal.SIG_IGN]
    for one in ignored:
        signal.signal(one, signal.SIG_DFL)
    yield Place(tmp_path)
    for one in ignored:
        signal.signal(one, signal.SIG_IGN)


@pytest.mark.parametrize(
    ("only", "words", "count"),
    [
        pytest.param("", (), 15, id="anywhere"),
        pytest.param("", ("--security", "default"), 9, id="secured", marks=pytest.mark.once),
        pytest.param("cardcage_fleet", (), 12, id="roster", marks=pytest.mark.once),
        pytest.param("cardcage_selinux/svirt", ("--security", "default"), 9, id="labels", marks=pytest.mark.once),
        pytest.param("cardcage_cli", (), 9, id="command", marks=pytest.mark.once),
    ],
)
def test_at_any_moment_a_signal_leaves_nothing(place: Place, only: str, words: tuple[str, ...], count: int) -> None:
    """At moments spread from the first to the last: one outcome, its status, no traceback, entry, label or file."""
    done = place.traced(0, 0, only, words)
    assert done.returncode == 1, done.stderr
    moments = int(done.stderr.split()[-1])
    for number in range(count):
        at, signum = 1 + moments * number // count, list(SIGNALS)[number % 3]
        done = place.traced(at, signum, only, words)
        told = [line for line in done.stderr.splitlines() if line.startswith("outcome: ")]
        signalled = (128 + signum, [f"outcome: {SIGNALS[signum]}"])
        ended = (1, ["outcome: debug exit with code 0"])  # the guest had ended before
        assert (done.returncode, told) in (signalled, ended), (at, signum, done.stderr)
        assert "Traceback" not in done.stderr, (at, signum, done.stderr)
        assert "ignored" not in done.stderr, (at, signum, done.stderr)
        assert place.left() == [], (at, signum)


@pytest.mark.parametrize("signum", SIGNALS)
def test_two_signals_end_a_machine_once(place: Place, signum: signal.Signals) -> None:
    """A machine on the roster that is sent two signals in a row ends in order, with one outcome, and is off it."""
    with place.running() as process:
        until(lambda: any(place.rundir.rglob("*.json")))
        process.send_signal(signum)
        process.send_signal(signum)
        _, said = process.communicate()
    assert process.returncode == 128 + signum
    assert [line for line in said.splitlines() if "outcome" in line] == [f"outcome: {SIGNALS[signum]}"]
    assert place.left() == []


def test_what_was_ignored_stays_ignored(place: Place) -> None:
    """Under nohup, SIGHUP is not the command's: the machine goes on, and SIGTERM ends it."""
    with place.running("sh", "-c", 'trap "" HUP INT; exec "$@"', "sh") as process:
        until(lambda: any(place.rundir.rglob("*.json")))
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate()
    assert (process.returncode, said.splitlines()[-1]) == (143, "outcome: ended by: SIGTERM")


def test_a_lock_that_nobody_gives_back_keeps_no_signal_away(place: Place) -> None:
    """While a machine waits for the roster's lock, which a stopped process may hold, a signal ends it all the same."""
    folder = place.rundir / "cardcage"
    folder.mkdir(mode=0o700)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with place.running() as process:
            until(lambda: f" -> FLOCK  ADVISORY  WRITE {process.pid} " in Path("/proc/locks").read_text())
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate()
    assert (process.returncode, said.splitlines()[-1]) == (143, "outcome: ended by: SIGTERM")
    assert place.left() == []


def test_a_signal_that_meets_a_finalizer_comes_again() -> None:
    """A signal whose exception is lost in a finalizer, which can raise nothing, is not lost: it comes again."""

    class Last:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(1000):  # the handler runs between two of these
                pass

    def met() -> None:
        with Ending(alone=False):
            Last()
            threading.Event().wait(60)

    with pytest.raises(Terminated):
        met()


def test_a_signal_waits_for_a_block_that_is_held() -> None:
    """In a held block a signal waits until the end, however deep; a second one changes nothing."""
    done = []

    def hold() -> None:
        with Ending(alone=False) as ending, ending.held():
            with ending.held():
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGINT)
                done.append("inner")
            done.append("outer")

    with pytest.raises(Terminated, match="SIGTERM"):
        hold()
    assert done == ["inner", "outer"]


def until(true: Callable[[], bool]) -> None:
    """Wait for what another process does."""
    while not true():
        threading.Event().wait(0.005)
