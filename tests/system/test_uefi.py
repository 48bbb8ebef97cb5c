"""UEFI firmware and U-Boot, as Debian packages them, on the whole PC."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from cardcage import Machine, PoweredOff
from cardcage_boot.cache import cache_root
from cardcage_boot.fetch import Shelf

CODE, VARS = Path("/usr/share/OVMF/OVMF_CODE_4M.fd"), Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
UBOOT = Path("/usr/lib/u-boot/qemu-x86_64/u-boot.rom")
SHELL = "Shell> "


def system_partition(path: Path, kernel: Path) -> None:
    """A FAT file system with a kernel and an initramfs."""
    shelf = Shelf(cache_root(), lambda what, percent: None, lambda line: None)
    with path.open("wb") as image:
        image.truncate(96 << 20)
    subprocess.run(["mformat", "-i", path, "-F", "::"], check=True)
    for source, name in ((kernel, "vmlinuz"), (shelf.initramfs(shelf.kernel()), "initrd")):
        subprocess.run(["mcopy", "-i", path, source, f"::{name}"], check=True)


@pytest.mark.skipif(not CODE.exists(), reason="needs Debian's package ovmf")
@pytest.mark.skipif(shutil.which("mcopy") is None, reason="needs Debian's package mtools")
def test_ovmf_keeps_its_variables_and_starts_linux_from_a_disk(kernel: Path, tmp_path: Path) -> None:
    """OVMF reaches its shell, powers off, finds a variable of the last run again, and starts a kernel from a disk.

    The kernel gets ACPI tables that know which ports the firmware has chosen.
    """
    flash, disk = tmp_path / "vars.fd", tmp_path / "esp.img"
    shutil.copy(VARS, flash)
    system_partition(disk, kernel)
    boot = {"firmware": str(CODE)}
    variables = {"type": "pflash", "file": str(flash), "below": str(CODE)}
    devices = [variables, {"type": "virtio-blk", "drive": {"file": str(disk), "format": "raw"}}]
    for again in (False, True):
        with Machine(memory="256M", accel="tcg", boot=boot, devices=devices) as machine:
            console = machine.start().console
            console.expect("any other key to continue", timeout=120)
            console.send("\r")
            console.expect(SHELL, timeout=60)
            if not again:
                console.send("set greet hello\r")
                console.expect(SHELL, timeout=60)
                console.send("reset -s\r")
                assert machine.wait(timeout=60) == PoweredOff()
                continue
            console.send("set greet\r")
            console.expect("hello", timeout=60)
            console.expect(SHELL, timeout=60)
            console.send("fs0:\\vmlinuz initrd=\\initrd console=ttyS0 loglevel=7\r")
            console.expect("EFI stub: Loaded initrd", timeout=120)
            console.expect("efi: EFI v2.70", timeout=120)
            console.expect("PM-Timer IO Port: 0xb008", timeout=60)
            console.expect("Run /init as init process", timeout=120)


@pytest.mark.skipif(not UBOOT.exists(), reason="needs Debian's package u-boot-qemu")
def test_u_boot_reaches_its_prompt() -> None:
    """U-Boot counts down on the serial port, stops for a key, and knows the chipset's functions."""
    with Machine(memory="128M", accel="tcg", boot={"firmware": str(UBOOT)}) as machine:
        console = machine.start().console
        console.expect("Hit any key to stop autoboot", timeout=120)
        console.send(" ")
        console.expect("=> ", timeout=60)
        console.send("pci\r")
        console.expect("0x7113", timeout=60)
