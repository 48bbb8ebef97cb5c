"""Kernels other than Linux that Debian packages: each starts by its boot protocol, on a PC as a BIOS leaves it."""

from __future__ import annotations

import lzma
import re
import struct
import subprocess
from typing import TYPE_CHECKING

import pytest
from cardcage import Machine
from cardcage.errors import ConfigError, HostError
from cardcage.outcome import PoweredOff
from cardcage_boot import cpio
from cardcage_boot.cache import cache_root
from cardcage_boot.fetch import Shelf
from debian_kernels import debian_file
from installed import PROGRAM

if TYPE_CHECKING:
    from pathlib import Path

QUIET = "console=ttyS0 panic=-1 quiet no_timer_check cryptomgr.notests"
INIT = b"""#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
echo "on $(/bin/busybox cat /sys/hypervisor/type || echo PC), processors: $(/bin/busybox nproc)"
/bin/busybox grep ttyS0 /proc/interrupts
/bin/busybox poweroff -f
"""


@pytest.fixture
def initrd(tmp_path: Path) -> Path:
    """An initramfs of a static busybox that says what it runs on, and powers off."""
    try:
        busybox = Shelf(cache_root(), lambda what, percent: None, lambda line: None).busybox()
    except HostError as error:
        pytest.skip(str(error))
    path = tmp_path / "initrd"
    entries = [
        cpio.device("dev/console", 5, 1),
        cpio.file("bin/busybox", busybox.read_bytes(), 0o755),
        cpio.file("init", INIT, 0o755),
    ]
    path.write_bytes(cpio.pack(entries))
    return path


@pytest.mark.once
@pytest.mark.parametrize(("cpus", "options"), [(1, "no-real-mode "), (2, "")])
def test_xen_boots_debian_as_dom0(initrd: Path, cpus: int, options: str) -> None:
    """Xen, started by Multiboot, boots Debian's kernel as dom0 to its init and powers off.

    With ``no-real-mode`` it takes the memory map from Multiboot alone; without, it first goes back to real mode and
    asks a BIOS, to hear that there is no such function.
    """
    xen = debian_file("xen-hypervisor-4.17-amd64", "xen-*.gz")
    linux = debian_file("linux-image-amd64", "vmlinuz-*")
    boot = {
        "protocol": "multiboot",
        "kernel": str(xen),
        "modules": [f"{linux} console=hvc0 panic=-1", str(initrd)],
        "append": f"{options}console=com1 com1=115200 dom0_mem=512M noreboot",
    }
    with Machine(accel="tcg", memory="1G", cpus=cpus, boot=boot) as machine:
        machine.start()
        machine.console.expect("Xen version 4.17", timeout=60)
        machine.console.expect(f"on xen, processors: {cpus}", timeout=200)
        assert machine.wait(60) == PoweredOff()


def test_linux_without_acpi_finds_the_mp_tables(initrd: Path) -> None:
    """With acpi=off, Linux has both processors and the I/O APIC by the MP tables; and PAT, as MTRRs are on."""
    linux = debian_file("linux-image-amd64", "vmlinuz-*")
    append = "console=ttyS0 acpi=off panic=-1 no_timer_check cryptomgr.notests"
    with Machine(accel="tcg", kernel=linux, initrd=initrd, append=append, memory="256M", cpus=2) as machine:
        machine.start()
        machine.console.expect("x86/PAT: Configuration", timeout=60)
        machine.console.expect("MPTABLE: OEM ID: CARDCAGE", timeout=60)
        machine.console.expect("on PC, processors: 2", timeout=120)
        machine.console.expect(re.compile(r"IO-APIC +4-edge +ttyS0"), timeout=30)


@pytest.mark.parametrize("version", [0x206, 0x20B])
def test_linux_of_an_old_protocol_boots(initrd: Path, tmp_path: Path, version: int) -> None:
    """A kernel that calls itself as old as protocol 2.06 is entered in 32-bit mode and comes to its init."""
    kernel = bytearray(debian_file("linux-image-amd64", "vmlinuz-*").read_bytes())
    struct.pack_into("<H", kernel, 0x206, version)
    struct.pack_into("<H", kernel, 0x236, 0)  # xloadflags, not known then
    (tmp_path / "vmlinuz").write_bytes(kernel)
    with Machine(accel="tcg", kernel=tmp_path / "vmlinuz", initrd=initrd, append=QUIET, memory="256M") as machine:
        machine.start()
        machine.console.expect("on PC, processors: 1", timeout=120)
        assert machine.wait(60) == PoweredOff()


