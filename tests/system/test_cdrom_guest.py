"""A CD-ROM drive with a real firmware and a real kernel."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from cardcage_agent import Machine
from cardcage_cdrom.discs import drives
from installed import PROGRAM
from iso import make_iso

ROM = Path("/usr/share/seabios/bios-256k.bin")
SAYS_AND_ENDS = bytes.fromhex("baf803 b063 ee b064 ee b00a ee ba0406 b80020 ef f4")
"""Writes "cd" to COM1, and powers off."""


@pytest.mark.skipif(not ROM.exists(), reason="needs Debian's package seabios")
def test_firmware_boots_a_disc(tmp_path: Path) -> None:
    """SeaBIOS finds the drive, and boots the disc in it by its El Torito record."""
    (tmp_path / "cd.iso").write_bytes(make_iso(SAYS_AND_ENDS, b""))
    words = ["boot", "--accel", "tcg", "--firmware", str(ROM), "--cdrom", str(tmp_path / "cd.iso"), "--timeout", "120"]
    done = subprocess.run([*PROGRAM, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Booting from DVD/CD" in done.stdout
    assert done.stdout.endswith("cd\n")


def test_linux_mounts_a_disc_and_sees_another(kernel: Path, tmp_path: Path) -> None:
    """A disc is mounted and read; while it is, the tray is locked; one that comes in its place is seen."""
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(make_iso(b"", f"disc {name}\n".encode()))
    drive = {"file": str(tmp_path / "one"), "format": "raw", "readonly": True}
    devices = [{"type": "virtio-cdrom", "id": "cd", "drive": drive}]
    mount = "mkdir -p /cd; until mount -t iso9660 -o ro /dev/sr0 /cd; do sleep 0.1; done 2> /dev/null; cat /cd/*"
    with Machine.debian(accel="tcg", devices=devices) as vm:
        vm.start()
        assert vm.run(mount, text=True, timeout=120).stdout == "disc one\n"
        cd, _ = drives(vm)["cd"]
        with pytest.raises(ValueError, match="locked"):
            cd.change(None)
        assert vm.run("umount /cd", timeout=60).returncode == 0
        with (tmp_path / "two").open("rb") as file:
            cd.change(os.dup(file.fileno()))
        assert vm.run(mount, text=True, timeout=120).stdout == "disc two\n"
