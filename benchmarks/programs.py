"""Programs of a Debian on a disk, natively and in a guest, and the VMM's own memory.

    python benchmarks/programs.py --disk disk.qcow2 --kernel vmlinuz --initrd initrd.img [--cpus 1] [--code-cache 256]

The disk has Debian's packages of ``PROGRAMS`` and root without a password at a shell on ttyS0; this host has the same
release, so that the same binaries run natively. The disk is not written. Figures are seconds of processor time, which
other load changes least: of the program and its children, and of all the VMM's threads. Each runs three times, and the
least counts: the guest's is that of code which is translated already. ``own`` is the process's proportional share
without the guest's RAM.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from pathlib import Path
from time import process_time

from cardcage import Machine
from cardcage_block.make import Qcow2Shape, create_qcow2
from memory import shares
from paired import print_table

APPEND = "root=/dev/vda1 rw console=ttyS0 net.ifnames=0 panic=-1 no_timer_check"
TEXT = "/tmp/cardcage-text"
PROGRAMS = {
    "perl, arithmetic": r"""perl -e 'my $s = 0; for my $i (1..20000000) { $s += $i * $i % 7 }'""",
    "perl, strings": r"""perl -ne '$h{$_ % 1000} .= substr($_, 0, 3)' %s %s %s %s""",
    "gzip": "gzip -6 -c %s %s %s %s",
    "sha256sum": "sha256sum $(yes %s | head -n 15)",
    "sort": "LC_ALL=C sort -r %s %s %s %s",
    "grep": "grep -c '[0-9]99.*f.x' $(yes %s | head -n 20) | cat",
    "200 processes": "for i in $(seq 200); do /bin/true; done",
    "a pipe": "dd if=/dev/zero bs=4k count=100000 | cat",
}
MAKE_TEXT = f"seq 1 400000 | sed 's/$/ the quick brown fox/' > {TEXT}"
RUNS = 3


def natively() -> dict[str, float]:
    """Run all on this host."""

    def run(command: str) -> float:
        before = os.times()
        subprocess.run(["bash", "-c", f"{{ {command}; }} > /dev/null 2>&1"], check=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    run(MAKE_TEXT)
    found = {name: min(run(command.replace("%s", TEXT)) for _ in range(RUNS)) for name, command in PROGRAMS.items()}
    Path(TEXT).unlink()
    return found


def in_guest(machine: Machine) -> dict[str, float]:
    """Run all at the guest's shell."""

    def run(command: str) -> float:
        before = process_time()
        machine.console.send(f"{{ {command}; }} > /dev/null 2>&1; echo RA''N\n")
        machine.console.expect("RAN", timeout=600)
        return process_time() - before

    run(MAKE_TEXT)
    return {name: min(run(command.replace("%s", TEXT)) for _ in range(RUNS)) for name, command in PROGRAMS.items()}


def own(machine: Machine) -> str:
    """The VMM's own memory."""
    return f"{shares([machine])['own'] >> 20} MiB"


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("disk", "kernel", "initrd"):
        parser.add_argument(f"--{name}", required=True, type=Path)
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--code-cache", type=int, default=256)
    parser.add_argument("--only-boot", action="store_true", help="only the memory after the boot")
    arguments = parser.parse_args()
    native = {} if arguments.only_boot else natively()
    with tempfile.TemporaryDirectory(prefix="cardcage-bench-") as folder:
        disk, base = f"{folder}/disk.qcow2", str(arguments.disk.resolve())
        create_qcow2(disk, 16 << 30, Qcow2Shape(backing_file=base, backing_format="qcow2"))
        machine = Machine(
            memory="1G",
            cpus=arguments.cpus,
            accel="tcg",
            kernel=arguments.kernel,
            initrd=arguments.initrd,
            append=APPEND,
            devices=[{"type": "virtio-blk", "drive": {"file": disk, "backing": base}}],
            fragments=[{"accel": {"tcg": {"code_cache": arguments.code_cache}}}],
        )
        with machine:
            print("built, own", own(machine))
            machine.start()
            machine.console.expect("login: ", timeout=600)
            print("at the login, own", own(machine))
            if arguments.only_boot:
                return
            machine.console.send("root\n")
            machine.console.expect("# ", timeout=60)
            machine.console.send("stty -echo\n")
            machine.console.expect("# ", timeout=60)
            guest = in_guest(machine)
            print("after the programs, own", own(machine))
    rows = [[name, f"{time:.2f}", f"{guest[name]:.2f}", f"{guest[name] / time:.1f}"] for name, time in native.items()]
    print_table(["program", "native s", "guest s", "x native"], rows)


if __name__ == "__main__":
    main()
