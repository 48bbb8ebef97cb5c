"""Compressed snapshots: their guests run before all of RAM is unpacked, and miss nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cardcage.errors import HostError
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage.ram import PAGE
from cardcage_fork import checkpoint, fork, revert
from cardcage_snapshot import arriving, check, faults, unpacking
from cardcage_snapshot.arriving import SERVICE, complete
from installed import PROGRAM
from leftovers import Leftovers
from snapshot_kit import count, counting, counts_on, rewrite

pytestmark = pytest.mark.once

SIZE, FAR, PIECE = 64 << 20, 32 << 20, 1 << 20
DATA = b"".join(bytes([at % 251 + 1]) * PAGE + bytes(PAGE) for at in range(3 * PIECE // PAGE // 2))
"""Three pieces at FAR, in which every other page is zero."""


@pytest.fixture(scope="module", autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Snapshots and the key of this module alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(autouse=True)
def usable() -> None:
    """Skip where the kernel's faults cannot be caught."""
    try:
        os.close(faults.opened_faults())
    except OSError as error:
        pytest.skip(f"userfaultfd: {error}")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed snapshot with data far from the guest's own."""
    folder = tmp_path_factory.mktemp("saved")
    with Host() as host, counting(folder, host, memory="64M") as vm:
        vm.start()
        counts_on(vm, 10)
        vm.memory.write(FAR, DATA)
        made: Any = vm
        made.snapshot(folder / "one", compress=True)
    return folder / "one"


def restored(where: Path, **keys: Any) -> Machine:
    made: Machine = Machine.restore(where, **keys)  # type: ignore[attr-defined]  # found by its entry point
    return made


Held = Callable[[], None]


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    """Has the process that unpacks wait at the data that is far, until this is called."""
    waits, goes = os.pipe()
    plain = unpacking.Unpacker._unpack
    alone = unpacking._alone
    monkeypatch.setattr(unpacking, "_alone", lambda *kept: alone(*kept, waits))

    def unpack(self: unpacking.Unpacker, number: int) -> None:
        if number == FAR // PIECE:
            os.read(waits, 1)
        plain(self, number)

    monkeypatch.setattr(unpacking.Unpacker, "_unpack", unpack)

    def release() -> None:
        os.write(goes, b"x")

    yield release
    os.close(waits)
    os.close(goes)


@pytest.fixture
def lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the process that unpacks leave the data that is far until somebody touches it or gives it back."""
    unpack_one, read = unpacking.Unpacker._unpack, unpacking.Unpacker._read
    heard = []

    def hear(self: unpacking.Unpacker) -> None:
        read(self)
        gone = any(self._gone[FAR // PAGE : (FAR + PIECE) // PAGE])
        heard.extend([True] if gone or any(FAR <= one < FAR + PIECE for one in self._waiting) else [])

    def unpack(self: unpacking.Unpacker, number: int) -> None:
        if number == FAR // PIECE and not heard:
            self._left[number] = self._left.pop(number)  # the last
        else:
            unpack_one(self, number)

    monkeypatch.setattr(unpacking.Unpacker, "_read", hear)
    monkeypatch.setattr(unpacking.Unpacker, "_unpack", unpack)


@pytest.mark.usefixtures("lazy")
def test_the_guest_runs_before_all_is_there(saved: Path, accel: str) -> None:
    """While pieces are still packed the guest goes on; who asks for one waits for it; then all is as it was, zeros take
    no memory, and nothing of the process is left."""
    left = Leftovers()
    with Host() as host, restored(saved, host=host, accel=accel, any_cpu=True) as vm:
        counts_on(vm, count(vm) + 100)
        assert SERVICE in vm.services
        assert vm.memory.read(FAR, PAGE) == DATA[:PAGE]
        complete(vm)
        assert SERVICE not in vm.services
        assert vm.memory.read(FAR, len(DATA)) == DATA
        assert vm.memory.read(FAR + len(DATA), PAGE) == bytes(PAGE)
        counts_on(vm, count(vm) + 100)
    assert [one for one in left() if "templates" not in one] == []  # the translator's are the process's
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.usefixtures("lazy")
def test_what_unpacks_has_no_rights(saved: Path) -> None:
    """The process that unpacks, and the one that watches it, have no capability, make few system calls, and have
    nothing open but the snapshot's RAM, the memory's faults, the link and what tells of refused calls."""
    with Host() as host, restored(saved, host=host) as vm:
        watcher = vm.services[SERVICE]._pid
        while not (children := Path(f"/proc/{watcher}/task/{watcher}/children").read_text().split()):
            assert SERVICE in vm.services
        for pid in (watcher, *children):
            status = ""
            while "Seccomp:\t2" not in status:  # it has just begun
                assert SERVICE in vm.services
                status = Path(f"/proc/{pid}/status").read_text()
            assert "CapEff:\t0000000000000000" in status
            assert "NoNewPrivs:\t1" in status
            links = [os.readlink(f"/proc/{pid}/fd/{one}") for one in os.listdir(f"/proc/{pid}/fd")]
            kinds = {one.partition(":")[0] if one.startswith(("pipe:", "socket:")) else one for one in links}
            assert kinds == {str(saved / "ram.zst"), "anon_inode:[userfaultfd]", "pipe", "socket"}


@pytest.mark.usefixtures("lazy")
def test_what_is_given_back_meanwhile_is_zero(saved: Path) -> None:
    """Memory that a balloon takes while its piece is still packed reads as zeros, and its neighbours as they were."""
    with Host() as host, restored(saved, host=host) as vm:
        assert vm.memory.discard(FAR + 2 * PAGE, PAGE)
        assert vm.memory.read(FAR + 2 * PAGE, PAGE) == bytes(PAGE)
        assert vm.memory.read(FAR, PAGE) == DATA[:PAGE]
        complete(vm)
        vm.memory.discard(FAR + 4 * PAGE, PAGE)
        assert vm.memory.read(FAR + 4 * PAGE, PAGE) == bytes(PAGE)


@pytest.mark.parametrize("what", ["snapshot", "fork", "checkpoint", "close"])
def test_who_needs_all_of_it_waits(saved: Path, tmp_path: Path, held: Held, what: str) -> None:
    """A snapshot, a fork and a checkpoint have all of RAM, though it had not come yet; a machine may end before."""
    with Host() as host, restored(saved, host=host) as vm:
        if what == "close":
            return
        later = threading.Timer(0.05, held)
        later.start()
        if what == "snapshot":
            made: Any = vm
            made.snapshot(tmp_path / "two")
        elif what == "fork":
            vm.pause()
            with fork(vm)[0] as copy:
                assert copy.state == "paused"
        else:
            checkpoint(vm)
            vm.memory.write(FAR, bytes(PAGE))
            revert(vm)
        later.join()
        assert SERVICE not in vm.services
        assert vm.memory.read(FAR, len(DATA)) == DATA
    if what == "snapshot":
        with Host() as host, restored(tmp_path / "two", host=host, start=False) as vm:
            assert vm.memory.read(FAR, len(DATA)) == DATA


def test_a_damaged_piece_ends_the_machine(saved: Path, tmp_path: Path) -> None:
    """A piece whose sum is another ends the machine with a line that names it; no guest sees other bytes there."""
    import shutil

    one = Path(shutil.copytree(saved, tmp_path / "one"))

    def other_sum(table: dict[str, Any]) -> None:
        for entry in table["ram"]["chunks"]:
            if entry[0] == FAR // PIECE:
                entry[3] = "0" * 32

    rewrite(one, other_sum)
    with (
        Host() as host,
        pytest.raises(HostError, match=f"RAM at {FAR:#x}-{FAR + PIECE - 1:#x} is damaged"),
        restored(one, host=host) as vm,
    ):
        vm.wait(60)


def test_a_killed_process_ends_the_machine(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the process that unpacks is killed, who waits for a page has an error, the machine ends in one line, and
    cannot be saved."""

    def dies(self: unpacking.Unpacker, number: int) -> None:
        if number >= FAR // PIECE:
            os.kill(os.getpid(), signal.SIGKILL)
        plain(self, number)

    plain = unpacking.Unpacker._unpack
    monkeypatch.setattr(unpacking.Unpacker, "_unpack", dies)
    line = "the process that unpacks RAM has ended"
    with Host() as host, restored(saved, host=host) as vm:
        for act in (lambda: complete(vm), lambda: vm.wait(60)):
            with pytest.raises(HostError, match=line):
                act()


