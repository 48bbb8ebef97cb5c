"""Copies of a running Debian guest: what they share with it, what not, and what is left of them."""

from __future__ import annotations

import gc
import os
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cardcage.errors import GuestError, HostError, StateError, UsageError
from cardcage.machine import State
from cardcage.outcome import PoweredOff, Stopped
from cardcage_agent import Machine
from cardcage_fleet import command, find
from cardcage_fleet.roster import Roster
from cardcage_fleet.rundir import run_directory
from cardcage_fork import Copy, fork
from installed import PROGRAM
from leftovers import shared

if TYPE_CHECKING:
    from collections.abc import Iterator

LONG = bool(os.environ.get("CARDCAGE_LONG_TESTS"))
UUID = "/proc/sys/kernel/random/uuid"
EARLIER: list[threading.Thread] = []
"""Threads that were there before the machine: of other tests of the process."""
KEPT: set[int] = set()
"""Descriptors likewise."""


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fork") / "scratch.qcow2"
    subprocess.run([*PROGRAM, "image", "create", "-f", "qcow2", str(path), "64M"], check=True, capture_output=True)
    return path


@pytest.fixture(scope="module")
def vm(kernel: Path, disk: Path) -> Iterator[Machine]:
    """A guest with an agent, a disk, a network card, and a process that writes memory all the time."""
    devices = [
        {"type": "virtio-blk", "drive": str(disk)},
        {"type": "virtio-net", "net": "null"},
        {"type": "virtio-rng"},
        {"type": "virtio-balloon"},
    ]
    EARLIER[:] = threading.enumerate()
    KEPT.clear()
    KEPT.update(descriptors())
    with Machine.debian(name="forked", memory="192M", cpus=2, accel="tcg", devices=devices) as made:
        made.start()
        made.run("while :; do date >/tmp/busy; done >/dev/null 2>&1 </dev/null &")
        made.files.write("/tmp/word", "before")
        yield made


def word(one: Machine | Copy) -> str:
    return str(one.run("cat /tmp/word", text=True, timeout=60).stdout)


def descriptors(pid: int | str = "self") -> dict[int, str]:
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:  # it was the listing's own
            continue
    return found


def test_a_copy_goes_on_from_where_its_parent_was(vm: Machine) -> None:
    """A copy has its parent's files and processes; what either writes from then on the other does not see; each has a
    name, a process and an entry on the roster of its own."""
    first, second = fork(vm, 2)
    with first, second:
        assert len({vm.name, first.name, second.name}) == 3
        assert len({os.getpid(), first.pid, second.pid}) == 3
        assert [word(one) for one in (vm, first, second)] == ["before"] * 3
        first.run("echo -n first >/tmp/word")
        vm.files.write("/tmp/word", "parent")
        assert [word(one) for one in (vm, first, second)] == ["parent", "first", "before"]
        assert {find(one.name).pid for one in (first, second)} == {first.pid, second.pid}
        assert first.state is State.RUNNING
        first.pause()
        assert first.state is State.PAUSED
        first.resume()
        assert first.run("exit 3").returncode == 3
        with pytest.raises(GuestError, match="no user"):
            first.run("true", user="nobody-has-this-name")
    vm.files.write("/tmp/word", "before")


def test_a_copy_of_a_copy(vm: Machine) -> None:
    """Copies are forked as machines are, and outlive the one that they were made of."""
    (first,) = fork(vm)
    with first.fork()[0] as at_once:  # while its agent is asked for the first time
        assert word(at_once) == "before"
        with pytest.raises(UsageError, match="at most 250"):
            first.fork(251)
    status = Path(f"/proc/{at_once.pid}/stat")  # it has ended, and is reaped by the process of the first
    assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"
    first.run("echo -n first >/tmp/word")
    second, third = first.fork(2)
    with second, third:
        second.run("echo -n second >/tmp/word")
        assert [word(one) for one in (first, second, third)] == ["first", "second", "first"]
        first.close()
        (fourth,) = second.fork()
        with fourth:
            assert [word(one) for one in (third, fourth)] == ["first", "second"]
        with pytest.raises(StateError, match="closed"):
            first.run("true")


def test_a_copy_of_a_paused_machine_is_paused(vm: Machine) -> None:
    """A paused machine is a template: its copies are paused, and each goes on when it is resumed."""
    vm.pause()
    try:
        copies = fork(vm, 2)
    finally:
        vm.resume()
    for one in copies:
        with one:
            assert one.state is State.PAUSED
            one.resume()
            assert word(one) == "before"


def test_a_disk_is_the_copys_own(vm: Machine, disk: Path) -> None:
    """A copy reads what its parent wrote before the fork, and what either writes then is its own; nothing is left
    beside the image."""
    disk_of = "/dev/vda"
    vm.run(f"echo one | dd of={disk_of} bs=512 conv=sync,fsync", check=True)
    before = sorted(os.listdir(disk.parent))
    (copy,) = fork(vm)
    with copy:
        vm.run(f"echo two | dd of={disk_of} bs=512 conv=sync,fsync", check=True)
        copy.run(f"echo three | dd of={disk_of} seek=1 bs=512 conv=sync,fsync", check=True)
        for one, first, second in ((vm, b"two", b""), (copy, b"one", b"three")):
            one.run("echo 3 >/proc/sys/vm/drop_caches")
            data = one.run(f"dd if={disk_of} bs=512 count=2", check=True).stdout
            assert (data[:512].strip(b"\n\0"), data[512:].strip(b"\n\0")) == (first, second)
        assert sorted(os.listdir(disk.parent)) == before


