"""gdb's stub beside QEMU's, by turns: python benchmarks/gdb.py [--accel tcg,kvm] [--rounds 5] [--steps 1000].

The guest is a loop of a few instructions in 64-bit mode. Connect: from the socket to the first answer. Breakpoint: one
is inserted, the guest continues to it, and it is removed. Steps: by bare packets, and by gdb's ``stepi``, which asks
for more at each.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import median

HEAD = bytes.fromhex(
    "fa31c08ed88ec0bf0010b9000c6631c0f366ab66c70600100320000066c70600200330000066c7060030830000002e660f01166600"
    "66b8200600000f22e066b8001000000f22d866b9800000c066b8000900006631d20f3066b8330001800f22c0"
)


class Stub:
    """A stub's socket, by bare packets."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))
        self._held = b""

    def ask(self, content: bytes) -> bytes:
        """The answer to a packet."""
        self.socket.sendall(b"$%b#%02x" % (content, sum(content) & 0xFF))
        while (end := self._held.find(b"#")) < 0 or len(self._held) < end + 3:
            data = self.socket.recv(1 << 16)
            if not data:
                raise RuntimeError(f"hung up on after {content!r}")
            self._held += data
        answer, self._held = self._held[:end], self._held[end + 3 :]
        with suppress(BrokenPipeError):  # it has let go of us
            self.socket.sendall(b"+")
        return answer.partition(b"$")[2]

    def drain(self) -> None:
        """Drop what QEMU says of its own accord when somebody connects."""
        time.sleep(0.2)
        self.socket.settimeout(0)
        with suppress(BlockingIOError):
            self.socket.recv(1 << 16)
        self.socket.settimeout(None)
        self._held = b""


def measured(path: Path, steps: int) -> list[float]:
    """Connect, breakpoint, steps by packets, steps by gdb, in seconds."""
    began = time.perf_counter()
    stub = Stub(path)
    stub.ask(b"?")
    found = [time.perf_counter() - began]
    stub.drain()
    place = b"%x" % LOOP
    began = time.perf_counter()
    stub.ask(b"Z0,%b,1" % place)
    stub.ask(b"vCont;c")
    stub.ask(b"z0,%b,1" % place)
    found.append(time.perf_counter() - began)
    began = time.perf_counter()
    for _ in range(steps):
        stub.ask(b"vCont;s:1")
    found.append(time.perf_counter() - began)
    stub.ask(b"D")
    stub.socket.close()
    return [*found, by_gdb(path, steps) - by_gdb(path, 0)]


def by_gdb(path: Path, steps: int) -> float:
    """Seconds for gdb to connect, step and detach."""
    lines = ["set architecture i386:x86-64", f"target remote {path}", *([f"stepi {steps}"] if steps else []), "detach"]
    began = time.perf_counter()
    subprocess.run(["gdb", "-nx", "-batch", *(word for one in lines for word in ("-ex", one))], capture_output=True)
    return time.perf_counter() - began


def image() -> tuple[bytes, int]:
    """A BIOS of 64 KiB that ends up in a loop, and where."""
    code = HEAD + bytes.fromhex("66ea") + (0xF0000 + len(HEAD) + 8).to_bytes(4, "little") + bytes.fromhex("0800")
    loop = len(code)
    code += bytes.fromhex("ffc6 4889f3 90 ebf8")
    gdt = 0x100
    rom = bytearray(b"\x90" * 0x10000)
    rom[: len(code)] = code
    rom[gdt : gdt + 24] = bytes(8) + bytes.fromhex("ffff0000009aaf00ffff00000092cf00")
    at = code.index(bytes.fromhex("0f0116")) + 3
    rom[at : at + 2] = (gdt + 24).to_bytes(2, "little")
    rom[gdt + 24 : gdt + 30] = (23).to_bytes(2, "little") + (0xF0000 + gdt).to_bytes(4, "little")
    rom[0xFFF0:0xFFF5] = bytes.fromhex("ea000000f0")
    return bytes(rom), 0xF0000 + loop


ROM, LOOP = image()


def run(words: list[str], accel: str, steps: int) -> list[float]:
    """A machine of its own, measured."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "gdb")
        Path(folder, "rom").write_bytes(ROM)
        options = ["-machine", f"pc,accel={accel}", "-m", "16", "-display", "none", "-bios", f"{folder}/rom", "-gdb"]
        with subprocess.Popen(
            [*words, *options, f"unix:{path},server=on,wait=off"], stderr=subprocess.DEVNULL
        ) as process:
            try:
                while not path.exists():
                    time.sleep(0.01)
                first = Stub(path)  # once it is there: it may still be starting
                first.ask(b"?")
                time.sleep(1)
                first.drain()
                first.ask(b"D")
                first.socket.close()
                time.sleep(0.5)
                return measured(path, steps)
            finally:
                process.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accel", default="tcg")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None or shutil.which("gdb") is None:
        print("needs gdb and qemu-system-x86_64", file=sys.stderr)
        return 2
    ours = [sys.executable, "-c", "import sys; from cardcage_qemu import main; sys.exit(main())"]
    for accel in arguments.accel.split(","):
        pairs = [[run(words, accel, arguments.steps) for words in ([qemu], ours)] for _ in range(arguments.rounds)]
        print(f"{accel}, median of {arguments.rounds}{'':14}QEMU     cardcage")
        for at, what in enumerate(
            ("connect", "breakpoint", f"{arguments.steps} steps, packets", f"{arguments.steps} stepi, gdb")
        ):
            theirs, mine = (median(one[side][at] for one in pairs) for side in (0, 1))
            print(f"{what:28}{theirs * 1000:9.1f} ms {mine * 1000:9.1f} ms   {mine / theirs:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
