"""What the paired benchmarks share: the same kernel and initramfs, started by QEMU's translator and by cardcage."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from attrs import frozen
from cardcage_boot import cpio
from cardcage_boot.cache import cache_root
from cardcage_boot.command import COMMAND_LINE
from cardcage_boot.fetch import Shelf

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Guest", "Run", "find_qemu", "make_guest", "median", "print_table", "start_cardcage", "start_qemu"]

TOKEN = "benchmark"


@frozen
class Guest:
    """A kernel, an initramfs and a command line; memory in MiB."""

    kernel: Path
    initrd: Path
    append: str
    memory: int = 512
    cpus: int = 1


@frozen
class Run:
    """A VMM process, when it was started (``time.monotonic``), and the files of its two serial ports."""

    process: subprocess.Popen[bytes]
    began: float
    console: Path
    second: Path

    def wait_for(self, mark: bytes, timeout: float) -> float:
        """Seconds from the start until *mark* is in the console's file. Raises RuntimeError when it never comes."""
        while True:
            now = time.monotonic()
            text = self.console.read_bytes() if self.console.exists() else b""
            if mark in text:
                return now - self.began
            if self.process.poll() is not None or now - self.began > timeout:
                self.stop()
                raise RuntimeError(f"{mark!r} did not come; the console's end: {text[-600:]!r}")
            time.sleep(0.002)

    def finish(self, timeout: float) -> bytes:
        """Wait for the process's end; returns what the second serial port wrote."""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.stop()
            raise RuntimeError(
                f"no end after {timeout} s; the console's end: {self.console.read_bytes()[-600:]!r}"
            ) from None
        return self.second.read_bytes()

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def find_qemu() -> str:
    """QEMU's path; exits with a sentence without it."""
    found = shutil.which("qemu-system-x86_64")
    if found is None:
        sys.exit("this benchmark compares with QEMU: install qemu-system-x86")
    return found


def make_guest(folder: Path, append: str, command: str = "", files: Iterable[cpio.Entry] = (), cpus: int = 1) -> Guest:
    """The distribution's kernel, with cardcage's initramfs, *files*, and a *command*.

    That writes to the second serial port, and the guest is off behind it: init itself would wait for somebody who
    takes its output, which no file does.
    """
    shelf = Shelf(cache_root(), lambda what, percent: None, lambda line: print(line, file=sys.stderr))
    kernel = shelf.kernel()
    entries = [cpio.file("cardcage/settings", f"token={TOKEN}\n".encode()), *files]
    if command:
        script = f"{{\n{command}\n}} > /dev/ttyS1\nstty -F /dev/ttyS1 raw  # once all is written\npoweroff -f\n"
        entries.append(cpio.file("cardcage/exec", script.encode()))
    initrd = folder / "initrd"
    base = shelf.initramfs(kernel).read_bytes()
    initrd.write_bytes(base + bytes(-len(base) % 4) + cpio.pack(entries))
    return Guest(kernel.path, initrd, f"{COMMAND_LINE} {append}".strip(), cpus=cpus)


def _fresh(folder: Path) -> tuple[Path, Path]:
    ports = folder / "console", folder / "second"
    for port in ports:
        port.unlink(missing_ok=True)
    return ports


def start_qemu(guest: Guest, folder: Path, more: Iterable[str] = ()) -> Run:
    """Start QEMU's system emulator with its translator, and *more* arguments."""
    console, second = _fresh(folder)
    command = [
        *(find_qemu(), "-accel", "tcg,thread=multi", "-cpu", "max", "-machine", "pc", "-m", str(guest.memory)),
        *("-smp", str(guest.cpus), "-nodefaults", "-display", "none", "-no-reboot"),
        *("-kernel", str(guest.kernel), "-initrd", str(guest.initrd), "-append", guest.append),
        *("-serial", f"file:{console}", "-serial", f"file:{second}"),
        *more,
    ]
    return _start(command, console, second, {})


def start_cardcage(
    guest: Guest, folder: Path, accel: str, environment: dict[str, str], more: Iterable[str] = ()
) -> Run:
    """Start ``cardcage run`` with the same devices as far as the guest uses them, and *more* arguments."""
    console, second = _fresh(folder)
    config = folder / "machine.toml"
    config.write_text(
        f"""
[machine]
accel = ["{accel}"]
memory = "{guest.memory}M"
cpus = {guest.cpus}
on_reset = "stop"
[boot]
kernel = "{guest.kernel}"
initrd = "{guest.initrd}"
append = "{guest.append}"
[[device]]
type = "isa-serial"
port = 0x3f8
irq = 4
char = "file:{console}"
[[device]]
type = "isa-serial"
port = 0x2f8
irq = 3
char = "file:{second}"
"""
    )
    program = "import sys; from cardcage_cli import main; sys.exit(main())"
    return _start([sys.executable, "-c", program, "run", str(config), *more], console, second, environment)


def _start(command: list[str], console: Path, second: Path, environment: dict[str, str]) -> Run:
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )
    return Run(process, began, console, second)


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """Columns by their widest cell: the first to the left, the others to the right."""
    wide = [max(len(row[at]) for row in [head, *rows]) for at in range(len(head))]
    for row in [head, ["-" * size for size in wide], *rows]:
        first, *others = zip(row, wide, strict=True)
        print(first[0].ljust(first[1]), *(cell.rjust(size) for cell, size in others), sep="  ")
