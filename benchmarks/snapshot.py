"""Snapshots in files, beside QEMU's: python benchmarks/snapshot.py [--runs N] [--accel tcg].

- Stop: how long a Debian guest of 512 MiB at a shell stands still for ``vm.snapshot``, idle, while it writes as fast as
  it can, compressed, and for a snapshot of a restored machine; QEMU's savevm and loadvm of the same guest, as its
  monitor takes for them (the guest stands still for all of savevm).
- Restore: from the call to the guest's first instruction, seen in its memory, in a process that has restored before:
  a tiny guest with 128 MiB and 8 GiB of RAM, and the Debian guest up to a command's answer; that one also with nothing
  of its RAM's file in the page cache, with and without a working set beside it, in turns; and a compressed one with 450
  MB of random data, unpacked while the guest runs and before, in turns.
"""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from cardcage.host import Host
from cardcage_agent import Machine as AgentMachine
from cardcage_snapshot import Verbs, arriving

COUNTER = bytes.fromhex("31c08ed866ff060050ebf9")
"""xor ax, ax; mov ds, ax; again: inc dword [0x5000]; jmp again."""
COMMAND = "head -c 1000000 /dev/zero | md5sum; ls -l /bin | wc -l"
BUSY = "while :; do dd if=/dev/zero of=/tmp/busy bs=1M count=64 conv=notrunc 2>/dev/null; done"


class Machine(Verbs, AgentMachine):
    """A machine with the verbs of both cards."""


def row(name: str, values: list[float], unit: str = "ms") -> None:
    """A line with median, least and most."""
    shown = f"{median(values):9.1f} {unit}   least {min(values):.1f}, most {max(values):.1f}   ({len(values)} runs)"
    print(f"{name:58} {shown}", flush=True)


def timed(act: Any) -> tuple[float, Any]:
    """Milliseconds, and the result."""
    began = time.perf_counter()
    result = act()
    return 1000 * (time.perf_counter() - began), result


def stops(host: Host, folder: Path, runs: int, accel: str) -> None:
    """The guest's stop, and what a snapshot takes in all."""
    with Machine.debian(accel=accel, host=host, name="bench") as vm:
        vm.start()
        vm.run("true", check=True)
        vm.snapshot(folder / "debian", replace=True)
        for words, compress, command in (
            ("idle", False, ""),
            ("idle, zstd", True, ""),
            ("writing all the time", False, BUSY),
        ):
            process = vm.popen(command) if command else None
            time.sleep(0.5)
            taken = [
                timed(lambda compress=compress: vm.snapshot(folder / "again", replace=True, compress=compress))
                for _ in range(runs)
            ]
            row(f"stop, Debian 512 MiB, {words}", [1000 * one.stood for _, one in taken])
            row("    in all", [one for one, _ in taken])
            print(f"    on the disk: {taken[-1][1].stored >> 20} MiB", flush=True)
            if process is not None:
                process.kill()
                process.wait()
    restored, answers = [], []
    for _ in range(runs):
        took, vm = timed(lambda: Machine.restore(folder / "debian", host=host))
        with vm:
            restored.append(took)
            answers.append(took + timed(lambda vm=vm: vm.run("true", check=True))[0])
            made = vm.snapshot(folder / "third", replace=True)
    row("restore, Debian 512 MiB, clock and randomness set", restored)
    row("    until a command has answered", answers)
    row("stop, of a restored machine", [1000 * made.stood])
    cold(host, folder / "debian", runs)
    packed(host, folder, runs, accel)


def cold(host: Host, path: Path, runs: int) -> None:
    """Restores from the disk: until the agent has answered, and until a command has."""
    working, ram = path / "working-set", os.open(path / "ram", os.O_RDONLY)
    data = working.read_bytes()
    rows: dict[str, list[tuple[float, float]]] = {"without a working set": [], "with one": []}
    for _ in range(2 * runs):
        for words, values in rows.items():
            working.unlink(missing_ok=True)
            if words == "with one":
                working.write_bytes(data)
            os.fsync(ram)
            os.posix_fadvise(ram, 0, 0, os.POSIX_FADV_DONTNEED)
            took, vm = timed(lambda: Machine.restore(path, host=host))
            with vm:
                values.append((took, took + timed(lambda vm=vm: vm.run(COMMAND, check=True))[0]))
    os.close(ram)
    for words, values in rows.items():
        row(f"restore from the disk, {words}", [one for one, _ in values])
        row("    until a command has answered", [one for _, one in values])


