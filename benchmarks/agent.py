"""Commands and files by the guest agent: python benchmarks/agent.py [--accel tcg] [--qemu] [--megabytes 50] [--runs N].

The guest is a ``Machine.debian()``, and for a program with libraries a ``Machine.host_root()``. With ``--qemu`` the
same kernel, initramfs and agent run in QEMU's translator too, and the same host side talks to its port by a Unix
socket. Rows are medians, with the best in brackets.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from cardcage.host import Host
from cardcage.machine import State
from cardcage.security import Mediator
from cardcage_agent import PORT, Machine
from cardcage_agent.link import Link
from cardcage_agent.verbs import Verbs
from cardcage_boot.cache import cache_root
from cardcage_boot.command import COMMAND_LINE
from cardcage_boot.fetch import Shelf
from cardcage_boot.initramfs import programs_of
from paired import find_qemu, median

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Beside(Verbs):
    """The verbs for a guest of another VMM, by the socket of its port."""

    name = label = "qemu"
    state = State.RUNNING

    def __init__(self, peer: socket.socket) -> None:
        self._soon: SimpleQueue[Callable[[], None]] = SimpleQueue()
        slot: Any = SimpleNamespace(
            machine="qemu",
            log=SimpleNamespace(warning=print),
            loop=SimpleNamespace(call_soon=self._soon.put),
        )
        self._peer, self._link = peer, Link(slot)
        self._link.start(peer.sendall)
        self.services, self.mediator = {"agent": self._link}, Mediator()
        for work in (self._run, self._read):
            threading.Thread(target=work, daemon=True).start()

    def _run(self) -> None:
        while True:
            self._soon.get()()

    def _read(self) -> None:
        while data := self._peer.recv(65536):
            self._link.write(data)


@contextmanager
def qemu(memory: int) -> Iterator[Any]:
    """The same guest in QEMU's translator."""
    shelf = Shelf(cache_root(), lambda what, percent: None, print)
    kernel = shelf.kernel()
    with Host() as host:
        initrd = shelf.initramfs(kernel, programs=programs_of(host.registry))
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listening:
        path = Path(folder, "agent")
        listening.bind(str(path))
        listening.listen()
        words = [find_qemu(), "-accel", "tcg", "-m", str(memory), "-display", "none", "-serial", "null", "-no-reboot"]
        words += ["-kernel", str(kernel.path), "-initrd", str(initrd), "-append", f"{COMMAND_LINE} quiet"]
        words += ["-device", "virtio-serial-pci", "-chardev", f"socket,id=agent,path={path}"]
        words += ["-device", f"virtserialport,chardev=agent,name={PORT}"]
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL)
        try:
            peer, _ = listening.accept()
            with peer:
                vm = Beside(peer)
                vm.agent.wait()
                yield vm
        finally:
            process.kill()
            process.wait()


@contextmanager
def cardcage(memory: int, accel: str) -> Iterator[Any]:
    """The guest in cardcage."""
    with Machine.debian(memory=f"{memory}M", accel=accel) as vm:
        vm.start()
        vm.agent.wait()
        yield vm


def measure(vm: Any, size: int, runs: int) -> list[tuple[str, str]]:
    """Rows: what, and how long or how fast."""
    data = bytes(size)

    def timed(act: Callable[[], object], count: int) -> list[float]:
        act()
        found = []
        for _ in range(count):
            began = time.perf_counter()
            act()
            found.append(time.perf_counter() - began)
        return found

    rows = []
    for what, act in {
        "vm.agent.ping()": vm.agent.ping,
        'vm.files.stat("/")': lambda: vm.files.stat("/"),
        'vm.run(["/bin/true"])': lambda: vm.run(["/bin/true"]),
        'vm.run(":")': lambda: vm.run(":"),
    }.items():
        found = timed(act, runs)
        rows.append((what, f"{1000 * median(found):.2f} ms ({1000 * min(found):.2f})"))
    for what, act in {
        "vm.files.write": lambda: vm.files.write("/tmp/data", data),
        "vm.files.read": lambda: vm.files.read("/tmp/data"),
        "output of vm.run": lambda: vm.run("cat /tmp/data"),
        "input of vm.run": lambda: vm.run("cat > /dev/null", input=data),
    }.items():
        found = timed(act, 5)
        rows.append((what, f"{size / median(found) / 1e6:.0f} MB/s ({size / min(found) / 1e6:.0f})"))
    return rows


def dynamic(memory: int, accel: str, runs: int) -> str:
    """A program of this host that loads its libraries."""
    with Machine.host_root(memory=f"{memory}M", accel=accel) as vm:
        vm.start()
        vm.run(["/bin/true"], check=True)
        time.sleep(20)  # the console's shell reads this host's profiles meanwhile
        times = []
        for _ in range(runs):
            began = time.perf_counter()
            vm.run(["/bin/true"], check=True)
            times.append(time.perf_counter() - began)
    return f"{1000 * median(times):.2f} ms ({1000 * min(times):.2f})"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accel", default="tcg")
    parser.add_argument("--qemu", action="store_true")
    parser.add_argument("--memory", type=int, default=512, metavar="MIB")
    parser.add_argument("--megabytes", type=int, default=50)
    parser.add_argument("--runs", type=int, default=200)
    given = parser.parse_args()
    size = given.megabytes << 20
    kinds = {f"cardcage, {given.accel}": lambda: cardcage(given.memory, given.accel)}
    if given.qemu:
        kinds["QEMU, tcg"] = lambda: qemu(given.memory)
    for name, kind in kinds.items():
        with kind() as vm:
            print(f"\n{name}")
            for what, value in measure(vm, size, given.runs):
                print(f"  {what:<24}{value}", flush=True)
    print(f"\ncardcage, {given.accel}: this host's /bin/true, with its libraries: ", end="", flush=True)
    print(dynamic(given.memory, given.accel, given.runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
