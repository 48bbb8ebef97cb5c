"""Programs that people run, in a Debian guest: cardcage's translator, QEMU's with two processor models, and this host.

    python benchmarks/programs.py [--rounds 3] [--only sqlite,gzip] [--cpus 1] [--code-cache 256] [--only-boot]

A Debian root file system is made once, by mmdebstrap, in the cache folder (root, some minutes, 1 GB): the guests have
it on a virtio disk of which nothing is written back, the host runs the same binaries by chroot(2). In each round all
guests boot in turn, each program runs twice in each, and the second run counts; figures are medians of the rounds.
``native``, ``cardcage``, ``qemu64`` and ``max`` are seconds of processor time, of all the VMM's threads; ``wall`` is
the time until cardcage's guest had answered. Ratios are those to the faster of QEMU's models. Outputs are compared: a
row in which one differs from native is marked ``DIFFERS``, with which.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import field, frozen
from cardcage.config import Draft
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage_block.make import Qcow2Shape, create_qcow2
from cardcage_boot.cache import cache_root
from memory import shares
from paired import find_qemu, median, print_table

if TYPE_CHECKING:
    from collections.abc import Iterator

SUITE = "bookworm"
PACKAGES = "linux-image-cloud-amd64 python3 perl lua5.4 nodejs gcc libc6-dev sqlite3 zstd xz-utils openssl findutils"
APPEND = "root=/dev/vda rw init=/bench console=ttyS0 quiet net.ifnames=0 no_timer_check panic=-1"
SIZE = 2 << 30

BENCH = """#!/bin/bash
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C
if [ $$ = 1 ]; then
    mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t tmpfs tmpfs /tmp
    exec < /dev/ttyS0 > /dev/ttyS0 2>&1
    stty -echo -onlcr
fi
mkdir -p /tmp/b; cd /tmp/b
seq 1 200000 | sed 's/$/ the quick brown fox/' > text
cat /usr/lib/x86_64-linux-gnu/libnode.so* | head -c 24000000 > binary
echo "@ready"
while read -r name; do
    (. "/programs/$name") > out 2>&1
    echo "@done $name $? $(sha256sum < out | cut -c1-16)"