def test_no_descriptor_is_shared_by_accident(vm: Machine) -> None:
    """A copy has no lock, socket, disk, eventfd, epoll or timer in common with its parent."""
    with fork(vm)[0] as copy:
        copy.run("true")
        common = shared(copy.pid, KEPT)
        kinds = ("anon_inode", "socket:", "/memfd:")
        assert not {one for one in common if one.startswith(kinds) or ".json" in one or "qcow2" in one}
        assert len(descriptors(copy.pid)) <= len(descriptors()) + 2


def test_random_numbers_differ(vm: Machine) -> None:
    """With an agent, copies of a guest that drew right before draw other numbers than it, and than one another."""
    vm.run(f"cat {UUID}")
    copies = fork(vm, 5)
    drawn = [one.run(f"cat {UUID}", text=True).stdout for one in (*copies, vm)]
    for one in copies:
        one.close()
    assert len(set(drawn)) == 6


def test_random_numbers_differ_once_copies_go_on(vm: Machine, capfd: pytest.CaptureFixture[str]) -> None:
    """Copies of a paused guest have numbers of their own as soon as they go on, and nothing is said of it before."""
    vm.run(f"cat {UUID}")
    vm.pause()
    copies = fork(vm, 2)
    vm.resume()
    for one in copies:
        one.resume()
    drawn = [one.run(f"cat {UUID}", text=True).stdout for one in (*copies, vm)]
    for one in copies:
        one.close()
    assert len(set(drawn)) == 3
    assert "random numbers" not in capfd.readouterr().err


@pytest.mark.timeout(3000 if LONG else 300)
def test_forks_leave_nothing(vm: Machine) -> None:
    """Forks one after another leave no descriptor, process, thread, file or entry on the roster."""
    count = 1000 if LONG else 25
    pids = [os.getpid()]

    def left() -> tuple[object, ...]:
        gc.collect()
        tasks = os.listdir("/proc/self/task")
        children = [one for task in tasks for one in Path(f"/proc/self/task/{task}/children").read_text().split()]
        entries = sorted(path.name for pid in pids for path in run_directory().glob(f"machines/{pid}-*/*"))
        threads = sorted(one.name for one in threading.enumerate() if one not in EARLIER)
        return sorted(descriptors().values()), children, threads, entries

    fork(vm)[0].close()
    before = left()
    for at in range(count):
        (copy,) = fork(vm)
        pids.append(copy.pid)
        if at % 5 == 0:
            copy.run("true")
        copy.kill() if at % 7 == 3 else copy.close()
    for entry in (roster := Roster()).read()[1]:  # of those that were killed: whoever looks next forgets them
        if entry.pid in pids:
            roster.forget(entry)
    assert left() == before


def test_a_copys_end(vm: Machine) -> None:
    """A copy's outcome comes to its parent; a process that was killed is told of; one that is let go goes on alone."""
    first, second, third = fork(vm, 3)
    first.run("poweroff -f >/dev/null 2>&1 &")
    assert first.wait(60) == PoweredOff()
    assert first.outcome == PoweredOff()
    first.close()
    os.kill(second.pid, 9)
    with pytest.raises(HostError, match=f"{second.name}.*has ended"):
        second.wait(60)
    second.close()
    third.detach()
    assert find(third.name).pid == third.pid
    os.kill(third.pid, 9)
    with fork(vm)[0] as last:
        last.stop("enough")
        assert last.wait(10) == Stopped("enough")


def test_a_copy_by_the_command_line(vm: Machine) -> None:
    """``cardcage fork`` makes copies of a machine in another process, which go on by themselves."""
    done = subprocess.run([*PROGRAM, "fork", vm.name, "-n", "2"], capture_output=True, text=True, check=True)
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(rows) == 2
    pids = [int(pid) for _, pid in rows]
    try:
        assert [find(name).pid for name, _ in rows] == pids
        pids += [one["pid"] for one in command(find(rows[0][0]), "fork", {"copies": 1})["copies"]]
        assert len(pids) == 3
    finally:
        for pid in pids:
            os.kill(pid, 9)


def test_a_parked_machine_has_no_thread_and_its_time_stands(vm: Machine) -> None:
    """Parked, all threads of the machine have ended; afterwards its clocks go on as if nothing had been."""
    for one in threading.enumerate():
        if one.name.endswith("-reap"):
            one.join(60)  # of a copy that an earlier test killed; it is its process's, not the machine's
    others = {"MainThread"} | {one.name for one in threading.enumerate() if "forked" not in one.name}
    began = float(vm.run("cut -d' ' -f1 /proc/uptime", text=True).stdout)
    with vm.parked():
        assert {one.name for one in threading.enumerate()} - others == set()
        left = [one for one in threading.enumerate() if one not in EARLIER]
        assert not [one for one in left if one.name.startswith(("tcg-", "virtio-"))]
        assert vm.state is State.PAUSED
        threading.Event().wait(3)
    assert float(vm.run("cut -d' ' -f1 /proc/uptime", text=True).stdout) - began < 2.5
    assert vm.state is State.RUNNING
