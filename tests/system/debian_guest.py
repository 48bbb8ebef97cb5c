"""A Debian guest on a disk, made once and kept: what the tests of disks and networks boot.

mmdebstrap makes the root file system from the host's own Debian mirror, mkfs.ext4 puts it into a partition, and GRUB's
two images are written before it. Nothing is mounted and no loop device is needed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from attrs import frozen
from cardcage_boot.cache import cache_root

SUITE = "bookworm"
PACKAGES = "sysvinit-core initscripts systemd ifupdown udhcpc fio iperf3 e2fsprogs udev linux-image-cloud-amd64"
CLOUD = "systemd-sysv ifupdown isc-dhcp-client udev openssh-server cloud-init qemu-guest-agent linux-image-cloud-amd64"
"""What a distribution's cloud image has, for cloud-init and the agents."""
TOOLS = {
    "mmdebstrap": "mmdebstrap",
    "mkfs.ext4": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "sfdisk": "fdisk",
    "grub-mkimage": "grub-common",
    "qemu-img": "qemu-utils",
}
GRUB = Path("/usr/lib/grub/i386-pc")  # Debian: grub-pc-bin
MODULES = "biosdisk part_msdos ext2 normal linux serial terminal echo test configfile boot"
START = 1 << 20
"""Where the partition begins. GRUB's second image lies before it."""
SIZE = 768 << 20
APPEND = "root=/dev/vda1 rw console=ttyS0 net.ifnames=0 panic=-1 no_timer_check"
FILES = {
    "etc/hostname": "cage\n",
    "etc/fstab": "/dev/vda1 / ext4 errors=remount-ro 0 1\n",
    "etc/network/interfaces": "auto lo\niface lo inet loopback\nauto eth0\niface eth0 inet dhcp\n",
    "etc/inittab": """id:2:initdefault:
si::sysinit:/etc/init.d/rcS
l0:0:wait:/etc/init.d/rc 0
l2:2:wait:/etc/init.d/rc 2
l6:6:wait:/etc/init.d/rc 6
T0:2:respawn:/sbin/getty -L ttyS0 115200 vt100
""",
    "boot/grub/grub.cfg": f"""serial --unit=0 --speed=115200
terminal_input serial
terminal_output serial
set timeout=2
menuentry "the cage's Debian" {{
    linux /vmlinuz {APPEND}
    initrd /initrd.img
}}
""",
}


@frozen
class DebianGuest:
    """The disk, and its own kernel and initrd beside it for booting without GRUB."""

    disk: Path
    kernel: Path
    initrd: Path

    def overlay(self, path: Path) -> Path:
        """A new qcow2 image at *path* over the disk, which stays as it is."""
        command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(self.disk), str(path)]
        subprocess.run(command, check=True)
        return path


def debian_guest(packages: str = PACKAGES) -> DebianGuest:
    """The guest with *packages*, from the cache or made now; skips the test that needs it where a tool is missing."""
    missing = {package for tool, package in TOOLS.items() if not _which(tool)}
    missing |= set() if GRUB.is_dir() else {"grub-pc-bin"}
    if missing:
        pytest.skip(f"needs {' '.join(sorted(missing))}")
    if os.geteuid() != 0:
        pytest.skip("needs root to make a root file system")
    with Path(__file__).open("rb") as own:
        digest = hashlib.sha256(own.read() + packages.encode()).hexdigest()[:16]
    folder = cache_root() / "tests" / f"{SUITE}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    guest = DebianGuest(folder / "disk.qcow2", folder / "vmlinuz", folder / "initrd.img")
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not guest.disk.exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                _make(guest, Path(scratch), packages)
    return guest


def check_file_system(image: Path, scratch: Path) -> None:
    """The image is a sound qcow2 and the file system in it was left clean and without an error."""
    subprocess.run(["qemu-img", "check", "-q", image], check=True)
    subprocess.run(["qemu-img", "convert", "-O", "raw", image, scratch], check=True)
    where = f"{scratch}?offset={START}"
    said = subprocess.run([_which("dumpe2fs"), "-h", where], capture_output=True, text=True, check=True)
    assert "Filesystem state:         clean\n" in said.stdout
    assert "needs_recovery" not in said.stdout
    done = subprocess.run([_which("e2fsck"), "-fn", where], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    scratch.unlink()


def _which(tool: str) -> str:
    """A tool's path, of those in the administrator's folders too; empty without it."""
    return shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") or ""


def _make(guest: DebianGuest, scratch: Path, packages: str) -> None:
    root, raw, made = scratch / "root", scratch / "raw", scratch / "disk.qcow2"
    leave_out = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "man", "locale", "info")]
    command = ["mmdebstrap", "--variant=apt", "--mode=root", "--format=directory", *leave_out]
    command += [f"--include={','.join(packages.split())}", SUITE, str(root)]
    subprocess.run(command, check=True)
    for name, text in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    shadow = root / "etc/shadow"
    shadow.write_text(shadow.read_text().replace("root:*:", "root::"))
    for found, kept in ((root / "vmlinuz", guest.kernel), (root / "initrd.img", guest.initrd)):
        shutil.copy(root / os.readlink(found), kept)
    with raw.open("wb") as file:
        file.truncate(SIZE)
    subprocess.run(
        [_which("sfdisk"), "-q", raw], input=f"start={START // 512}, type=83, bootable", text=True, check=True
    )
    offset = f"offset={START},root_owner=0:0"
    subprocess.run(
        [_which("mkfs.ext4"), "-q", "-F", "-d", root, "-E", offset, raw, f"{(SIZE - START) >> 10}k"], check=True
    )
    _write_grub(raw, scratch / "core.img")
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", raw, made], check=True)
    made.rename(guest.disk)


def _write_grub(raw: Path, core: Path) -> None:
    """Put GRUB's boot sector and, from sector 1 on where that one looks for it, its core image on the disk."""
    command = ["grub-mkimage", "-O", "i386-pc", "-o", str(core), "-p", "(hd0,msdos1)/boot/grub", *MODULES.split()]
    subprocess.run(command, check=True)
    image = core.read_bytes()
    assert 512 + len(image) <= START
    with raw.open("r+b") as file:
        file.write((GRUB / "boot.img").read_bytes()[:440])  # what follows is the partition table
        file.seek(512)
        file.write(image)
