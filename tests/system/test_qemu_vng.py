"""virtme-ng (PyPI: virtme-ng), unmodified, with ``cardcage-qemu`` as its QEMU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

VNG = shutil.which("vng")
LONG = bool(os.environ.get("CARDCAGE_LONG_TESTS"))


@pytest.mark.skipif(LONG and VNG is None, reason="needs vng (pip install virtme-ng)")
@pytest.mark.skipif(not LONG, reason="takes a minute each: set CARDCAGE_LONG_TESTS")
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
def test_a_kernel_and_a_command(generic: Path, tmp_path: Path, command: str, said: list[str]) -> None:
    """vng boots Debian's generic kernel on the host's own files and runs a command; Linux's driver for the watchdog
    that vng asks for feeds it, and the machine is reset when that ends."""
    (kernel,) = (generic / "cardcage").glob("debian-*/kernel/boot/vmlinuz-*")
    release = kernel.name.removeprefix("vmlinuz-")
    modules = kernel.parents[1] / "lib" / "modules" / release / "kernel" / "drivers" / "watchdog"
    emulator = tmp_path / "cardcage-qemu"
    emulator.write_text(f"#!{sys.executable}\nimport sys\nfrom cardcage_qemu import main\nsys.exit(main())\n")
    emulator.chmod(0o755)
    words = ["--disable-kvm", "--disable-microvm", "--force-9p", "-r", str(kernel), "--", command.format(modules)]
    done = subprocess.run(
        [str(VNG), "--verbose", "--qemu", str(emulator), *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )
    at = 0
    for word in (release, *said):
        assert word in done.stdout[at:], done.stdout[-3000:]
        at = done.stdout.index(word, at)
    assert "never" not in done.stdout.rpartition("fed")[2]
