"""How long ``cardcage`` takes by itself: python benchmarks/startup.py [--runs N] [--accel tcg].

Each row is a process of its own, with a warm page cache and compiled bytecode: wall and processor time from exec to
exit. The guest of ``run`` ends with its first instructions, so that what is left is the VMM's own time. "First
instruction" is that of the guest: from exec until its store is seen in a file that is its RAM. A bare interpreter is
the floor. The last row is a machine of that kind on a Host that has built one before: median of 20 in one process.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

MAIN = "import sys; from cardcage_cli import main; sys.exit(main())"
MACHINE = """
[machine]
memory = "64M"
[boot]
protocol = "raw"
image = "guest.bin"
[[device]]
type = "isa-debug-exit"
iobase = 0xf4
"""


WARM = """
import json, os, time
from statistics import median
from cardcage import Host, Machine
walls, processor = [], []
with Host() as host:
    for _ in range(21):
        before, began = os.times(), time.perf_counter()
        machine = Machine.from_toml("vm.toml", set=["machine.accel={accel}"], host=host)
        walls.append(time.perf_counter() - began)
        after = os.times()
        processor.append(after.user + after.system - before.user - before.system)
        machine.close()
print(json.dumps([1000 * median(walls[1:]), 1000 * sum(processor[1:]) / 20]))
"""


MARK = 0x5000
FIRST = bytes.fromhex("c606005001b000e6f4f4")
"""mov byte [0x5000], 1; mov al, 0; out 0xf4, al; hlt."""
CLEAN = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def first_instruction(words: list[str], folder: str, runs: int) -> tuple[float, float]:
    """Median wall and processor time in milliseconds, until the guest's store is in the file of its RAM."""
    walls, processor = [], []
    for _ in range(runs + 1):
        ram = Path(folder, "ram")
        ram.write_bytes(b"")
        os.truncate(ram, 64 << 20)
        with ram.open("rb") as file, mmap.mmap(file.fileno(), MARK + 1, prot=mmap.PROT_READ) as seen:
            began = time.perf_counter()
            options = ["--set", "memory.type=file", "--set", f"memory.path={ram}"]
            with subprocess.Popen(
                [*words, *options], cwd=folder, env=CLEAN, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            ) as process:
                while not seen[MARK] and process.poll() is None:
                    time.sleep(0.0005)  # a core of its own is not to be had everywhere
                walls.append(time.perf_counter() - began)
                tasks = Path(f"/proc/{process.pid}/task").glob("*/schedstat")
                processor.append(sum(int(one.read_text().split()[0]) for one in tasks) / 1e9)
            if not seen[MARK]:
                raise SystemExit(f"the guest did not start: {' '.join(words)}")
    return 1000 * median(walls[1:]), 1000 * median(processor[1:])


def measure(words: list[str], folder: str, runs: int) -> tuple[float, float]:
    """Median wall and processor time in milliseconds."""
    walls, processor = [], []
    for _ in range(runs + 1):
        before, began = os.times(), time.perf_counter()
        subprocess.run(words, cwd=folder, env=CLEAN, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        walls.append(time.perf_counter() - began)
        after = os.times()
        processor.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return 1000 * median(walls[1:]), 1000 * median(processor[1:])  # the first warms the cache


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--accel", default="tcg")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "guest.bin").write_bytes(bytes.fromhex("b000e6f4f4"))  # mov al,0; out 0xf4,al; hlt
        Path(folder, "first.bin").write_bytes(FIRST)
        Path(folder, "vm.toml").write_text(MACHINE)
        command = [sys.executable, "-c", MAIN]
        run = [*command, "run", "vm.toml", "--accel", given.accel]
        bare, first = ["--set", "machine.platform=none"], ["--set", "boot.image=first.bin"]
        rows: dict[str, tuple[Any, list[str]]] = {
            "bare interpreter": (measure, [sys.executable, "-c", ""]),
            "cardcage --help": (measure, [*command, "--help"]),
            "first instruction, bare": (first_instruction, [*run, *bare, *first]),
            "first instruction, pc": (first_instruction, [*run, *first]),
            "cardcage run, bare": (measure, [*run, *bare]),
            "cardcage run, pc": (measure, run),
        }
        print(f"{given.accel:28} {'wall ms':>8} {'cpu ms':>8}")
        for name, (timed, words) in rows.items():
            wall, cpu = timed(words, folder, given.runs)
            print(f"{name:28} {wall:8.0f} {cpu:8.0f}", flush=True)
        warm = [sys.executable, "-c", WARM.format(accel=given.accel)]
        wall, cpu = json.loads(subprocess.run(warm, cwd=folder, capture_output=True, text=True, check=True).stdout)
        print(f"{'Machine(), pc, warm Host':28} {wall:8.1f} {cpu:8.1f}")


if __name__ == "__main__":
    main()
