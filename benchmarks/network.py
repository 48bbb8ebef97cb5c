"""TCP speed of a guest, beside QEMU's translator with the same kernel, program and back end.

    python benchmarks/network.py [--accel tcg] [--runs 3] [--scale 1] [--net user|tap]     (or: benchmarks/io.py --net)

Runs alternate, in a network namespace of their own (needs root), where the server is. Figures are MiB, and round
trips of one byte, a second; medians. "user" is passt for both, "tap" a tap interface with its virtio-net header.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cardcage_boot import cpio
from paired import Guest, Run, make_guest, median, print_table, start_cardcage, start_qemu

SOURCE = Path(__file__).parent / "guest" / "net.c"
INSIDE = "CARDCAGE_BENCHMARK_NAMESPACE"
ADDRESSES = {"user": ("10.0.2.15/24", "10.0.2.2", "192.0.2.2"), "tap": ("10.9.0.2/24", "10.9.0.1", "10.9.0.1")}
"""Of the guest, of its gateway, and of the server."""


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accel", default="tcg", help="accelerator of cardcage to measure")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--scale", type=int, default=1, help="times the work of a quick run")
    parser.add_argument("--net", default="user", choices=("user", "tap"))
    parser.add_argument("--timeout", type=float, default=600)
    run_network(parser.parse_args())


def run_network(arguments: argparse.Namespace) -> None:
    """Measure ``arguments.net`` in a network namespace: this program is started again in one."""
    if INSIDE not in os.environ:
        os.environ[INSIDE] = "1"
        os.execvp("unshare", ["unshare", "-n", sys.executable, *sys.argv])
    with tempfile.TemporaryDirectory(prefix="cardcage-bench-") as name:
        measure(Path(name), arguments)


def measure(folder: Path, arguments: argparse.Namespace) -> None:
    """Run the VMMs in turn."""
    subprocess.run(["gcc", "-O2", "-static", "-o", folder / "net", SOURCE], check=True)
    for command in (
        "link set lo up",
        "link add out0 type veth peer name nowhere",
        "addr add 192.0.2.2/24 dev out0",
        "link set out0 up",
        "link set nowhere up",
        "route add default via 192.0.2.1",
        "tuntap add tap0 mode tap vnet_hdr",
        "addr add 10.9.0.1/24 dev tap0",
        "link set tap0 up",
    ):
        subprocess.run(["ip", *command.split()], check=True)
    own, gateway, server = ADDRESSES[arguments.net]
    lines = f"ip addr add {own} dev eth0; ip link set eth0 mtu {65520 if arguments.net == 'user' else 1500} up; "
    lines += f"ip route add default via {gateway}; /net {server} {arguments.scale}"
    program = cpio.file("net", (folder / "net").read_bytes(), mode=0o755)
    guest = make_guest(folder, "", lines, [program])
    found: dict[str, dict[str, list[float]]] = {}
    with subprocess.Popen([folder / "net"], stderr=subprocess.DEVNULL) as serving:
        try:
            for _ in range(arguments.runs):
                for name in ("qemu", "cardcage"):
                    for row, rate in once(name, guest, folder, arguments).items():
                        found.setdefault(row, {}).setdefault(name, []).append(rate)
        finally:
            serving.kill()
    rows = []
    for row, rates in found.items():
        qemu, mine = median(rates["qemu"]), median(rates["cardcage"])
        rows.append([row, f"{qemu:.0f}", f"{mine:.0f}", f"{mine / qemu:.2f}"])
    print_table([f"a second, {arguments.net}", "QEMU", "cardcage", "times QEMU"], rows)


def once(name: str, guest: Guest, folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """One run; rates by row."""
    run, engine = start(name, guest, folder, arguments)
    try:
        output = run.finish(arguments.timeout).decode(errors="replace")
    finally:
        if engine is not None:
            engine.kill()
            engine.wait()
    rates = {}
    for line in output.splitlines():
        words = line.split()
        if len(words) == 3 and words[1].isdigit() and words[2].isdigit():
            rates[words[0]] = int(words[1]) / int(words[2]) * 1e6
    if "round-trips" not in rates:
        raise RuntimeError(f"{name}: {output} {run.console.read_bytes()[-600:]!r}")
    return rates


def start(
    name: str, guest: Guest, folder: Path, arguments: argparse.Namespace
) -> tuple[Run, subprocess.Popen[bytes] | None]:
    """Start a VMM with the network, and the engine that QEMU does not start itself."""
    if name == "cardcage":
        net = "user,ipv6=false" if arguments.net == "user" else "tap,ifname=tap0"
        return start_cardcage(guest, folder, arguments.accel, {}, ["--net", net]), None
    if arguments.net == "tap":
        net = "tap,id=n,ifname=tap0,script=no,downscript=no,vnet_hdr=on"
        return start_qemu(guest, folder, ["-netdev", net, "-device", "virtio-net-pci,netdev=n"]), None
    path = Path("/tmp") / f"cardcage-passt-{os.getpid()}"  # passt sees no other folder of the host
    path.unlink(missing_ok=True)
    words = ["passt", "--foreground", "--quiet", "--one-off", "--ipv4-only", "--socket", str(path), "--mtu", "65520"]
    words += ["--address", "10.0.2.15", "--netmask", "255.255.255.0", "--gateway", "10.0.2.2"]
    engine = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    while not path.exists():
        if engine.poll() is not None:
            raise RuntimeError("passt ended")
        time.sleep(0.01)
    net = f"stream,id=n,server=off,addr.type=unix,addr.path={path}"
    return start_qemu(guest, folder, ["-netdev", net, "-device", "virtio-net-pci,netdev=n,host_mtu=65520"]), engine


if __name__ == "__main__":
    main()
