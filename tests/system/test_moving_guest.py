"""A Debian guest under full load is saved, restored, forked, put back and moved in a loop, and loses nothing.

``CARDCAGE_LOOP_SECONDS`` says how long it goes on; without it, each of these is done once.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cardcage.host import Host
from cardcage_agent import Machine as AgentMachine
from cardcage_fork import Copy, checkpoint, fork, revert
from cardcage_fork.reverting import forget
from cardcage_migrate import Verbs as Migrates
from cardcage_migrate.limits import Limits
from cardcage_snapshot import Verbs as Saves
from migrate_kit import Coming, over

if TYPE_CHECKING:
    from collections.abc import Iterator

SECONDS = float(os.environ.get("CARDCAGE_LOOP_SECONDS", "0"))
BAD = "BUG|WARNING|Oops|I/O error|EXT4-fs error|soft lockup|hung_task|rcu.*stall|clocksource.*unstable"
SEED = int(os.environ.get("CARDCAGE_LOOP_SEED", "15"))
MKFS, FSCK = (
    shutil.which(one, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") or "" for one in ("mkfs.ext4", "e2fsck")
)
SIZE = 32 << 20
HERE = Path(__file__).parent
PROGRAMS = ("keeps_memory", "keeps_disk")
LOAD = """
begin() { "$@" >/dev/null 2>&1 </dev/null & echo $! >> /tmp/pids; }
begin /tmp/keeps_memory 50 32 /tmp/keeps_memory.txt
begin /tmp/keeps_disk WHERE/kept /tmp/keeps_disk.txt DIRECT
begin sh -c 'cd WHERE; while :; do tar cf new.tar /bin /etc; mv new.tar old.tar; done'
begin sh -c 'while :; do echo "the console says this at length, again and again"; usleep 2000; done >/dev/ttyS0'
until [ -e /tmp/keeps_memory.txt ] && [ -e /tmp/keeps_disk.txt ]; do sleep 0.1; done
"""
ADVANCE = """
a=$(cat /tmp/keeps_memory.txt); b=$(cat /tmp/keeps_disk.txt)
until [ "$(cat /tmp/keeps_memory.txt)" != "$a" ] && [ "$(cat /tmp/keeps_disk.txt)" != "$b" ]; do
    case "$(cat /tmp/keeps_memory.txt) $(cat /tmp/keeps_disk.txt)" in rounds*writes*) sleep 0.1;; *) break;; esac
