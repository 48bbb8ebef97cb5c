"""Live migration between two processes: python benchmarks/migrate.py [--runs 5] [--memory 1024] [--no-qemu].

A Debian guest under the translator, over a Unix socket, idle and while it writes 100 MB of memory a second, by pre-copy
and by post-copy. Its console gets a dot every 5 ms: *silence* is the longest time without one, as who reads both
consoles sees it. Beside it QEMU's translator with the same kernel and its defaults, by turns. Milliseconds, median and
worst of N runs; *said* is the downtime that the source tells.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from attrs import evolve
from cardcage_boot import cpio
from paired import Guest, find_qemu, make_guest, median

SOURCE = Path(__file__).parent / "guest" / "dirty.c"
CARDCAGE = [sys.executable, "-c", "import sys; from cardcage_cli import main; sys.exit(main())"]


class Console:
    """A process, and when something came on its standard output."""

    def __init__(self, command: list[str], environment: dict[str, str] | None = None) -> None:
        self.times: list[float] = []
        self.text = b""
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **(environment or {})},
        )
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        while data := os.read(self.process.stdout.fileno(), 4096):
            self.times.append(time.monotonic())
            self.text = (self.text + data)[-4096:]

    def wait_for(self, mark: bytes, timeout: float = 120) -> None:
        """Until *mark* came."""
        end = time.monotonic() + timeout
        while mark not in self.text:
            if time.monotonic() > end or self.process.poll() is not None:
                raise RuntimeError(f"{mark!r} did not come: {self.text[-300:]!r}")
            time.sleep(0.01)

    def end(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        self._thread.join()


def silence(consoles: list[Console], since: float) -> float:
    """The longest time without a byte."""
    times = sorted(one for console in consoles for one in console.times if one >= since)
    return max(late - soon for soon, late in pairwise(times))


def cardcage(guest: Guest, folder: Path, mode: str) -> tuple[float, float, float]:
    """One migration: silence, downtime that is said, seconds in all."""
    (folder / "vm.toml").write_text(
        f'[machine]\nname = "moves-{os.getpid()}"\naccel = ["tcg"]\nmemory = "{guest.memory}M"\n'
        f'[boot]\nkernel = "{guest.kernel}"\ninitrd = "{guest.initrd}"\nappend = "{guest.append}"\n'
    )
    door, environment = folder / "door", {"XDG_STATE_HOME": str(folder)}
    here = Console([*CARDCAGE, "run", str(folder / "vm.toml")], environment)
    there = None
    try:
        here.wait_for(b"begun")
        there = Console([*CARDCAGE, "incoming", f"unix:{door}"], environment)
        await_path(door)
        time.sleep(2)
        began = time.monotonic()
        words = [
            *CARDCAGE,
            "migrate",
            "--json",
            "--mode",
            mode,
            "--downtime",
            "300ms",
            f"moves-{os.getpid()}",
            f"unix:{door}",
        ]
        done = subprocess.run(words, check=True, stdout=subprocess.PIPE, env={**os.environ, **environment})
        told = json.loads(done.stdout)
        time.sleep(1)
        return silence([here, there], began), told["downtime"], told["total"]
    finally:
        here.end()
        if there is not None:
            there.end()


def qemu(guest: Guest, folder: Path, mode: str) -> tuple[float, float, float]:
    """The same by QEMU."""
    common = [
        *(find_qemu(), "-accel", "tcg,thread=multi", "-cpu", "max", "-machine", "pc", "-m", str(guest.memory)),
        *("-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio"),
        *("-kernel", str(guest.kernel), "-initrd", str(guest.initrd), "-append", guest.append),
    ]
    door, monitor, other = folder / "qdoor", folder / "monitor", folder / "other"
    on = [{"capability": "postcopy-ram", "state": mode == "postcopy"}]
    here = Console([*common, "-qmp", f"unix:{monitor},server=on,wait=off"])
    there = None
    try:
        here.wait_for(b"begun")
        there = Console([*common, "-qmp", f"unix:{other},server=on,wait=off", "-incoming", "defer"])
        with connected(other) as peer:
            file = peer.makefile("rw")
            file.readline()
            said(file, "qmp_capabilities")
            said(file, "migrate-set-capabilities", capabilities=on)
            said(file, "migrate-incoming", uri=f"unix:{door}")
        time.sleep(2)
        with connected(monitor) as peer:
            file = peer.makefile("rw")
            file.readline()
            said(file, "qmp_capabilities")
            said(file, "migrate-set-parameters", **{"max-bandwidth": 1 << 40})
            said(file, "migrate-set-capabilities", capabilities=on)
            began = time.monotonic()
            said(file, "migrate", uri=f"unix:{door}")
            if mode == "postcopy":
                said(file, "migrate-start-postcopy")
            while (found := said(file, "query-migrate"))["status"] != "completed":
                if found["status"] in ("failed", "cancelled"):
                    raise RuntimeError(str(found))
                time.sleep(0.01)
        time.sleep(1)
        return silence([here, there], began), found["downtime"] / 1000, found["total-time"] / 1000
    finally:
        here.end()
        if there is not None:
            there.end()
        for one in (door, monitor, other):
            one.unlink(missing_ok=True)


def said(file: Any, command: str, **arguments: Any) -> Any:
    """What a command of the monitor returns."""
    file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
    file.flush()
    while True:
        answer = json.loads(file.readline())
        if "error" in answer:
            raise RuntimeError(str(answer))
        if "return" in answer:
            return answer["return"]


def connected(path: Path) -> socket.socket:
    """A connection to who listens there, or is about to."""
    end = time.monotonic() + 60
    while True:
        peer = socket.socket(socket.AF_UNIX)
        try:
            peer.connect(str(path))
            return peer
        except OSError:
            peer.close()
            if time.monotonic() > end:
                raise
            time.sleep(0.01)


def await_path(path: Path) -> None:
    """Until it is there."""
    end = time.monotonic() + 60
    while not path.exists():
        if time.monotonic() > end:
            raise RuntimeError(f"{path} did not come")
        time.sleep(0.01)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--memory", type=int, default=1024, help="MiB of the guest")
    parser.add_argument("--rates", type=int, nargs="*", default=[0, 100], help="MB a second that the guest writes")
    parser.add_argument("--modes", nargs="*", choices=("precopy", "postcopy"), default=["precopy", "postcopy"])
    parser.add_argument("--no-qemu", action="store_true")
    given = parser.parse_args()
    print(f"{'':40} {'silence':>16} {'said':>16} {'in all':>9}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run(["gcc", "-O2", "-static", "-o", folder / "dirty", SOURCE], check=True)
        program = cpio.file("dirty", (folder / "dirty").read_bytes(), mode=0o755)
        for rate in given.rates:
            guest = evolve(make_guest(folder, "quiet", f"/dirty {rate} > /dev/ttyS0", [program]), memory=given.memory)
            both = (("cardcage", cardcage), *(() if given.no_qemu else (("qemu", qemu),)))
            for mode in given.modes:
                table: dict[str, list[tuple[float, float, float]]] = {who: [] for who, _ in both}
                for _ in range(given.runs):
                    for who, move in both:  # by turns
                        table[who].append(move(guest, folder, mode))
                for who, rows in table.items():
                    columns = list(zip(*rows, strict=True))
                    cells = [f"{median(one) * 1000:8.0f}{max(one) * 1000:8.0f}" for one in columns[:2]]
                    what = f"{who}, {mode}, writing {rate} MB/s"
                    print(f"{what:40} {cells[0]} {cells[1]} {median(columns[2]):8.1f}s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
