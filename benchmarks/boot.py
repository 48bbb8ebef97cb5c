"""Time from starting the VMM to the init's first line, beside QEMU's translator with the same kernel and initramfs.

    python benchmarks/boot.py [--accel tcg] [--runs 3] [--append nokaslr]

Runs alternate; figures are medians in seconds, from exec of the VMM's process, KASLR on. ``cold`` has an empty cache
folder (nothing that the translator may keep between runs), ``warm`` the one that an earlier run of this kernel left.
Without --accel only QEMU is measured.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from paired import Guest, make_guest, median, print_table, start_cardcage, start_qemu

FIRST_LINE = b"cardcage: init"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accel", help="accelerator of cardcage to measure, such as tcg")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--append", default="", help="text to append to the kernel's command line")
    parser.add_argument("--timeout", type=float, default=300)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cardcage-bench-") as name:
        measure(make_guest(Path(name), arguments.append), Path(name), arguments)


def measure(guest: Guest, folder: Path, arguments: argparse.Namespace) -> None:
    """Run the VMMs in turn."""
    times: dict[str, list[float]] = {"qemu tcg": []}
    warm = folder / "warm"
    if arguments.accel:
        times |= {f"cardcage {arguments.accel}, cold": [], f"cardcage {arguments.accel}, warm": []}
        cardcage(guest, folder, arguments, warm)  # fills the warm cache
    for at in range(arguments.runs):
        run = start_qemu(guest, folder)
        times["qemu tcg"].append(run.wait_for(FIRST_LINE, arguments.timeout))
        run.stop()
        if arguments.accel:
            cold = cardcage(guest, folder, arguments, folder / f"cold{at}")
            times[f"cardcage {arguments.accel}, cold"].append(cold)
            times[f"cardcage {arguments.accel}, warm"].append(cardcage(guest, folder, arguments, warm))
    base = median(times["qemu tcg"])
    print_table(
        ["boot to init", "median s", "least s", "most s", "times QEMU"],
        [
            [name, f"{median(all_):.2f}", f"{min(all_):.2f}", f"{max(all_):.2f}", f"{median(all_) / base:.2f}"]
            for name, all_ in times.items()
        ],
    )


def cardcage(guest: Guest, folder: Path, arguments: argparse.Namespace, cache: Path) -> float:
    """One boot with *cache* as the cache folder; the machine powers off in its own time, so that a cache is written."""
    run = start_cardcage(guest, folder, arguments.accel, {"XDG_CACHE_HOME": str(cache)})
    took = run.wait_for(FIRST_LINE, arguments.timeout)
    run.process.terminate()  # an orderly end
    run.process.wait()
    return took


if __name__ == "__main__":
    main()