done
cat /tmp/keeps_memory.txt /tmp/keeps_disk.txt
"""
ACTS = ("saved", "forked", "moved", "put_back")


def todo(draw: random.Random, until: float) -> Iterator[str]:
    """Each act once, then what is drawn."""
    yield from ACTS
    while time.monotonic() < until:
        yield draw.choice(ACTS)


class Machine(Saves, Migrates, AgentMachine):
    """A machine with the verbs of these cards."""


def ran(one: Machine | Copy, command: str) -> str:
    """What a command of the guest says."""
    done = one.run(command, text=True, timeout=300)
    return str(done.stdout + done.stderr)


def whole(one: Machine | Copy) -> None:
    """The guest's memory and files are what its programs left there, they go on, its clock is right, and its kernel has
    nothing to complain of."""
    memory, files = ran(one, ADVANCE).splitlines()
    assert memory.startswith("rounds ")
    assert files.startswith("writes ")
    asked = time.time()
    assert asked - 5 < float(ran(one, "date +%s")) < time.time() + 5
    assert ran(one, f"dmesg | grep -E -A 5 '{BAD}'") == ""
    for cpu in "01":  # the log's clock is the scheduler's, and not what gives the guest its time
        said = ran(one, f"taskset -c {cpu} sh -c 'echo here >/dev/kmsg'; dmesg | tail -n 1; cut -d' ' -f1 /proc/uptime")
        stamp, up = said.strip("[").replace("]", "\n").split()[0], said.split()[-1]
        assert abs(float(stamp) - float(up)) < 5


class Worker:
    """The guest, wherever it is by now. Each act leaves it there, checked, and what it was made of closed."""

    def __init__(self, host: Host, folder: Path, disk: Path | None, draw: random.Random) -> None:
        self._host, self._folder, self._draw, self._disk = host, folder, draw, disk
        self._saved: list[Path] = []
        drives = [{"type": "virtio-blk", "drive": {"file": str(disk), "format": "raw"}}] if disk else []
        devices = [*drives, {"type": "virtio-net", "net": "null"}, {"type": "virtio-rng"}]
        self.vm: Any = Machine.debian(memory="192M", cpus=2, accel="tcg", name="worker", devices=devices, host=host)

    def begin(self) -> None:
        """Start it, and its load."""
        self.vm.start()
        self.vm.agent.wait(300)
        for name in PROGRAMS:
            self.vm.put(self._folder / name, f"/tmp/{name}")
        where, direct = ("/mnt", "direct") if self._disk else ("/tmp", "")
        if self._disk:
            ran(self.vm, "until [ -b /dev/vda ]; do sleep 0.1; done; mkdir -p /mnt; mount -t ext4 /dev/vda /mnt")
            assert " /mnt ext4 " in ran(self.vm, "cat /proc/mounts")
        load = LOAD.replace("WHERE", where).replace("DIRECT", direct)
        assert ran(self.vm, f"chmod +x /tmp/keeps_*; {load}") == ""

    def saved(self) -> None:
        """Saved, restored, and a copy made of that; the work goes on there, or, where the disk is an overlay that no
        other machine could open, with the one that was saved."""
        path = self._folder / f"saved-{len(self._saved)}"
        parent = self._saved[-1] if self._saved and self._draw.random() < 0.5 else None
        self.vm.snapshot(path, compress=self._draw.random() < 0.5, parent=parent)
        self._saved.append(path)
        again: Any = Machine.restore(path, host=self._host)
        try:
            whole(again)
            with fork(again)[0] as copy:
                whole(copy)
            if not self._disk:
                self.vm, again = again, self.vm
        finally:
            again.close()

    def forked(self) -> None:
        """Forked, and a copy forked again; all go on side by side."""
        copies = fork(self.vm, 2)
        copies += copies[0].fork()
        for one in copies:
            whole(one)
        for one in copies:
            one.close()
        self.vm.agent.set_time()  # it stood while they copied its disk, and its time with it

    def put_back(self) -> None:
        """Put back to a checkpoint a few times; a guest that writes a disk is not."""
        if self._disk:
            return
        checkpoint(self.vm)
        for _ in range(5):
            ran(self.vm, f"dd if=/dev/urandom of=/tmp/noise bs=64k count={self._draw.randrange(1, 30)}")
            revert(self.vm)
        self.vm.agent.set_time()
        forget(self.vm)

    def moved(self) -> None:
        """Moved by pre-copy to another machine."""
        with Coming(self._host, cls=Machine) as there:
            assert over(self.vm, there.link, Limits(downtime=5)).status == "completed"
            self.vm.close()
            self.vm, there.machine = there.done().machine, None
            assert there.error is None

    def end(self) -> None:
        """Stop the load; what is on the disk is a sound file system."""
        ran(self.vm, "kill -9 $(cat /tmp/pids)")
        if self._disk:
            assert ran(self.vm, "until umount /mnt 2>/dev/null; do sleep 0.1; done") == ""
            image = self._folder / "end.raw"
            image.write_bytes(self.vm.run("dd if=/dev/vda bs=1M", timeout=300).stdout)
            done = subprocess.run([FSCK, "-fn", image], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout
        self.vm.close()


@pytest.mark.timeout(SECONDS + 1200)
@pytest.mark.parametrize("disk", [True, False], ids=["disk", "memory"])
def test_a_guest_under_load_goes_through_all_of_it(
    kernel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: bool
) -> None:
    """On two processors, while its programs write memory, files and the console without a pause, and look whether what
    they wrote before is there, a guest is saved, restored, forked, put back and moved in an order that is drawn: each
    time, and in each copy, memory, files and clock are right, and in the end its file system is sound."""
    if shutil.which("gcc") is None or (disk and not (MKFS and FSCK)):
        pytest.skip("needs gcc and e2fsprogs")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in PROGRAMS:
        command = ["gcc", "-O1", "-static", "-o", tmp_path / name, HERE / f"{name}.c"]
        subprocess.run(command, check=True)
    image = tmp_path / "disk.raw" if disk else None
    if image is not None:
        image.write_bytes(bytes(SIZE))
        subprocess.run([MKFS, "-q", image], check=True)
    draw = random.Random(SEED)
    until = time.monotonic() + SECONDS
    with Host() as host:
        worker = Worker(host, tmp_path, image, draw)
        try:
            worker.begin()
            for act in todo(draw, until):
                print(f"{until - time.monotonic():.0f} s left: {act}", flush=True)
                getattr(worker, act)()
                whole(worker.vm)
            worker.end()
        finally:
            worker.vm.dismantle()