@pytest.mark.parametrize("note", ["PVH", "no PVH"])
def test_an_elf_kernel_of_linux_boots_as_its_bzimage_does(note: str, tmp_path: Path) -> None:
    """``cardcage boot --kernel vmlinux --exec`` runs the command; with too little memory it says how much it needs."""
    bzimage = debian_file("linux-image-amd64", "vmlinuz-*").read_bytes()
    offset, size = struct.unpack_from("<II", bzimage, 0x248)
    start = (bzimage[0x1F1] + 1) * 512 + offset
    if bzimage[start : start + 4] != b"\xfd7zX":
        pytest.skip("needs a kernel compressed with xz, to have its vmlinux")
    vmlinux = lzma.LZMADecompressor().decompress(bzimage[start : start + size])
    entry = struct.pack("<3I4s", 4, 8, 18, b"Xen")
    assert vmlinux.count(entry) == 1
    if note == "no PVH":  # as Firecracker's kernels, among others
        vmlinux = vmlinux.replace(entry, entry.replace(b"Xen", b"Not"))
    (tmp_path / "vmlinux").write_bytes(vmlinux)
    command = [*PROGRAM, "boot", "--accel", "tcg", "--timeout", "120", "--kernel", "vmlinux", "--exec", "uname -r"]
    release = re.search(rb"Linux version (\S+)", (tmp_path / "vmlinux").read_bytes())
    assert release is not None
    done = subprocess.run(command, input=b"", cwd=tmp_path, capture_output=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, release[1]), done.stderr.decode()
    done = subprocess.run([*command, "--memory", "32M"], input=b"", cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 2
    assert re.search(rb"vmlinux: .* needs guest RAM at .*: give more memory, at least \d+M\n$", done.stderr)


@pytest.mark.parametrize("memory", ["40M", "60M", "67M"])
def test_memory_below_the_kernels_place_is_no_triple_fault(memory: str) -> None:
    """A relocatable kernel is not put below its preferred address: it is told what it needs, and then starts."""
    kernel = debian_file("linux-image-amd64", "vmlinuz-*")
    with pytest.raises(ConfigError, match=r"does not fit .*: give more memory, at least \d+M") as raised:
        Machine(accel="tcg", kernel=kernel, append=QUIET, memory=memory).start()
    least = str(raised.value).rpartition(" ")[2]
    assert int(least[:-1]) > int(memory[:-1])
    with Machine(accel="tcg", kernel=kernel, append="console=ttyS0 earlyprintk=ttyS0", memory=least) as machine:
        machine.start()
        machine.console.expect("Linux version", timeout=60)


def test_gnu_mach_starts() -> None:
    """GNU Mach, started by Multiboot, finds the memory map and goes on to look for its modules, which are not given."""
    mach = debian_file("gnumach-image-1.8-486", "gnumach-*.gz")
    with Machine(accel="tcg", memory="256M", boot={"kernel": str(mach), "append": "console=com0"}) as machine:
        machine.start()
        machine.console.expect("biosmem: 00000000000009fc00:000000000000100000, reserved", timeout=60)
        machine.console.expect("No bootstrap code loaded with the kernel", timeout=60)


def test_memtest86_tests_memory() -> None:
    """Memtest86+, which calls itself a bzImage, comes up on the serial port and tests memory without an error."""
    memtest = debian_file("memtest86+", "memtest86+x64.bin")
    boot = {"kernel": str(memtest), "append": "console=ttyS0,115200"}
    with Machine(accel="tcg", memory="64M", boot=boot) as machine:
        machine.start()
        machine.console.expect("Memtest86", timeout=60)
        assert "Errors: 0" in machine.console.expect(r"Errors: 0 ", timeout=60)
