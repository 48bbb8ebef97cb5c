"""Everyday acts of tools beside QEMU's (accel=tcg), by turns: python benchmarks/tools.py [--rounds 3].

Start: from exec until a Debian kernel's shell has answered ``uname``. QMP: a ``query-status``, of 300. Steps: 1,000
``stepi`` of gdb's, as benchmarks/gdb.py has them. Hot-plug: from ``device_add`` until the guest sees ``/dev/vda``.
Median of the rounds, and how many times QEMU's time that is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import gdb
from cardcage_boot.cache import cache_root
from cardcage_boot.fetch import Shelf

OURS = [sys.executable, "-c", "import sys; from cardcage_qemu import main; sys.exit(main())"]
PATIENCE = 120
"""Seconds that a guest or a monitor may be silent."""
ROWS = ("start to `uname` answered", "QMP round trip", "1,000 stepi by gdb", "device_add to /dev/vda")


class Line:
    """A socket that is spoken to in text."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE)
        while self._socket.connect_ex(str(path)):
            time.sleep(0.002)
        self._held = b""

    def say(self, text: str) -> None:
        self._socket.sendall(text.encode())

    def until(self, word: bytes) -> bytes:
        """Read on until *word*; what was before it."""
        while word not in self._held:
            data = self._socket.recv(1 << 16)
            if not data:
                raise RuntimeError(f"hung up before {word!r}")
            self._held += data
        before, _, self._held = self._held.partition(word)
        return before

    def line(self) -> bytes:
        """The next line."""
        return self.until(b"\n")

    def ask(self, name: str, **arguments: object) -> None:
        """A QMP command, answered."""
        self.say(json.dumps({"execute": name, "arguments": arguments}))
        while True:  # events come between
            answer = json.loads(self.line())
            if "error" in answer:
                raise RuntimeError(f"{name}: {answer['error']['desc']}")
            if "return" in answer:
                return


@contextmanager
def stepped(words: list[str], folder: Path) -> Iterator[Path]:
    """A machine that runs gdb.py's loop, stopped for nobody; its stub's socket."""
    path = folder / "gdb"
    (folder / "rom").write_bytes(gdb.ROM)
    options = ["-machine", "pc,accel=tcg", "-m", "16", "-display", "none", "-bios", f"{folder}/rom"]
    with subprocess.Popen([*words, *options, "-gdb", f"unix:{path},server=on,wait=off"]) as process:
        try:
            while not path.exists():
                time.sleep(0.01)
            time.sleep(1)  # the loop is reached
            yield path
        finally:
            process.kill()


def acts(folder: Path, began: float) -> Iterator[float]:
    """Seconds until ``uname`` is answered, of a QMP command, and from ``device_add`` until the disk is there."""
    serial = Line(folder / "serial")
    serial.until(b"~ # ")
    serial.say("uname -r\n")
    serial.until(b"amd64")
    yield time.perf_counter() - began
    serial.until(b"~ # ")
    qmp = Line(folder / "qmp")
    qmp.line()  # its greeting
    qmp.ask("qmp_capabilities")
    times = []
    for _ in range(300):
        began = time.perf_counter()
        qmp.ask("query-status")
        times.append(time.perf_counter() - began)
    yield median(times)
    serial.say("modprobe -a virtio_pci virtio_blk; echo re''ady\n")
    serial.until(b"ready")
    serial.say("until test -e /dev/vda; do :; done; echo ca''me\n")
    serial.until(b"\n")
    time.sleep(0.5)
    began = time.perf_counter()
    qmp.ask("device_add", driver="virtio-blk-pci", drive="disk", id="late")
    serial.until(b"came")
    yield time.perf_counter() - began


def run(words: list[str], kernel: Path, initramfs: Path) -> list[float]:
    """The rows, in seconds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "disk").write_bytes(bytes(1 << 20))
        options = ["-machine", "pc,accel=tcg", "-cpu", "max", "-m", "256", "-nodefaults", "-display", "none"]
        options += ["-kernel", str(kernel), "-initrd", str(initramfs), "-append", "console=ttyS0 panic=-1 quiet"]
        options += ["-serial", f"unix:{folder}/serial,server=on,wait=off"]
        options += ["-qmp", f"unix:{folder}/qmp,server=on,wait=off"]
        options += ["-drive", f"file={folder}/disk,format=raw,if=none,id=disk"]
        began = time.perf_counter()
        with subprocess.Popen([*words, *options], stderr=subprocess.DEVNULL) as process:
            try:
                found = [*acts(folder, began)]
            finally:
                process.kill()
        with stepped(words, folder) as path:
            steps = gdb.by_gdb(path, 1000) - gdb.by_gdb(path, 0)
        return [*found[:2], steps, found[2]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None or shutil.which("gdb") is None:
        print("needs gdb and qemu-system-x86_64", file=sys.stderr)
        return 2
    shelf = Shelf(cache_root(), lambda what, percent: None, lambda line: None)
    kernel = shelf.kernel()
    initramfs = shelf.initramfs(kernel)
    pairs = [[run(words, kernel.path, initramfs) for words in ([qemu], OURS)] for _ in range(rounds)]
    print(f"{'median of ' + str(rounds):28}{'QEMU':>12}{'cardcage':>12}")
    for at, what in enumerate(ROWS):
        theirs, mine = (median(one[side][at] for one in pairs) for side in (0, 1))
        print(f"{what:28}{theirs * 1000:9.1f} ms {mine * 1000:9.1f} ms   {mine / theirs:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