done
"""

PYTHON = """d = {}
for i in range(400000): d[i % 1000] = d.get(i % 1000, 0) + i * i % 7
print(sum(d.values()))"""
NODE = "let o = {}; for (let i = 0; i < 3e6; i++) o['k' + i % 500] = i; console.log(JSON.stringify(o).length)"
PERL = '$h{$_ % 1000} .= substr($_, 0, 3); END { print length($h{7}), "\\n" }'
LUA = "local t = {} for i = 1, 3000000 do t[i % 1000] = (t[i % 1000] or 0) + i % 7 end print(t[7])"
SIGN = "openssl dgst -sha256 -sign k text | wc -c"
PROGRAMS = {
    "shell, 400 processes": "for i in $(seq 400); do /bin/true; done",
    "shell, arithmetic": "n=0; for i in $(seq 120000); do n=$((n + i % 7)); done; echo $n",
    "find": "for i in 1 2 3; do find /usr -xdev -name '*.h' -size +1k; done | sort",
    "python": f"python3 -I -c '{PYTHON}'",
    "python, start": "for i in 1 2 3 4 5; do python3 -c 'import json, re, subprocess; print(1)'; done",
    "perl": f"perl -ne '{PERL}' text text text text",
    "lua": f"lua5.4 -e '{LUA}'",
    "node": f'node -e "{NODE}"',
    "gcc -O0": "for i in 1 2 3; do gcc -O0 -c /programs/example.c -o e.o && cksum < e.o; done",
    "gcc -O2": "gcc -O2 -c /programs/example.c -o e.o && cksum < e.o",
    "sqlite": "sqlite3 :memory: < /programs/example.sql",
    "zstd": "zstd -q -3 -c binary | cksum",
    "xz": "head -c 2500000 binary | xz -T1 -6 -c | cksum",
    "gzip": "gzip -6 -n -c binary | cksum",
    "gunzip": "[ -e g.gz ] || gzip -1 -c binary > g.gz; for i in 1 2 3; do gunzip -c g.gz; done | cksum",
    "sort": "for i in 1 2; do sort -r text | cksum; done",
}
CIPHERS = {
    "openssl aes-256-ctr": "openssl enc -aes-256-ctr -K 00 -iv 00 -in binary 2> /dev/null | cksum",
    "openssl chacha20": "openssl enc -chacha20 -K 00 -iv 00 -in binary 2> /dev/null | cksum",
    "openssl sha256": "openssl dgst -sha256 binary",
    "openssl rsa, 20 signatures": f"[ -e k ] || openssl genrsa -out k 2048; for i in $(seq 20); do {SIGN}; done",
}
SQL = """
CREATE TABLE t(a INTEGER PRIMARY KEY, b TEXT, c INTEGER);
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 60000)
INSERT INTO t SELECT i, 'row ' || (i * 7919 % 60000), i % 97 FROM n;
CREATE INDEX by_b ON t(b);
SELECT c, count(*), max(b) FROM t GROUP BY c ORDER BY c;
UPDATE t SET b = b || 'x' WHERE c < 30;
SELECT count(*) FROM t x JOIN t y ON x.b = y.b WHERE x.c < 50;
SELECT sum(length(b)) FROM t;
"""
SOURCE = "#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n" + "".join(
    f"int f{n}(int a, const char *b) {{ int s = a; for (int i = 0; b[i]; i++) {{"
    f" if (b[i] == {n % 90 + 32}) s += i * {n}; else s ^= (s << {n % 5 + 1}) + b[i];"
    f" switch (s & 3) {{ case 0: s++; break; case 1: s -= {n}; break;"
    f' default: s = abs(s); }} }} printf("%d\\n", s); return s; }}\n'
    for n in range(50)
)


def name_of(program: str) -> str:
    """Its file's name."""
    return re.sub(r"\W+", "-", program)


@frozen
class Debian:
    """The root file system as a directory and as a disk, its kernel and initramfs."""

    root: Path
    disk: Path
    kernel: Path
    initrd: Path


def debian() -> Debian:
    """From the cache folder, or made."""
    folder = cache_root() / "benchmarks" / SUITE
    made = Debian(folder / "root", folder / "disk.raw", folder / "vmlinuz", folder / "initrd.img")
    if not made.initrd.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        leave_out = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "man", "locale", "info")]
        command = ["mmdebstrap", "--variant=apt", "--mode=root", "--format=directory", *leave_out]
        subprocess.run([*command, f"--include={','.join(PACKAGES.split())}", SUITE, made.root], check=True)
        for link, kept in (("vmlinuz", made.kernel), ("initrd.img", made.initrd)):
            shutil.copy(made.root / os.readlink(made.root / link), kept)
    programs = made.root / "programs"
    programs.mkdir(exist_ok=True)
    files = {name_of(name): text for name, text in {**PROGRAMS, **CIPHERS}.items()}
    for name, text in {**files, "example.c": SOURCE, "example.sql": SQL}.items():
        (programs / name).write_text(f"{text}\n")
    (made.root / "bench").write_text(BENCH)
    (made.root / "bench").chmod(0o755)
    made.disk.unlink(missing_ok=True)
    with made.disk.open("wb") as file:
        file.truncate(SIZE)
    mkfs = shutil.which("mkfs.ext4", path=f"{os.environ['PATH']}:/usr/sbin:/sbin") or "mkfs.ext4"
    subprocess.run([mkfs, "-q", "-F", "-d", made.root, made.disk], check=True)
    return made


@frozen
class Measured:
    """Of one run of one program: seconds, and what it printed."""

    cpu: float
    wall: float
    output: str


