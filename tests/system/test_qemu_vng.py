"""virtme-ng (PyPI: virtme-ng), unmodified, with ``cardcage-qemu`` as its QEMU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

VNG = shutil.which("vng")
VIRTIOFSD = "/usr/lib/qemu/virtiofsd"
LONG = bool(os.environ.get("CARDCAGE_LONG_TESTS"))
TAKES_LONG = pytest.mark.skipif(not LONG, reason="takes a minute each: set CARDCAGE_LONG_TESTS")
WANTS_VNG = pytest.mark.skipif(LONG and VNG is None, reason="needs vng (pip install virtme-ng)")
ON_PC = ["--disable-kvm", "--disable-microvm", "--force-9p"]
SERVES = f"""#!/bin/sh
case "$1" in --*) [ $# -gt 1 ] || exit 0 ;; esac
while [ $# -gt 1 ]; do
    case "$1" in --socket-path) socket=$2 ;; --shared-dir) folder=$2 ;; esac
    shift
done
touch "$socket.pid"
exec {VIRTIOFSD} --socket-path="$socket" -o source="$folder" -o sandbox=chroot
"""
"""Debian 12's virtiofsd, in C, by the options of the one in Rust that virtme-ng expects."""


def run(kernel: Path, folder: Path, words: list[str], command: str) -> str:
    """What vng says; where it asks for KVM, the emulator has the translator in its place: KVM may be emulated here."""
    emulator = folder / "cardcage-qemu"
    program = "import sys\nfrom cardcage_qemu import main\n"
    program += "sys.argv = [one.replace('accel=kvm', 'accel=tcg') for one in sys.argv]\nsys.exit(main())\n"
    emulator.write_text(f"#!{sys.executable}\n{program}")
    emulator.chmod(0o755)
    done = subprocess.run(
        [str(VNG), "--verbose", "--qemu", str(emulator), *words, "-r", str(kernel), "--", command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        env=os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"},
    )
    return done.stdout


@pytest.fixture
def generic_kernel(generic: Path) -> Path:
    (kernel,) = (generic / "cardcage").glob("debian-*/kernel/boot/vmlinuz-*")
    return kernel


@WANTS_VNG
@TAKES_LONG
@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("uname -r; exit 3", ["script exited with code 3", "outcome: the guest powered off"]),
        (
            "insmod {0}/watchdog.ko; insmod {0}/i6300esb.ko heartbeat=4; cat /sys/class/watchdog/watchdog0/identity; "
            "exec 3>/dev/watchdog; for i in 1 2 3 4 5 6 7; do echo >&3; sleep 1; done; echo fed; sleep 30; echo never",
            ["i6300ESB timer", "fed", "outcome: the guest asked for a reset (its watchdog expired)"],
        ),
    ],
)
def test_a_kernel_and_a_command(generic_kernel: Path, tmp_path: Path, command: str, said: list[str]) -> None:
    """vng boots Debian's generic kernel on the host's own files and runs a command; Linux's driver for the watchdog
    that vng asks for feeds it, and the machine is reset when that ends."""
    release = generic_kernel.name.removeprefix("vmlinuz-")
    modules = generic_kernel.parents[1] / "lib" / "modules" / release / "kernel" / "drivers" / "watchdog"
    printed = run(generic_kernel, tmp_path, ON_PC, command.format(modules))
    at = 0
    for word in (release, *said):
        assert word in printed[at:], printed[-3000:]
        at = printed.index(word, at)
    assert "never" not in printed.rpartition("fed")[2]


@WANTS_VNG
@TAKES_LONG
@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="vng chooses microvm where /dev/kvm is")
@pytest.mark.skipif(not Path(VIRTIOFSD).exists(), reason="needs virtiofsd (Debian 12: qemu-system-common)")
def test_on_microvm(generic_kernel: Path, tmp_path: Path) -> None:
    """vng's own choice of board, with KVM and virtiofsd, is microvm: its guest runs a command on the host's files."""
    server = tmp_path / "virtiofsd"
    server.write_text(SERVES)
    server.chmod(0o755)
    printed = run(generic_kernel, tmp_path, [], "ls /sys/bus/platform/devices; uname -r; exit 3")
    assert "use 'microvm' QEMU architecture" in printed, printed[-3000:]
    for word in ("LNRO0005:00", "script exited with code 3", "outcome: the guest powered off"):
        assert word in printed, printed[-3000:]
