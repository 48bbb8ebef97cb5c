"""Disk speed in a guest, beside QEMU's translator with the same kernel, program, image and back end.

    python benchmarks/io.py [--accel tcg] [--runs 3] [--scale 3] [--format raw] [--vhost-user]
    python benchmarks/io.py --net user|tap [...]     network speed instead, see network.py

Runs alternate. Figures are operations a second inside the guest, medians; the image is in the host's page cache, the
guest goes past its own (O_DIRECT). With --vhost-user both use the same qemu-storage-daemon.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import time
from pathlib import Path

from cardcage_boot import cpio
from network import run_network
from paired import Guest, Run, make_guest, median, print_table, start_cardcage, start_qemu

SIZE = 64 << 20
SOURCE = Path(__file__).parent / "guest" / "io.c"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accel", default="tcg", help="accelerator of cardcage to measure")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--scale", type=int, default=3, help="length of rows; at 1 most take a fifth of a second")
    parser.add_argument("--format", default="raw", choices=("raw", "qcow2"))
    parser.add_argument("--vhost-user", action="store_true")
    parser.add_argument("--net", choices=("user", "tap"), help="measure a network instead of a disk")
    parser.add_argument("--timeout", type=float, default=600)
    arguments = parser.parse_args()
    if arguments.net is not None:
        run_network(arguments)
        return
    with tempfile.TemporaryDirectory(prefix="cardcage-bench-") as name:
        measure(Path(name), arguments)


def measure(folder: Path, arguments: argparse.Namespace) -> None:
    """Run the VMMs in turn."""
    subprocess.run(["gcc", "-O2", "-static", "-o", folder / "io", SOURCE], check=True)
    program = cpio.file("io", (folder / "io").read_bytes(), mode=0o755)
    guest = make_guest(folder, "", f"/io {arguments.scale}", [program])
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(arguments.runs):
        for name in ("qemu", "cardcage"):
            for row, rate in once(name, guest, folder, arguments).items():
                found.setdefault(row, {}).setdefault(name, []).append(rate)
    rows = []
    for row, rates in found.items():
        qemu, own = median(rates["qemu"]), median(rates["cardcage"])
        rows.append([row, f"{qemu:.0f}", f"{own:.0f}", f"{own / qemu:.2f}"])
    print_table([f"operations a second, {arguments.format}", "QEMU", "cardcage", "times QEMU"], rows)


def once(name: str, guest: Guest, folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """One run with a fresh image; rates by row."""
    image, path = folder / "image", folder / "socket"
    image.unlink(missing_ok=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", arguments.format, image, str(SIZE)], check=True)
    daemon = serve(image, path, arguments.format) if arguments.vhost_user else None
    try:
        run = start(name, guest, folder, image, path, arguments)
        output = run.finish(arguments.timeout).decode(errors="replace")
    finally:
        if daemon is not None:
            daemon.terminate()
            daemon.wait()
    rates = {}
    for line in output.splitlines():
        words = line.split()
        if len(words) == 3 and words[1].isdigit() and words[2].isdigit():
            rates[words[0]] = int(words[1]) / int(words[2]) * 1e6
    if "write-4k-depth-32" not in rates:
        raise RuntimeError(f"{name}: {output} {run.console.read_bytes()[-600:]!r}")
    return rates


def start(name: str, guest: Guest, folder: Path, image: Path, path: Path, arguments: argparse.Namespace) -> Run:
    """Start a VMM with the disk."""
    form = arguments.format
    if name == "qemu" and arguments.vhost_user:
        shared = f"memory-backend-memfd,id=m,size={guest.memory}M,share=on"
        more = ["-object", shared, "-machine", "memory-backend=m", "-chardev", f"socket,id=c,path={path}"]
        return start_qemu(guest, folder, [*more, "-device", "vhost-user-blk-pci,chardev=c"])
    if name == "qemu":
        drive = f"file={image},format={form},if=none,id=d"
        return start_qemu(guest, folder, ["-drive", drive, "-device", "virtio-blk-pci,drive=d"])
    if arguments.vhost_user:
        more = ["--set", "memory.type=memfd", "--device", f"vhost-user-blk,socket={path}"]
    else:
        more = ["--drive", f"file={image},format={form}"]
    return start_cardcage(guest, folder, arguments.accel, {}, more)


def serve(image: Path, path: Path, form: str) -> subprocess.Popen[bytes]:
    """A qemu-storage-daemon with the image."""
    path.unlink(missing_ok=True)
    blocks = ["--blockdev", f"driver=file,node-name=f,filename={image}"]
    blocks += ["--blockdev", f"driver={form},node-name=d,file=f"]
    export = f"type=vhost-user-blk,id=e,addr.type=unix,addr.path={path},node-name=d,writable=on"
    process = subprocess.Popen(["qemu-storage-daemon", *blocks, "--export", export], env=dict(os.environ))
    while not path.exists():
        time.sleep(0.01)
    return process


if __name__ == "__main__":
    main()