@frozen
class Runner:
    """A process that runs ``/bench``, and reads the names of programs."""

    process: subprocess.Popen[bytes]
    chroot: bool = False
    text: list[bytes] = field(factory=list)

    def cpu(self) -> float:
        """Seconds of processor time until now; of /bench and all that it waited for, or of the VMM."""
        with open(f"/proc/{self.process.pid}/stat") as file:
            values = file.read().rpartition(")")[2].split()
        used = sum(map(int, values[11:15] if self.chroot else values[11:13]))
        return used / os.sysconf("SC_CLK_TCK")

    def expect(self, mark: bytes) -> bytes:
        """Read lines until one begins with *mark*. Raises RuntimeError when the process ends before."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.text.append(line)
            if line.startswith(mark):
                return line
        raise RuntimeError(
            f"{mark!r} did not come; the console's end: {b''.join(self.text)[-800:].decode(errors='replace')}"
        )

    def run(self, program: str) -> Measured:
        """One run. Raises RuntimeError for one that fails."""
        assert self.process.stdin is not None
        cpu, wall = self.cpu(), time.monotonic()
        self.process.stdin.write(f"{name_of(program)}\n".encode())
        self.process.stdin.flush()
        _, _, status, output = self.expect(b"@done").decode().split()
        if status != "0":
            raise RuntimeError(f"{program}: status {status}")
        return Measured(self.cpu() - cpu, time.monotonic() - wall, output)


def config_of(machine: Debian, folder: Path, options: argparse.Namespace, char: str = "stdio") -> Path:
    """A configuration of cardcage with the disk below an overlay."""
    disk, file = folder / "disk.qcow2", folder / "machine.toml"
    create_qcow2(str(disk), SIZE, Qcow2Shape(backing_file=str(machine.disk), backing_format="raw"))
    file.write_text(
        f'[machine]\naccel = ["tcg"]\nmemory = "1G"\ncpus = {options.cpus}\n[accel.tcg]\n'
        f'code_cache = {options.code_cache}\n[boot]\nkernel = "{machine.kernel}"\n'
        f'initrd = "{machine.initrd}"\nappend = "{APPEND}"\n[[device]]\ntype = "isa-serial"\nport = 0x3f8\nirq = 4\n'
        f'char = "{char}"\n[[device]]\ntype = "virtio-blk"\ndrive = {{ file = "{disk}", backing = "{machine.disk}" }}\n'
    )
    return file


@contextmanager
def running(kind: str, made: Debian, options: argparse.Namespace) -> Iterator[Runner]:
    """Start it, wait until /bench is ready, and end it."""
    with tempfile.TemporaryDirectory(prefix="cardcage-bench-") as name:
        folder = Path(name)
        if kind == "native":
            path = "PATH=/usr/sbin:/usr/bin:/sbin:/bin"  # alone: what this host's shell has is not for the programs
            command = ["env", "-i", path, "chroot", str(made.root), "/bench"]
        elif kind == "cardcage":
            program = "import sys; from cardcage_cli import main; sys.exit(main())"
            command = [sys.executable, "-c", program, "run", str(config_of(made, folder, options))]
        else:
            command = [
                *(find_qemu(), "-accel", "tcg,thread=multi", "-cpu", kind.split()[-1], "-machine", "pc", "-m", "1024"),
                *(
                    "-smp",
                    str(options.cpus),
                    "-nodefaults",
                    "-display",
                    "none",
                    "-no-reboot",
                    "-serial",
                    "stdio",
                    "-snapshot",
                ),
                *("-kernel", str(made.kernel), "-initrd", str(made.initrd), "-append", APPEND),
                *("-drive", f"file={made.disk},format=raw,if=virtio"),
            ]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            runner = Runner(process, kind == "native")
            try:
                runner.expect(b"@ready")
                yield runner
            finally:
                process.kill()
                process.wait()
                if kind == "native":
                    shutil.rmtree(made.root / "tmp/b", ignore_errors=True)


def own(made: Debian, options: argparse.Namespace) -> int:
    """Bytes of the VMM beside the guest's RAM, its share of what others have too, once the guest has booted."""
    with tempfile.TemporaryDirectory(prefix="cardcage-bench-") as name, Host() as host:
        draft = Draft()
        draft.add_file(config_of(made, Path(name), options, "console"))
        with Machine.from_config(draft.config(), host=host) as machine:
            machine.start()
            machine.console.expect("@ready", timeout=300)
            return shares([machine])["own"]


