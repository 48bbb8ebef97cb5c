"""Guest CPU work beside QEMU's translator: the same static binary, kernel and initramfs, and natively on this host.

    python benchmarks/cpu.py [--accel tcg] [--runs 3] [--rows integer,sha256]

The binary (guest/cpu.c, gcc -O2 -static) does a fixed amount of work a row and reads the guest's own clock. Runs
alternate: native, QEMU, cardcage; figures are medians. ``x native`` is how many times slower than native, ``speed-up``
how many times faster than QEMU, with its geometric mean. Without --accel only native and QEMU are measured.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
from pathlib import Path

from cardcage_boot import cpio
from paired import Guest, make_guest, median, print_table, start_cardcage, start_qemu

SOURCE = Path(__file__).with_name("guest") / "cpu.c"
Times = dict[str, list[float]]


def main() -> None:
    """Build the binary, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accel", help="accelerator of cardcage to measure, such as tcg")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rows", default="", help="only these rows, separated by commas")
    parser.add_argument("--timeout", type=float, default=600)
    parser.add_argument("--skip-qemu", action="store_true", help="only cardcage and native")
    arguments = parser.parse_args()
    rows = arguments.rows.replace(",", " ")
    with tempfile.TemporaryDirectory(prefix="cardcage-bench-") as name:
        folder = Path(name)
        binary = folder / "cpu"
        files = []
        for program, kind in (("cpu", "-static"), ("cpu-pie", "-static-pie")):
            built = subprocess.run(["gcc", "-O2", kind, "-o", folder / program, SOURCE], check=False)
            if built.returncode:
                sys.exit("the guest's binary cannot be built: install gcc and libc6-dev")
            files.append(cpio.file(program, (folder / program).read_bytes(), 0o755))
        guest = make_guest(folder, "quiet", f"/cpu {rows}", files)
        measure(guest, folder, [str(binary), *rows.split()], arguments)


def measure(guest: Guest, folder: Path, native: list[str], arguments: argparse.Namespace) -> None:
    """Run in turn and print."""
    times: dict[str, Times] = {"native": {}, "qemu": {}, "cardcage": {}}
    for _ in range(arguments.runs):
        collect(times["native"], subprocess.run(native, capture_output=True, check=True).stdout)
        if not arguments.skip_qemu:
            collect(times["qemu"], start_qemu(guest, folder).finish(arguments.timeout))
        if arguments.accel:
            run = start_cardcage(guest, folder, arguments.accel, {})
            collect(times["cardcage"], run.finish(arguments.timeout))
    table, gains = [], []
    for name, all_ in times["native"].items():
        base = median(all_)
        qemu, ours = (median(times[who].get(name, [math.nan])) for who in ("qemu", "cardcage"))
        cells = [f"{base / 1e6:.0f}", f"{qemu / 1e6:.0f}", f"{ours / 1e6:.0f}"]
        cells += [f"{qemu / base:.2f}", f"{ours / base:.2f}", f"{qemu / ours:.2f}"]
        table.append([name, *(cell.replace("nan", "-") for cell in cells)])
        gains.append(qemu / ours)
    head = ["work", "native ms", "qemu ms", "cardcage ms", "qemu x native", "cardcage x native", "speed-up"]
    print_table(head, table)
    if gains and not any(math.isnan(gain) for gain in gains):
        mean = math.exp(sum(map(math.log, gains)) / len(gains))
        print(f"geometric mean of the speed-up over QEMU: {mean:.2f}; least: {min(gains):.2f}")


def collect(times: Times, output: bytes) -> None:
    """Take the rows out of what the binary printed; the end mark of init's channel is no row."""
    for line in output.decode("ascii", "replace").splitlines():
        words = line.split()
        if len(words) == 3 and words[1].isdigit() and words[2].isdigit():
            times.setdefault(words[0], []).append(float(words[1]))


if __name__ == "__main__":
    main()
