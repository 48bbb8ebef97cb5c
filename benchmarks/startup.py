"""How long ``cardcage`` takes by itself: python benchmarks/startup.py [--runs N] [--accel tcg].

Each row is a process of its own, with a warm page cache: wall and processor time from exec to exit. The guest of
    ``run`` ends with its
first instructions, so that what is left is the VMM's own time. A bare interpreter is the floor. The last row is a
machine of that kind on a Host that has built one before: median of 20 in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

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


def measure(words: list[str], folder: str, runs: int) -> tuple[float, float]:
    """Median wall and processor time in milliseconds."""
    walls, processor = [], []
    for _ in range(runs + 1):
        before, began = os.times(), time.perf_counter()
        subprocess.run(words, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, check=False)
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
        Path(folder, "vm.toml").write_text(MACHINE)
        rows = {
            "bare interpreter": [sys.executable, "-c", ""],
            "cardcage --help": [sys.executable, "-c", MAIN, "--help"],
            f"cardcage run, bare ({given.accel})": [
                sys.executable,
                "-c",
                MAIN,
                "run",
                "vm.toml",
                "--accel",
                given.accel,
                "--set",
                "machine.platform=none",
            ],
            f"cardcage run, pc ({given.accel})": [sys.executable, "-c", MAIN, "run", "vm.toml", "--accel", given.accel],
        }
        print(f"{'':28} {'wall ms':>8} {'cpu ms':>8}")
        for name, words in rows.items():
            wall, cpu = measure(words, folder, given.runs)
            print(f"{name:28} {wall:8.0f} {cpu:8.0f}")
        warm = [sys.executable, "-c", WARM.format(accel=given.accel)]
        wall, cpu = json.loads(subprocess.run(warm, cwd=folder, capture_output=True, text=True, check=True).stdout)
        print(f"{'Machine(), pc, warm Host':28} {wall:8.1f} {cpu:8.1f}")


if __name__ == "__main__":
    main()
