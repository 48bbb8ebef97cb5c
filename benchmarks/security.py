"""What mediation costs: one question, and a boot and disk requests with and without the default policy.

    python benchmarks/security.py [--runs 3] [--scale 1] [--costs-only]

Questions are timed in this process. Boot and disk runs alternate between no security card
and ``--security default`` in the same run: processor time of the VMM's process (quieter than the clock when the host
has other work), and operations a second inside the guest. Aims: at most 50 ns without a card, 1 µs on a cache hit, 2 %
on boot and disk.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import tempfile
import time
import timeit
from pathlib import Path
from typing import Any

from cardcage.config import Draft
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage.security import Act, Mediator
from cardcage_boot import cpio
from paired import Guest, make_guest, median, print_table, start_cardcage

SOURCE = Path(__file__).parent / "guest" / "io.c"
ROUNDS, CALLS = 300, 1000
IMAGE = 64 << 20


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--scale", type=int, default=1, help="times the work of a quick disk run")
    parser.add_argument("--costs-only", action="store_true", help="no guests")
    parser.add_argument("--timeout", type=float, default=600)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cardcage-bench-") as name:
        costs(Path(name))
        if not arguments.costs_only:
            print()
            guests(Path(name), arguments)


def best(statement: str, **names: Any) -> str:
    """Nanoseconds of *statement*, of the thread's own time; the least of many short rounds."""
    timer = timeit.Timer(statement, "a, b, c, d = arguments", timer=time.thread_time, globals=names)
    return f"{min(timer.repeat(ROUNDS, CALLS)) / CALLS * 1e9:.0f}"


def nothing(act: Act) -> None:
    """What calling costs."""


def costs(folder: Path) -> None:
    """The table of single questions."""
    spec = {"type": "selinux", "state": str(folder / "state")}
    facts = {"machine": "vm", "device": "log"}
    device = {"type": "debugcon", "irq": 5}
    wanted = {"memory": "16M", "accel": "tcg", "platform": "none"}
    began = time.perf_counter()
    with Host(security=Draft.of({"security": [spec]}).config().security) as host:
        loaded = time.perf_counter() - began
        vm = Machine(host=host, machine=wanted, devices=[device])
        slot, label = vm.devices["debugcon"].slot, vm.devices["debugcon"].slot.label
        asked = vm.label, label, "device", ("attach",)
        act = Act(*asked, facts)
        question, read, line = "ask(act)", "read(a, b)", "line(c)"
        made = "ask(Act(a, b, c, d, facts))"
        access = 0x1000, 16, False, None
        rows = [
            ["an empty function", best(question, ask=nothing, arguments=asked, act=act)],
            ["no security card", best(question, ask=Mediator().check, arguments=asked, act=act)],
            ["allowed, in the cache", best(question, ask=vm.mediator.check, arguments=asked, act=act)],
            ["the same, and the act is made", best(made, ask=vm.mediator.check, arguments=asked, Act=Act, facts=facts)],
            ["guest memory, 16 bytes, granted", best(read, read=slot.memory.read, arguments=access)],
            ["guest memory, 16 bytes, no card", best(read, read=vm.memory.read, arguments=access)],
            ["interrupt line, granted", best(line, line=slot.interrupts.line().set, arguments=access)],
            ["interrupt line, no card", best(line, line=vm.lines[5].source().set, arguments=access)],
        ]
    print_table(["one question or access", "ns"], rows)
    print(f"host with all cards and the default policy: {loaded * 1000:.0f} ms")


def guests(folder: Path, arguments: argparse.Namespace) -> None:
    """The table of boots and disk runs."""
    subprocess.run(["gcc", "-O2", "-static", "-o", folder / "io", SOURCE], check=True)
    program = cpio.file("io", (folder / "io").read_bytes(), mode=0o755)
    kinds = {"boot": make_guest(folder, "", "true"), "disk": None}
    (folder / "disk").mkdir()
    kinds["disk"] = make_guest(folder / "disk", "", f"/io {arguments.scale}", [program])
    found: dict[str, dict[str, list[float]]] = {}
    for at in range(arguments.runs + 1):
        for kind, guest in kinds.items():
            for security in ("none", "default"):
                assert guest is not None  # filled in above
                figures = once(kind, guest, folder, security, arguments)
                for row, value in figures.items() if at else ():  # the first run fills the translator's cache
                    found.setdefault(row, {}).setdefault(security, []).append(value)
    rows = []
    for row, by in found.items():
        without, with_ = median(by["none"]), median(by["default"])
        pairs = [b / a for a, b in zip(by["none"], by["default"], strict=True)]
        rows.append([row, f"{without:.2f}", f"{with_:.2f}", f"{median(pairs):.3f}"])
    print_table(["with and without the default policy", "without", "with", "with/without"], rows)


def once(kind: str, guest: Guest, folder: Path, security: str, arguments: argparse.Namespace) -> dict[str, float]:
    """One run: seconds of processor time, and operations a second."""
    more = ["--security", "default"] if security == "default" else []
    if kind == "disk":
        image = folder / "image"
        with image.open("wb") as file:
            file.truncate(IMAGE)
        more += ["--drive", f"file={image},format=raw"]
    environment = {"XDG_CACHE_HOME": str(folder / "cache")}
    # As installed: compiled modules are kept, also where a developer's shell says otherwise.
    environment |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(folder / "modules")}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = start_cardcage(guest, folder, "tcg", environment, more)
    output = run.finish(arguments.timeout).decode(errors="replace")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = {
        f"{kind}: processor time, s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        f"{kind}: whole run, s": time.monotonic() - run.began,
    }
    for line in output.splitlines():
        words = line.split()
        if len(words) == 3 and words[1].isdigit() and words[2].isdigit():
            found[f"{kind}: {words[0]}, /s"] = int(words[1]) / int(words[2]) * 1e6
    return found


if __name__ == "__main__":
    main()
