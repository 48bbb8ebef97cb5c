"""Host memory of identical Linux guests with nothing, KSM, free page reporting and the balloon policy, and the cost.

    python benchmarks/memory.py [--guests 8] [--size 256M] [--accel tcg] [--settle 60] [--apart]
                                [--modes nothing,ksm,reporting,balloon]

Each guest boots, uses a fourth of its memory and frees it; then the guests are idle for --settle seconds. ``ram`` is
the host memory of all guests' RAM (proportional share: a merged page counts once), ``own`` that of the VMM for each
machine. ``cpu`` is per cent of one processor over the idle time: of the VMM, and of ksmd. With --apart each machine has
a process of its own. The balloon policy runs in a cgroup that is limited to half of all sizes and 100 MiB for each VMM;
this and KSM need root.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cardcage.units import Size
from overcommit import cgroup, set_limit
from paired import make_guest, print_table

if TYPE_CHECKING:
    from cardcage import Machine

VMM = 100 << 20
TICK = os.sysconf("SC_CLK_TCK")
SCRIPT = """
exec < /dev/console > /dev/console
mkdir /t; mount -t tmpfs -o size=90% t /t; yes cardcage | head -c {use} > /t/x; rm /t/x; echo READY
read line
"""


def main() -> int:
    """Run the modes, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guests", type=int, default=8)
    parser.add_argument("--size", type=Size, default=Size("256M"))
    parser.add_argument("--accel", default="tcg")
    parser.add_argument("--settle", type=float, default=60)
    parser.add_argument("--apart", action="store_true")
    parser.add_argument("--modes", default="nothing,ksm,reporting,balloon")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(json.loads(arguments.worker))
    rows: list[list[str]] = []
    base = 0
    with tempfile.TemporaryDirectory(prefix="cardcage-bench-") as name:
        guest = make_guest(Path(name), "", SCRIPT.format(use=int(arguments.size) // 4))
        for mode in arguments.modes.split(","):
            with cgroup(f"cardcage-{os.getpid()}-{mode}") if mode == "balloon" else nullcontext() as group:
                found = measure(mode, guest, arguments, group)
            ram, own = found["ram"], found["own"] / arguments.guests
            base = base or ram
            cells = [f"{ram >> 20}", f"{1 - ram / base:.0%}", f"{own / 2**20:.1f}"]
            rows.append([mode, *cells, f"{found['cpu']:.1f}", f"{found['ksmd']:.1f}", f"{found['boot']:.0f}"])
    head = ["mode", "ram MiB", "saved", "own MiB each", "cpu %", "ksmd %", "boot s"]
    print_table(head, rows)
    return 0


def measure(mode: str, guest: Any, arguments: argparse.Namespace, group: Path | None) -> dict[str, float]:
    """One mode: sums over its processes."""
    each = 1 if arguments.apart else arguments.guests
    config: dict[str, Any] = {"mode": mode, "count": each, "size": int(arguments.size)}
    config |= {"accel": arguments.accel, "settle": arguments.settle}
    config |= {"kernel": str(guest.kernel), "initrd": str(guest.initrd), "append": guest.append}
    if group is not None:
        set_limit(group, arguments.guests * (int(arguments.size) // 2 + VMM))
        config["group"] = str(group)
    command = [sys.executable, __file__, "--worker", json.dumps(config)]
    began = time.monotonic()
    count = arguments.guests // each
    workers = [subprocess.Popen(command, stdin=-1, stdout=-1, text=True) for _ in range(count)]
    for at, one in enumerate(workers):
        assert one.stdout is not None
        if one.stdout.readline() != "READY\n":
            sys.exit(f"worker {at} ended")
    boot, ksmd = time.monotonic() - began, ksmd_time()
    for one in workers:
        assert one.stdin is not None
        one.stdin.write("settle\n")
        one.stdin.flush()
    found = [json.loads(one.stdout.readline()) for one in workers if one.stdout is not None]
    ksmd = (ksmd_time() - ksmd) / arguments.settle * 100
    for one in workers:
        one.communicate("end\n")
    return {"boot": boot, "ksmd": ksmd, **{key: sum(one[key] for one in found) for key in ("ram", "own", "cpu")}}


def ksmd_time() -> float:
    """Seconds of processor time that ksmd has had."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, _, rest = path.read_text().rpartition(")")
        except OSError:  # it has just ended
            continue
        if head.endswith("(ksmd"):
            words = rest.split()
            return (int(words[11]) + int(words[12])) / TICK
    return 0.0


def work(config: dict[str, Any]) -> int:
    """Some machines in one process."""
    sys.setswitchinterval(1e-4)
    if "group" in config:
        Path(config["group"], "cgroup.procs").write_text(str(os.getpid()))
    from cardcage import Machine
    from cardcage.host import Host

    more = fragment(config)
    with Host() as host:
        serial = {"type": "isa-serial", "char": "console", "port": 0x3F8, "irq": 4}
        second = {"type": "isa-serial", "char": "null", "port": 0x2F8, "irq": 3}
        machines = [
            Machine(
                kernel=config["kernel"],
                initrd=config["initrd"],
                append=config["append"],
                memory=config["size"],
                accel=config["accel"],
                devices=[serial, second],
                machine={"name": f"guest{at}"},
                fragments=[more],
                host=host,
            ).start()
            for at in range(config["count"])
        ]
        for vm in machines:
            vm.console.expect("READY", timeout=600)
        print("READY", flush=True)
        sys.stdin.readline()
        began = time.process_time()
        time.sleep(config["settle"])
        cpu = (time.process_time() - began) / config["settle"] * 100
        print(json.dumps({"cpu": cpu, **shares(machines)}), flush=True)
        sys.stdin.readline()
    return 0


def fragment(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a mode."""
    if config["mode"] == "ksm":
        return {"policy": {"memory": [{"type": "ksm", "scan_time": "10s"}]}}
    if config["mode"] == "reporting":
        return {"device": [{"type": "virtio-balloon"}]}
    if config["mode"] == "balloon":
        return {"policy": {"memory": [{"type": "balloon", "reserve": 0, "floor": "48M", "spare": "24M"}]}}
    return {}


def shares(machines: list[Machine]) -> dict[str, int]:
    """Proportional shares in bytes: of all RAM, and of the rest of this process."""
    from cardcage_memory_policies import MachineMemory, mappings

    areas = [area for vm in machines for area in MachineMemory(vm).areas]
    ram = own = 0
    for one in mappings():
        share = one.sizes.get("Pss", 0)
        if any(start < one.end and one.start < start + size for start, size in areas):
            ram += share
        else:
            own += share
    return {"ram": ram, "own": own}


if __name__ == "__main__":
    sys.exit(main())
