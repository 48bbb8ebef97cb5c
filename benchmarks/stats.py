"""What it costs to ask for the memory of many machines every second: python benchmarks/stats.py [--machines 100].

The machines are real (RAM that is touched, no guest code), several to a process, and one page in a hundred of each is
touched anew all the time, so that the counters never stand still. Columns: processor time of one look per machine, and
of all looks per second, for the first look (exact for all), for the sampler of ``cardcage stats --watch``, and for an
exact look at all machines every second.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time

PROGRAM = """
import sys
from cardcage.machine import Machine
count, size, resident = map(int, sys.argv[1:])
machines = []
for at in range(count):
    keys = {"name": f"m{at}", "memory": size << 20, "accel": ["tcg"], "platform": "none"}
    vm = Machine(fragments=[{"machine": keys}])
    for part in range(1, 1 + resident):
        vm.memory.write(part << 20, b"x" * (1 << 20))
    machines.append(vm)
print("ready", flush=True)
turn = 0
import select
while not select.select([sys.stdin], [], [], 0.2)[0]:
    turn += 1
    vm = machines[turn % count]
    vm.memory.discard(1 << 20, (resident << 20) // 100 // 4096 * 4096 or 4096)
    vm.memory.write(1 << 20, b"x" * (((turn % 2) + 1) * (resident << 20) // 200 or 4096))
for vm in machines:
    vm.close()
"""


def look(seconds: int, budget: float) -> tuple[float, float, float]:
    """Sample every second: processor time of the first look and of a later one, and the mean age of the figures."""
    from cardcage_fleet.accounting import Sampler
    from cardcage_fleet.roster import Roster

    sampler, roster, ages, began = Sampler(budget), Roster(), [], time.process_time()
    first = 0.0
    for turn in range(seconds + 1):
        found = sampler.sample(roster.read()[0])
        if turn == 0:
            first = time.process_time() - began
        else:
            ages += [one.age for one in found]
        time.sleep(1)
    return first, (time.process_time() - began - first) / seconds, sum(ages) / max(1, len(ages))


def main() -> None:
    """Start the machines, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--machines", type=int, default=100)
    parser.add_argument("--processes", type=int, default=20)
    parser.add_argument("--size", type=int, default=256, help="MiB of RAM of each")
    parser.add_argument("--resident", type=int, default=32, help="MiB of it that are touched")
    parser.add_argument("--seconds", type=int, default=10)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_RUNTIME_DIR"] = folder
        share = str(given.machines // given.processes)
        words = [sys.executable, "-c", PROGRAM, share, str(given.size), str(given.resident)]
        children = []
        try:
            for _ in range(given.processes):
                child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                children.append(child)
                assert child.stdout is not None
                assert child.stdout.readline() == "ready\n"
            count = given.machines // given.processes * given.processes
            print(
                f"{count} machines of {given.size} MiB, {given.resident} resident, in {given.processes} processes;",
                end=" ",
            )
            print(f"load {os.getloadavg()[0]:.1f}")
            print(f"{'':22}{'us a machine':>14}{'% of a processor':>18}{'age s':>8}")
            first, later, age = look(given.seconds, 0.02)
            print(f"{'first look, exact':22}{first / count * 1e6:14.0f}{'':18}{0:8.1f}")
            print(f"{'--watch (2 % budget)':22}{later / count * 1e6:14.0f}{later * 100:18.1f}{age:8.1f}")
            _, later, age = look(max(3, given.seconds // 3), 1e9)
            print(f"{'exact each second':22}{later / count * 1e6:14.0f}{later * 100:18.1f}{age:8.1f}")
        finally:
            for child in children:
                child.communicate()


if __name__ == "__main__":
    main()
