"""A Debian guest that writes 100 MB of memory a second moves by post-copy, over links that break, and loses nothing."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from postcopy_kit import Side, possible
from test_snapshot_guest import CHECK, READ, WORK

LONG = bool(os.environ.get("CARDCAGE_LONG_TESTS"))
HOSTS = 22 if LONG else 4
BAD = "BUG|WARNING|Oops|I/O error|soft lockup|hung_task|rcu.*stall"
SCRIPT = Path(__file__).with_name("postcopy_guest_side.py")
SOURCE = Path(__file__).with_name("keeps_memory.c")


def ran(side: Side, command: str) -> str:
    """What a command of the guest says."""
    return str(side.ask("output", "run", command=command)["output"])


def rounds(side: Side) -> int:
    """How often the guest's program has seen its memory be as it left it."""
    what, number = ran(side, "cat /tmp/keeps.txt").split()
    assert what == "rounds"
    return int(number)


def whole(side: Side) -> None:
    """The guest has all that it had, its clock is right, its work goes on, and its kernel does not complain."""
    begun = rounds(side)
    assert abs(float(ran(side, "date +%s")) - time.time()) < 5
    assert ran(side, READ).startswith("flushed")
    before, after = ran(side, CHECK).splitlines()
    if before != after:  # stopped between its two renames
        before, after = ran(side, CHECK).splitlines()
    assert before == after
    assert ran(side, f"dmesg | grep -E '{BAD}'") == ""
    while rounds(side) < begun + 2:
        pass


@possible
@pytest.mark.once
def test_a_guest_at_work_moves_before_its_memory(kernel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it writes 100 MB of memory a second, a disk and its console, a guest on two processors moves from host to
    host: by post-copy over a link that breaks and is recovered, by pre-copy that goes over, over unix: and tcp:. Each
    page is each time what the guest left in it, and so are its files and its disk."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "disk.raw").write_bytes(bytes(16 << 20))
    program = tmp_path / "keeps"
    subprocess.run(["gcc", "-O1", "-static", "-o", program, SOURCE], check=True)
    draw, cuts = random.Random(15), 0
    keys: dict[str, Any] = {"memory": "256M", "cpus": 2, "name": "worker"}
    here = Side(tmp_path, script=SCRIPT, first=True, machine=keys, program=str(program), trust=None)
    try:
        ran(here, "until [ -b /dev/vda ]; do sleep 0.1; done; chmod +x /tmp/keeps")
        ran(here, "printf flushed | dd of=/dev/vda bs=1M seek=15 conv=notrunc,fsync")
        ran(here, f"cat > /tmp/work << 'END'\n{WORK}\nEND")
        ran(here, "sh /tmp/work > /dev/null 2>&1 < /dev/null & echo $! > /tmp/pid")
        ran(here, "/tmp/keeps 100 64 /tmp/keeps.txt > /dev/null 2>&1 < /dev/null &")
        ran(here, "until [ -e /tmp/data.sum ] && [ -e /tmp/keeps.txt ]; do sleep 0.1; done")
        for number in range(HOSTS):
            there = Side(tmp_path, "tcp:127.0.0.1:0" if number % 2 else f"unix:{tmp_path}/door-{number}", SCRIPT)
            try:
                if number == 1:
                    found = here.ask("cut", "move", uri=there.uri, mode="hybrid")
                    assert found["status"] == "completed", found
                else:
                    found = here.ask("cut", "move", uri=there.uri, most=draw.randrange(40 << 20))
                    assert "error" not in found, found
                    assert there.hear("done")
                    if found["cut"]:
                        cuts += 1
                        assert here.ask("status", "status")["status"] == "postcopy-paused"
                        assert "migrated to" in here.ask("recovered", "recover")["outcome"]
                here.close()
                whole(there)
            except BaseException:
                there.close()
                raise
            here = there
    finally:
        here.close()
    assert cuts >= (20 if LONG else 2)
