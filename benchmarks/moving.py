"""Copies and checkpoints of a running guest: python benchmarks/moving.py [--runs N] [--memory 512M] [--no-qemu].

A Debian guest under the translator, with an agent. Milliseconds, median and 95th percentile of N runs: a fork until the
copy's first instruction, until its agent has answered, until a command has ended in it, and until it is closed again;
a machine that is parked and goes on; a checkpoint, and a revert after a command. Beside it QEMU's translator with the
same kernel: ``savevm`` and ``loadvm``, which have no fork to set against, only a way back.
"""

from __future__ import annotations

import argparse
import re
import resource
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from cardcage_agent import Machine
from cardcage_boot.command import COMMAND_LINE


def row(name: str, times: list[float], note: str = "") -> None:
    """Print a line of the table."""
    ordered = sorted(times)
    late = ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))]
    print(f"{name:44} {median(ordered) * 1e3:9.2f} {late * 1e3:9.2f}  {note}", flush=True)


def forks(vm: Any, runs: int) -> None:
    """One after another."""
    born, answered, ran, gone, parked, ours, its = [], [], [], [], [], [], []
    for _ in range(runs):
        began, spent = time.monotonic(), time.process_time()
        (copy,) = vm.fork(1)
        copy.agent.ping()
        answered.append(time.monotonic() - began)
        ours.append(time.process_time() - spent)
        its.append(processor(copy.pid))
        copy.run("true")
        ran.append(time.monotonic() - began)
        born.append(copy.born - began)
        copy.close()
        gone.append(time.monotonic() - began)
    for _ in range(runs):
        began = time.monotonic()
        with vm.parked():
            pass
        parked.append(time.monotonic() - began)
    row("fork to the first instruction", born)
    note = f"{median(ours) * 1e3:.1f} ms of processor time here, {median(its) * 1e3:.1f} in the copy"
    row("fork to an answer of the agent", answered, note)
    row("fork to the end of /bin/true", ran)
    row("fork, a command, close", gone, f"{1 / median(gone):.0f} a second")
    row("the same machine parked and started anew", parked)
    copies = vm.fork(runs)
    time.sleep(1)
    dirty = [private(one.pid) for one in copies]
    print(f"{'private memory of an idle copy after 1 s':44} {median(dirty):9.2f} MB   ({runs} alive)")
    for one in copies:
        one.close()


def processor(pid: int) -> float:
    """Seconds that a process has run for by now, with threads that ended: the clock of clock_getcpuclockid(3)."""
    return time.clock_gettime(~pid << 3 | 2)


def private(pid: int) -> float:
    """MB that only this process has."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"^Private_Dirty:\s*(\d+)", text, re.M)
    return int(found[1]) / 1000 if found else 0.0


def reverts(vm: Any, runs: int) -> None:
    """A way back, after a command and after nothing."""
    began = time.monotonic()
    vm.checkpoint()
    print(f"{'checkpoint':44} {(time.monotonic() - began) * 1e3:9.2f}")
    for name, command in (("after nothing", ""), ("after a command", "true")):
        times, pages, used = [], [], []
        for _ in range(runs):
            if command:
                vm.run(command)
            began, spent = time.monotonic(), resource.getrusage(resource.RUSAGE_THREAD)
            pages.append(vm.revert())
            times.append(time.monotonic() - began)
            after = resource.getrusage(resource.RUSAGE_THREAD)
            used.append(after.ru_utime + after.ru_stime - spent.ru_utime - spent.ru_stime)
        note = f"{median(pages):.0f} pages; {median(used) * 1e3:.2f} ms of processor time"
        row(f"revert {name}", times, note)
    vm.agent.ping()  # the link to the agent is at rest at the checkpoint, and need not begin anew
    vm.checkpoint()
    turns, began, spent = 20 * runs, time.monotonic(), time.process_time()
    for _ in range(turns):
        vm.revert()
        vm.agent.ping()
    passed, used_up = time.monotonic() - began, time.process_time() - spent
    note = f"a second; {used_up / turns * 1e3:.2f} ms of processor time each"
    print(f"{'a loop of revert, request, answer':44} {turns / passed:9.0f} {note}")


def qemu(kernel: Path, initrd: Path, memory: str, runs: int) -> None:
    """QEMU's savevm and loadvm of the same guest at a shell."""
    with tempfile.TemporaryDirectory() as folder:
        image = f"{folder}/state.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1G"], check=True)
        words = [
            *("qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", memory, "-display", "none", "-nodefaults"),
            *("-kernel", str(kernel), "-initrd", str(initrd), "-append", f"{COMMAND_LINE} quiet"),
            *("-serial", f"file:{folder}/console", "-drive", f"if=none,id=d,file={image}", "-monitor", "stdio"),
        ]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=0) as process:
            said, heard = process.stdin, process.stdout
            assert said is not None
            assert heard is not None

            def ask(command: str) -> float:
                began = time.monotonic()
                said.write(command + "\n")
                text = ""
                while not text.rstrip().endswith("(qemu)") or command not in text:
                    text += heard.read(1)
                return time.monotonic() - began

            until = time.monotonic() + 120
            while "~ # " not in Path(f"{folder}/console").read_text(errors="replace") and time.monotonic() < until:
                time.sleep(0.2)
            row("QEMU: savevm", [ask("savevm a") for _ in range(min(runs, 5))])
            row("QEMU: loadvm", [ask("loadvm a") for _ in range(min(runs, 5))])
            said.write("quit\n")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--memory", default="512M")
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--no-qemu", action="store_true")
    given = parser.parse_args()
    devices = [{"type": "virtio-net", "net": "null"}, {"type": "virtio-rng"}]
    with Machine.debian(memory=given.memory, cpus=given.cpus, accel="tcg", devices=devices) as made:
        vm: Any = made
        vm.start()
        vm.run("true")
        print(f"{given.memory}, {given.cpus} vCPUs, {given.runs} runs{'':17} median ms   p95 ms")
        forks(vm, given.runs)
        reverts(vm, given.runs)
    if given.no_qemu or shutil.which("qemu-system-x86_64") is None:
        return
    from cardcage_boot.cache import cache_root
    from cardcage_boot.fetch import Shelf

    shelf = Shelf(cache_root(), lambda what, percent: None, lambda line: None)
    kernel = shelf.kernel()
    qemu(kernel.path, shelf.initramfs(kernel), given.memory, given.runs)


if __name__ == "__main__":
    main()
