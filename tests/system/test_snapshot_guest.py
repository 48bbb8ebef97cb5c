"""A Debian guest that is hard at work is saved again and again, and goes on each time with all that it had."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from cardcage.host import Host
from cardcage_agent import Machine as AgentMachine
from cardcage_snapshot import Verbs

WORK = """
cd /tmp; i=0
while :; do
    i=$((i + 1)); head -c 300000 /dev/urandom > new; sha256sum < new > new.sum; mv new data; mv new.sum data.sum
    dd if=data of=/dev/vda bs=4k seek=$((i % 20 * 100)) conv=notrunc,fsync 2>/dev/null
    echo "turn $i of the work, which says so at length" > /dev/ttyS0
done
"""
READ = "dd if=/dev/vda bs=1M skip=15 iflag=direct | head -c 7"
CHECK = "cd /tmp; kill -STOP $(cat pid); sleep 0.2; cat data.sum; sha256sum < data; kill -CONT $(cat pid)"


class Machine(Verbs, AgentMachine):
    """A machine with the verbs of both cards."""


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots and the key of this test alone."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.mark.once
def test_a_guest_at_work_is_saved_and_goes_on(kernel: Path, tmp_path: Path) -> None:
    """While it writes memory, disk and console, a guest on two processors is saved, restored, saved again from there,
    and restored from a compressed file: what was flushed is on the disk, its work goes on, the clock is right, no two
    machines draw the same random numbers, and its kernel has nothing to complain of."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(16 << 20))
    drive = {"type": "virtio-blk", "drive": {"file": str(disk), "format": "raw"}}
    drawn: list[str] = []
    with Host() as host:
        keys: dict[str, Any] = {"memory": "192M", "cpus": 2, "accel": "tcg", "host": host, "name": "worker"}
        with Machine.debian(devices=[drive], **keys) as vm:
            vm.start()
            vm.files.write("/tmp/work", WORK)
            vm.run("until [ -b /dev/vda ]; do sleep 0.1; done", check=True, timeout=60)  # its driver is loaded
            vm.run("printf flushed | dd of=/dev/vda bs=1M seek=15 conv=notrunc,fsync", check=True, timeout=60)
            vm.run("sh /tmp/work > /dev/null 2>&1 < /dev/null & echo $! > /tmp/pid", check=True, timeout=60)
            vm.run("until [ -e /tmp/data.sum ]; do sleep 0.1; done", check=True, timeout=60)
            vm.snapshot("busy")
            vm.run("printf later__ | dd of=/dev/vda bs=1M seek=15 conv=notrunc,fsync", check=True, timeout=60)
            drawn += vm.run("cat /proc/sys/kernel/random/uuid", text=True).stdout.split()
        for source, times in (("busy", 2), ("again", 1)):
            for _ in range(times):
                with Machine.restore(source, host=host) as vm:
                    drawn += vm.run("cat /proc/sys/kernel/random/uuid", text=True, timeout=60).stdout.split()
                    assert abs(float(vm.run("date +%s", text=True, timeout=60).stdout) - time.time()) < 5
                    assert vm.run(READ, timeout=60).stdout == b"flushed"
                    before, after = vm.run(CHECK, text=True, timeout=60).stdout.splitlines()
                    if before != after:  # stopped between its two renames
                        before, after = vm.run(CHECK, text=True, timeout=60).stdout.splitlines()
                    assert before == after
                    bad = "BUG|WARNING|Oops|I/O error|soft lockup|hung_task|rcu.*stall"
                    assert vm.run(f"dmesg | grep -E '{bad}'", text=True, timeout=60).stdout == ""
                    vm.run(
                        f"while grep -q {after.split()[0]} /tmp/data.sum; do sleep 0.1; done", timeout=60, check=True
                    )
            if source == "busy":
                with Machine.restore(source, host=host) as vm:
                    vm.snapshot("again", compress=True)
    assert len(set(drawn)) == len(drawn) == 4
