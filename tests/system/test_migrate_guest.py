"""A Debian guest that is hard at work moves, again and again, and goes on each time with all that it had."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from cardcage.host import Host
from cardcage_agent import Machine as AgentMachine
from cardcage_migrate import Verbs
from migrate_kit import Coming, over
from test_snapshot_guest import CHECK, READ, WORK

BAD = "BUG|WARNING|Oops|I/O error|soft lockup|hung_task|rcu.*stall"


class Machine(Verbs, AgentMachine):
    """A machine with the verbs of both cards."""


@pytest.mark.once
def test_a_guest_at_work_moves(kernel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it writes memory, disk and console, a guest on two processors moves twice: its work goes on with the
    files that it had, what was flushed is on the disk that both sides share, its clock is right, its agent answers, its
    kernel has nothing to complain of, and its network card was asked to announce itself."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(16 << 20))
    devices = [
        {"type": "virtio-blk", "drive": {"file": str(disk), "format": "raw"}},
        {"type": "virtio-net", "net": "null"},
    ]
    keys: dict[str, Any] = {"memory": "192M", "cpus": 2, "accel": "tcg", "name": "worker"}
    with Host() as host:
        vm: Any = Machine.debian(devices=devices, host=host, **keys)
        vm.start()
        vm.files.write("/tmp/work", WORK)
        vm.run("until [ -b /dev/vda ]; do sleep 0.1; done", check=True, timeout=60)  # its driver is loaded
        vm.run("printf flushed | dd of=/dev/vda bs=1M seek=15 conv=notrunc,fsync", check=True, timeout=60)
        vm.run("sh /tmp/work > /dev/null 2>&1 < /dev/null & echo $! > /tmp/pid", check=True, timeout=60)
        vm.run("until [ -e /tmp/data.sum ]; do sleep 0.1; done", check=True, timeout=60)
        for _ in range(2):
            with Coming(host, cls=Machine) as there:
                done = over(vm, there.link)
                assert done.status == "completed"
                vm.close()
                vm, there.machine = there.done().machine, None
                assert there.error is None
            assert abs(float(vm.run("date +%s", text=True, timeout=60).stdout) - time.time()) < 5
            assert vm.run(READ, timeout=60).stdout == b"flushed"
            before, after = vm.run(CHECK, text=True, timeout=60).stdout.splitlines()
            if before != after:  # stopped between its two renames
                before, after = vm.run(CHECK, text=True, timeout=60).stdout.splitlines()
            assert before == after
            assert vm.run(f"dmesg | grep -E '{BAD}'", text=True, timeout=60).stdout == ""
            vm.run(f"while grep -q {after.split()[0]} /tmp/data.sum; do sleep 0.1; done", timeout=60, check=True)
        vm.close()