KINDS = ("native", "cardcage", "qemu qemu64", "qemu max")


def measure(made: Debian, chosen: list[str], arguments: argparse.Namespace) -> dict[tuple[str, str], list[Measured]]:
    """All rounds, by kind and program."""
    found: dict[tuple[str, str], list[Measured]] = {}
    for at in range(arguments.rounds):
        for kind in KINDS:
            with running(kind, made, arguments) as runner:
                for program in chosen:
                    runner.run(program)
                    found.setdefault((kind, program), []).append(runner.run(program))
            print(f"round {at + 1}: {kind}", file=sys.stderr, flush=True)
    return found


def show(found: dict[tuple[str, str], list[Measured]], programs: list[str]) -> None:
    """A table, and the geometric means of its ratios."""
    rows, ratios = [], {"cpu": [], "wall": [], "native": []}  # type: dict[str, list[float]]
    for program in programs:
        cpu = {kind: max(median([one.cpu for one in found[kind, program]]), 0.005) for kind in KINDS}
        wall = {kind: median([one.wall for one in found[kind, program]]) for kind in KINDS}
        outputs = {kind: {one.output for one in found[kind, program]} for kind in KINDS}
        others = [kind for kind in KINDS if outputs[kind] != outputs["native"] or len(outputs[kind]) > 1]
        qemu = min(KINDS[2:], key=lambda kind: cpu[kind])
        ratios["cpu"].append(cpu[qemu] / cpu["cardcage"])
        ratios["wall"].append(min(wall[one] for one in KINDS[2:]) / wall["cardcage"])
        ratios["native"].append(cpu["native"] / cpu["cardcage"])
        cells = [f"{cpu[kind]:.2f}" for kind in KINDS]
        cells += [f"{wall['cardcage']:.2f}", *(f"{all_[-1]:.2f}" for all_ in ratios.values())]
        rows.append([program, *cells, f"DIFFERS: {', '.join(others)}" if others else ""])
        for kind in ("native", *others) if others else ():
            print(f"{program}, output of {kind}: {sorted(outputs[kind])}", file=sys.stderr)
    means = [f"{math.exp(sum(map(math.log, all_)) / len(all_)):.2f}" for all_ in ratios.values()]
    rows.append(["geometric mean", "", "", "", "", "", *means, ""])
    head = ["program", "native", "cardcage", "qemu64", "max", "wall", "QEMU/ours", "by wall", "native/ours", ""]
    print_table(head, rows)


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="parts of the names of programs, with commas between")
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--code-cache", type=int, default=256, help="MiB of cardcage's translated code")
    parser.add_argument("--only-boot", action="store_true", help="only the VMM's own memory when the guest has booted")
    arguments = parser.parse_args()
    if os.geteuid() or not shutil.which("mmdebstrap"):
        sys.exit("this benchmark makes a Debian and runs its programs by chroot: it needs root, and mmdebstrap")
    made = debian()
    if arguments.only_boot:
        print(f"the VMM's own memory: {own(made, arguments) >> 20} MiB")
        return
    wanted = [one for one in arguments.only.split(",") if one]
    tables = [
        [one for one in table if not wanted or any(part in one for part in wanted)] for table in (PROGRAMS, CIPHERS)
    ]
    found = measure(made, [one for table in tables for one in table], arguments)
    for table in filter(None, tables):
        show(found, table)
        print()


if __name__ == "__main__":
    main()
