"""Sandboxes: python benchmarks/sandbox.py [--runs N] [--e2b] [--idle N].

Cold and warm creation, a command's round trip, a fork of ten, a file, and the end. Rows are medians, with the best in
brackets, and the processor time of all processes where that says more on a busy host. ``--e2b`` measures e2b's SDK
against ``cardcage sandbox serve`` too; ``--idle 100`` so many idle guests at once, in place of all else: memory that
only their own process has, the guest's RAM aside, and their use of a core. It has a run directory of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cardcage_fleet import find
from cardcage_sandbox import Sandbox, Template, stop_templates
from cardcage_sandbox.template import keepers
from paired import median

if TYPE_CHECKING:
    from collections.abc import Callable

KEY = "e2b_0123456789abcdef"


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds, and the result."""
    began = time.perf_counter()
    found = call()
    return 1000 * (time.perf_counter() - began), found


def row(name: str, times: list[float]) -> None:
    """Print one."""
    print(f"| {name} | {median(times):.4g} ms ({min(times):.3g}) |", flush=True)


def repeated(name: str, runs: int, call: Callable[[], Any]) -> None:
    """Measure and print one."""
    row(name, [timed(call)[0] for _ in range(runs)])


def made(template: Template, runs: int, name: str) -> None:
    """Sandboxes that are made one after another, once the template has made *spare* ones."""
    times = []
    for _ in range(runs):
        took, sandbox = timed(lambda: Sandbox.create(template))
        times.append(took)
        sandbox.kill()
        time.sleep(0.2)  # until one more is made in advance
    row(name, times)


def processor(pid: int) -> float:
    """Milliseconds that a process has run for: the clock of clock_getcpuclockid(3)."""
    return 1000 * time.clock_gettime(~pid << 3 | 2)


def forks(sandbox: Sandbox, runs: int) -> None:
    """Ten at once, by the clock and by processor time."""
    times, used, ends = [], [], []
    pids = [sandbox.made.pid, os.getpid(), *(one.pid for one in keepers())]
    for _ in range(runs):
        before = sum(map(processor, pids))
        took, copies = timed(lambda: sandbox.fork(10))
        used.append(sum(map(processor, [*pids, *(one.made.pid for one in copies)])) - before)
        times.append(took)
        ends += [timed(one.kill)[0] for one in copies]
    row("`fork(10)`", times)
    row("likewise: processor time of all processes", used)
    row("`kill()`", ends)


def dirty(pid: int) -> float:
    """MiB that a process alone has written, its guest's RAM aside (proc_pid_smaps(5))."""
    entry = find(str(pid))
    total, ram = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0]:
            low = int(words[0].partition("-")[0], 16)
            ram = entry.start <= low < entry.start + entry.size
        elif words[0] == "Private_Dirty:" and not ram:
            total += int(words[1])
    return total / 1024


def idle(count: int) -> None:
    """So many guests at once, which have each run a command, and answer at the end."""
    template = Template(name="idle", memory="128M", spare=0, most=1000)
    made = [Sandbox.create(template)]
    try:
        while len(made) < count:
            made += made[0].fork(min(count - len(made), 25), timeout="1h")
        for one in made:
            one.commands.run(["/bin/true"])
        time.sleep(10)
        pids = [one.made.pid for one in made]
        before, began = [processor(pid) for pid in pids], time.monotonic()
        time.sleep(60)
        passed = 1000 * (time.monotonic() - began)
        shares = [100 * (processor(pid) - at) / passed for pid, at in zip(pids, before, strict=True)]
        sizes = [dirty(pid) for pid in pids]
        answers = sum(one.commands.run("echo alive").stdout == "alive\n" for one in made)
        name = f"{count} idle guests: private dirty memory beside RAM"
        print(f"| {name} | {median(sizes):.3g} MiB ({max(sizes):.3g} at most) |")
        print(f"| likewise: of a core, in 60 s | {median(shares):.2g} % ({max(shares):.2g} at most) |")
        print(f"| likewise: answer then | {answers} |", flush=True)
    finally:
        stop_templates()


def library(runs: int) -> None:
    """The library."""
    template = Template(name="bench", memory="256M", spare=1)
    cold, used = [], []
    for _ in range(3):
        took, sandbox = timed(lambda: Sandbox.create(template))
        cold.append(took)
        used.append(processor(keepers()[0].pid))
        sandbox.kill()
        stop_templates()
    row("`Sandbox.create()`, cold: with the template's boot", cold)
    row("likewise: processor time of the template's process", used)
    made(template, runs, "`Sandbox.create()`, made in advance")
    made(template.with_limits(spare=0), runs, "`Sandbox.create()`, forked when it is asked for")
    with Sandbox.create(template) as sandbox:
        run, files = sandbox.commands.run, sandbox.files
        repeated('`commands.run(["/bin/true"])`', runs, lambda: run(["/bin/true"]))
        repeated('`commands.run(":")`, a shell', runs, lambda: run(":"))
        files.write("word", "x")
        repeated("`files.read`, 1 byte", runs, lambda: files.read("word"))
        repeated("`files.write`, 1 byte", runs, lambda: files.write("word", "x"))
        data = bytes(20 << 20)
        took = min(timed(lambda: files.write("big", data))[0] for _ in range(3))
        back = min(timed(lambda: files.read("big"))[0] for _ in range(3))
        print(f"| 20 MiB written, read | {20 * 1.048576e3 / took:.3g} MB/s, {20 * 1.048576e3 / back:.3g} MB/s |")
        forks(sandbox, max(runs // 4, 3))
        repeated("`pause()` and `resume()`", runs, lambda: (sandbox.pause(), sandbox.resume()))
    stop_templates()


def e2b(runs: int) -> None:
    """The SDK against the face."""
    environment = {**os.environ, "CARDCAGE_SANDBOX_KEY": KEY}
    words = [sys.executable, "-c", "import sys; from cardcage_cli import main; sys.exit(main())", "sandbox", "serve"]
    with subprocess.Popen([*words, "--port", "0"], stdout=subprocess.PIPE, env=environment, text=True) as server:
        assert server.stdout is not None
        url = server.stdout.readline().split("E2B_API_URL=")[1].split()[0]
        os.environ.update(E2B_API_URL=url, E2B_SANDBOX_URL=url, E2B_API_KEY=KEY)
        try:
            from e2b import Sandbox as Theirs

            Theirs.create().kill()
            times = []
            for _ in range(runs):
                took, sandbox = timed(Theirs.create)
                times.append(took)
                sandbox.kill()
                time.sleep(0.2)
            row("e2b: `Sandbox.create()`", times)
            sandbox = Theirs.create()
            repeated('e2b: `commands.run(":")`', runs, lambda: sandbox.commands.run(":"))
            repeated("e2b: `files.write`, 1 byte", runs, lambda: sandbox.files.write("word", "x"))
            repeated("e2b: `files.read`, 1 byte", runs, lambda: sandbox.files.read("word"))
            sandbox.kill()
        finally:
            server.terminate()
            stop_templates()


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--e2b", action="store_true")
    parser.add_argument("--idle", type=int, default=0, metavar="N")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cardcage-") as folder:
        os.environ["XDG_RUNTIME_DIR"] = folder
        print(f"load {os.getloadavg()[0]:.1f}\n\n| | |\n|---|---|")
        try:
            if arguments.idle:
                idle(arguments.idle)
                return
            library(arguments.runs)
            if arguments.e2b:
                e2b(arguments.runs)
        finally:
            stop_templates()


if __name__ == "__main__":
    main()
