"""Guests that add up to more than their cgroup, whose load moves from one to the next, each in a process of its own.

    python benchmarks/overcommit.py [--guests 4] [--size 1G] [--limit 2G] [--load 600M] [--rounds 2]
                                    [--modes nothing,reporting,balloon] [--record FILE]

In its turn a guest fills a file in memory with a text of its own, sums it up, frees it, and sums up a disk, which fills
its page cache. ``nothing`` has no balloon device, ``reporting`` one that only reports free pages, ``balloon``
the policy. Says how many guests gave the right sums, how many processes the kernel killed, and how long it took. With
--beyond, what the VMMs use themselves is not counted in --limit. Needs root, for a cgroup (v1 or v2). --record: samples
as JSON lines.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import define, field
from cardcage.units import Size
from paired import make_guest, print_table

if TYPE_CHECKING:
    from collections.abc import Iterator

MODES = {
    "nothing": {},
    "reporting": {"device": [{"type": "virtio-balloon"}]},
    "balloon": {"policy": {"memory": ["balloon"]}},
}
GROWTH = 64 << 20
"""What a VMM comes to use besides what it used when its guest was ready: translated code."""
SCRIPT = """
exec < /dev/console > /dev/console
mkdir /t; mount -t tmpfs -o size=90% t /t; echo READY
while read text size; do
    yes $text | head -c $size > /t/x; sum=$(sha1sum < /t/x); rm /t/x; disk=$(sha1sum < /dev/vda)
    echo "SUMS ${sum%% *} ${disk%% *} END"