def packed(host: Host, folder: Path, runs: int, accel: str) -> None:
    """Restores of a compressed snapshot: until the agent has answered, and until a command has."""
    with Machine.debian(accel=accel, memory="1G", host=host, name="packed") as vm:
        vm.start()
        vm.run("head -c 450000000 /dev/urandom > /tmp/data", check=True)
        vm.snapshot(folder / "packed", compress=True, replace=True)

    def refused(**_: Any) -> int:
        raise OSError(errno.ENOSYS, "as on a kernel without it")

    ways = {"while the guest runs": arriving.opened_faults, "before": refused}
    rows: dict[str, list[tuple[float, float]]] = {words: [] for words in ways}
    for _ in range(runs):
        for words, opened in ways.items():
            arriving.opened_faults = opened
            took, vm = timed(lambda: Machine.restore(folder / "packed", host=host))
            with vm:
                rows[words].append((took, took + timed(lambda vm=vm: vm.run("true", check=True))[0]))
    arriving.opened_faults = ways["while the guest runs"]
    for words, values in rows.items():
        row(f"restore, compressed, unpacked {words}", [one for one, _ in values])
        row("    until a command has answered", [one for _, one in values])


def restores(host: Host, folder: Path, runs: int, accel: str) -> None:
    """Time to the first instruction by the size of RAM."""
    (folder / "counter").write_bytes(COUNTER)
    boot = {"protocol": "raw", "image": str(folder / "counter"), "address": 0x7C00, "mode": 16}
    for memory in ("128M", "8G"):
        with Machine(memory=memory, accel=accel, boot=boot, host=host, name="tiny") as vm:
            vm.start()
            time.sleep(0.1)
            vm.snapshot(folder / memory, replace=True)

        def once(memory: str = memory) -> Any:
            vm: Any = Machine.restore(folder / memory, host=host, start=False)
            counter = vm.memory.view(0x5000, 4)
            before = bytes(counter)
            vm.start(boot=False)
            while bytes(counter) == before:
                time.sleep(0)
            counter.release()
            return vm

        values = []
        for _ in range(3 * runs + 2):
            took, vm = timed(once)
            values.append(took)
            vm.close()
        row(f"restore to the first instruction, {memory}", values[2:])


class Monitor:
    """QEMU's human monitor."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        while True:
            try:
                self._socket.connect(str(path))
                break
            except OSError:
                time.sleep(0.05)
        self._hear()

    def _hear(self) -> bytes:
        heard = b""
        while not heard.endswith(b"(qemu) "):
            heard += self._socket.recv(65536)
        return heard

    def do(self, command: str) -> bytes:
        """Carry *command* out; the answer."""
        self._socket.sendall(command.encode() + b"\n")
        return self._hear()


def qemu(host: Host, folder: Path, runs: int) -> None:
    """Rows of QEMU's, with its translator."""
    program = shutil.which("qemu-system-x86_64")
    if program is None:
        print("QEMU is not installed: no rows of its")
        return
    with Machine.debian(host=host, name="files") as vm:
        boot: Any = vm.config.boot
    disk, console, monitor = folder / "state.qcow2", folder / "console", folder / "monitor"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "1M"], check=True)
    words = [program, "-accel", "tcg", "-cpu", "max", "-m", "512M", "-display", "none", "-nodefaults", "-no-reboot"]
    words += ["-kernel", str(boot["kernel"]), "-initrd", str(boot["initrd"]), "-append", str(boot["append"])]
    words += ["-serial", f"file:{console}", "-monitor", f"unix:{monitor},server,nowait"]
    words += ["-drive", f"file={disk},if=none,id=state,format=qcow2"]
    process = subprocess.Popen(words)
    try:
        while not console.exists() or b"# " not in console.read_bytes():
            time.sleep(0.2)
        line = Monitor(monitor)
        row("QEMU: savevm, Debian 512 MiB", [timed(lambda: line.do("savevm one"))[0] for _ in range(runs)])
        row("QEMU: loadvm, in the same process", [timed(lambda: line.do("loadvm one"))[0] for _ in range(runs)])
    finally:
        process.kill()
        process.wait()


def main() -> int:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description="snapshots in files")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--accel", default="tcg")
    parser.add_argument("--folder", type=Path, help="where to write; by default a temporary directory")
    arguments = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} processors", flush=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder, Host() as host:
        restores(host, Path(folder), arguments.runs, arguments.accel)
        stops(host, Path(folder), arguments.runs, arguments.accel)
        qemu(host, Path(folder), arguments.runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