@pytest.mark.usefixtures("lazy")
def test_a_killed_watcher_ends_the_machine(saved: Path) -> None:
    """Where the process that watches is killed, with its group, the one that unpacks ends the machine, and who has the
    interpreter's lock while he waits for a page goes on: without either, nobody would be left to let him."""
    line = "the process that unpacks RAM has ended"
    with Host() as host, restored(saved, host=host) as vm:
        watcher = vm.services[SERVICE]._pid
        while not (children := Path(f"/proc/{watcher}/task/{watcher}/children").read_text().split()):
            assert SERVICE in vm.services  # it has just begun
        while "Seccomp:\t2" not in Path(f"/proc/{children[0]}/status").read_text():
            assert SERVICE in vm.services
        os.killpg(watcher, signal.SIGKILL)
        os.waitid(os.P_PID, watcher, os.WEXITED | os.WNOWAIT)
        assert len(bytes(vm.memory.view(FAR, PAGE))) == PAGE  # as a device reads it
        for act in (lambda: complete(vm), lambda: vm.wait(60)):
            with pytest.raises(HostError, match=f"{line}|no memory at 32 MiB"):  # as who touched it was told
                act()


def test_the_rest_comes_at_a_bounded_rate(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody waits for comes so many bytes a second; who waits for a page, or for all, has it at once."""
    monkeypatch.setattr(unpacking, "RATE", 1)
    with Host() as host, restored(saved, host=host) as vm:
        assert vm.memory.read(FAR, PAGE) == DATA[:PAGE]
        assert SERVICE in vm.services
        complete(vm)
        assert vm.memory.read(FAR, len(DATA)) == DATA


def test_a_host_that_forbids_it(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where this user may not catch faults, the log says how it could, and RAM is unpacked first."""

    def refused() -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(arriving, "opened_faults", refused)
    with Host() as host, restored(saved, host=host) as vm:
        assert SERVICE not in vm.services
        assert vm.memory.read(FAR, len(DATA)) == DATA
        counts_on(vm, count(vm) + 100)
    assert "/dev/userfaultfd" in capsys.readouterr().err


def test_a_machine_of_a_jail(saved: Path, runtime: Path) -> None:
    """A machine of the command line has its RAM come in its jail, which refuses nothing of it."""
    words = [*PROGRAM, "snapshot", "restore", str(saved), "--timeout", "1s"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 124, done.stderr
    assert "refused" not in done.stderr
    assert "unpack" not in done.stderr


@pytest.mark.parametrize(
    ("number", "said", "command"),
    [(1, "/dev/userfaultfd: Operation not permitted", "vm.unprivileged_userfaultfd=1"), (22, "this kernel", "6.6")],
)
def test_doctor_says_what_would_help(monkeypatch: pytest.MonkeyPatch, number: int, said: str, command: str) -> None:
    """``cardcage doctor`` names what a user who may not catch the kernel's faults needs."""

    def refused() -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(check, "opened_faults", refused)
    fine, found, help = check.faults()
    assert not fine
    assert said in found
    assert command in help