done
"""


def main() -> int:
    """Run the modes, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guests", type=int, default=4)
    parser.add_argument("--size", type=Size, default=Size("1G"))
    parser.add_argument("--limit", type=Size, default=Size("2G"))
    parser.add_argument("--load", type=Size, default=Size("600M"))
    parser.add_argument("--disk", type=Size, default=Size("768M"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--accel", default="tcg")
    parser.add_argument("--modes", default="nothing,reporting,balloon")
    parser.add_argument("--set", default="{}", help="options of the balloon policy, as JSON")
    parser.add_argument("--beyond", action="store_true", help="the VMMs own memory is not counted")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one turn")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(json.loads(arguments.worker))
    rows, lasts = [], []
    with tempfile.TemporaryDirectory(prefix="cardcage-bench-") as name:
        guest = make_guest(Path(name), "", SCRIPT)
        disk = Path(name, "disk")
        disk.touch()
        os.truncate(disk, arguments.disk)
        for mode in arguments.modes.split(","):
            lab = Lab(arguments, mode, disk, guest)
            with cgroup(f"cardcage-{os.getpid()}-{mode}") as group:
                lab.run(group)
            rows.append([mode, f"{lab.right} of {lab.turns}", str(lab.killed), f"{lab.took:.1f}", f"{lab.peak >> 20}"])
            lasts.append((mode, lab))
    print_table(["mode", "right sums", "killed", "seconds", "peak MiB"], rows)
    if arguments.record:
        with arguments.record.open("w") as file:
            for _, lab in lasts:
                file.writelines(json.dumps(one) + "\n" for one in lab.samples)
    return 0


@contextmanager
def cgroup(name: str) -> Iterator[Path]:
    """A new memory cgroup below this process's own, removed at the end. Exits with a sentence where it cannot be."""
    from cardcage_fleet.hostmemory import memory_group

    own = memory_group()
    if own is None:
        sys.exit("needs a memory cgroup, and root")
    made = own.folder / name
    try:
        made.mkdir()
    except OSError as error:
        sys.exit(f"{made}: {error.strerror}: needs a memory cgroup that can have children, and root")
    try:
        yield made
    finally:
        for _ in range(100):
            try:
                made.rmdir()
                break
            except OSError:  # the last process is still going
                time.sleep(0.05)


def set_limit(group: Path, limit: int) -> None:
    """No more than *limit* bytes, and no swap beside it."""
    for name in ("memory.max", "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.swap.max"):
        if (group / name).exists():
            (group / name).write_text("0" if "swap.max" in name else str(int(limit)))


def usage(group: Path) -> int:
    """Bytes that the group uses now."""
    path = next(one for one in (group / "memory.current", group / "memory.usage_in_bytes") if one.exists())
    return int(path.read_text())


@define
class Lab:
    """One run of one mode."""

    arguments: argparse.Namespace
    mode: str
    disk: Path
    guest: Any
    right: int = 0
    turns: int = 0
    killed: int = 0
    took: float = 0.0
    peak: int = 0
    samples: list[dict[str, Any]] = field(factory=list)
    _last: dict[int, dict[str, Any]] = field(factory=dict)
    _lines: list[list[str]] = field(factory=list)

    def run(self, group: Path) -> None:
        """Start the workers in *group*, let the load go round, and count."""
        count = self.arguments.guests
        workers = [self._start(group, at) for at in range(count)]
        self._lines = [[] for _ in range(count)]
        readers = [threading.Thread(target=self._read, args=one, daemon=True) for one in enumerate(workers)]
        for reader in readers:
            reader.start()
        try:
            self._turns(group, workers)
        finally:
            self.killed = sum(one.poll() == -9 for one in workers)
            for one in workers:
                one.kill()
                one.wait()
            for reader in readers:
                reader.join()

    def _turns(self, group: Path, workers: list[subprocess.Popen[str]]) -> None:
        count = len(workers)
        self._until(workers, range(count), "READY", 300)
        limit = self.arguments.limit
        if self.arguments.beyond:
            limit += sum(one["own"] + GROWTH for one in self._last.values())
        set_limit(group, limit)
        began = time.monotonic()
        zeros = hashlib.sha1(bytes(self.arguments.disk), usedforsecurity=False).hexdigest()
        for number, at in itertools.product(range(self.arguments.rounds), range(count)):
            self.turns += 1
            text = f"guest{at}round{number}"
            self._send(workers[at], f"{text} {int(self.arguments.load)}\n")
            said = self._until(workers, [at], "SUMS", self.arguments.timeout)
            self.peak = max(self.peak, usage(group))
            self.right += said == f"SUMS {expected(text, self.arguments.load)} {zeros}"
        self.took = time.monotonic() - began

    def _start(self, group: Path, at: int) -> subprocess.Popen[str]:
        config: dict[str, Any] = {"mode": self.mode, "number": at, "disk": str(self.disk), "group": str(group)}
        config |= {"kernel": str(self.guest.kernel), "initrd": str(self.guest.initrd), "append": self.guest.append}
        config |= {"size": int(self.arguments.size), "accel": self.arguments.accel}
        config |= {"options": json.loads(self.arguments.set)}
        command = [sys.executable, __file__, "--worker", json.dumps(config)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def _read(self, at: int, worker: subprocess.Popen[str]) -> None:
        for line in worker.stdout or ():
            if line.startswith("{"):
                self._last[at] = {"mode": self.mode, "guest": at, **json.loads(line)}
                self.samples.append(self._last[at])
            else:
                self._lines[at].append(line.strip())

    def _send(self, worker: subprocess.Popen[str], text: str) -> None:
        try:
            assert worker.stdin is not None
            worker.stdin.write(text)
            worker.stdin.flush()
        except BrokenPipeError:  # killed: it will count as such
            return

    def _until(self, workers: list[subprocess.Popen[str]], which: Any, word: str, timeout: float) -> str:
        """Wait until each of *which* has said *word*, or is dead; the last that it said."""
        end, said = time.monotonic() + timeout, ""
        for at in which:
            while time.monotonic() < end:
                found = [line for line in self._lines[at] if line.startswith(word)]
                if found:
                    said = found[-1]
                    self._lines[at].clear()
                    break
                if workers[at].poll() is not None:
                    return ""
                time.sleep(0.02)
        return said


def expected(text: str, size: int) -> str:
    """The sum of *size* bytes of *text* and a newline, again and again."""
    line = f"{text}\n".encode()
    block = line * 65536
    sum_ = hashlib.sha1(usedforsecurity=False)
    for at in range(0, size, len(block)):
        sum_.update(block[: size - at])
    return sum_.hexdigest()


def work(config: dict[str, Any]) -> int:
    """One machine in its cgroup: commands from stdin to the guest, its answers and samples to stdout."""
    import re

    sys.setswitchinterval(1e-4)
    Path(config["group"], "cgroup.procs").write_text(str(os.getpid()))
    from cardcage import Machine

    fragment: dict[str, Any] = dict(MODES[config["mode"]])
    if "policy" in fragment:
        fragment = {"policy": {"memory": [{"type": "balloon", **config["options"]}]}}
    drive = {"type": "virtio-blk", "drive": {"file": config["disk"], "format": "raw", "readonly": True}}
    second = {"type": "isa-serial", "port": 0x2F8, "irq": 3, "char": "null"}
    vm = Machine(
        kernel=config["kernel"],
        initrd=config["initrd"],
        append=config["append"],
        memory=config["size"],
        accel=config["accel"],
        devices=[drive, {"type": "isa-serial", "port": 0x3F8, "irq": 4, "char": "console"}, second],
        machine={"name": f"guest{config['number']}"},
        fragments=[fragment],
    )
    vm.start()
    threading.Thread(target=sample, args=(vm,), daemon=True).start()
    vm.console.expect("READY", timeout=300)
    print(json.dumps(look(vm)), flush=True)
    print("READY", flush=True)
    for line in sys.stdin:
        vm.console.send(line)
        print(vm.console.expect(re.compile(r"SUMS \w+ \w+(?= END)"), timeout=300).splitlines()[-1], flush=True)
    vm.close()
    return 0


def look(vm: Any) -> dict[str, Any]:
    """What this machine holds now, in bytes; ``own`` is what the process has besides the guest's RAM."""
    from cardcage_memory_policies import MachineMemory

    resident = MachineMemory(vm).resident
    balloon = vm.services.get("balloon")
    rss = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    now = {"time": time.monotonic(), "resident": resident, "own": max(0, rss - resident)}
    report = balloon.report.values if balloon is not None and balloon.report is not None else {}
    return {**now, "ballooned": balloon.size if balloon else 0, "available": report.get("available_memory", 0)}


def sample(vm: Any) -> None:
    """A line each second."""
    while vm.state != "stopped":
        print(json.dumps(look(vm)), flush=True)
        time.sleep(1)


if __name__ == "__main__":
    sys.exit(main())
