"""A whole Debian on one of our disks: systemd, DHCP, fio with verification, iperf3, a clean shutdown."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cardcage.errors import HostError
from cardcage_boot import cpio
from cardcage_boot.cache import cache_root
from cardcage_boot.fetch import Shelf

PROGRAM = [sys.executable, "-c", "import sys; from cardcage.cli import main; sys.exit(main())"]
TOOLS = ("mmdebstrap", "mke2fs", "debugfs", "e2fsck", "qemu-img", "iperf3", "passt", "unshare")
PACKAGES = "systemd-sysv,udev,kmod,iproute2,ifupdown,isc-dhcp-client,fio,iperf3,e2fsprogs,login"

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="debootstrapping and namespaces need root"),
    pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason=f"needs {' '.join(TOOLS)}"),
    pytest.mark.timeout(1500),
    pytest.mark.once,
]

FILES = {
    "etc/network/interfaces": "auto lo\niface lo inet loopback\nauto eth0\niface eth0 inet dhcp\n",
    "etc/fstab": "/dev/vda / ext4 defaults 0 1\n",
    "etc/hostname": "cardcage-guest\n",
    "etc/systemd/system/work.service": (
        "[Unit]\nAfter=network-online.target getty.target\nWants=network-online.target\n"
        "[Service]\nType=oneshot\nExecStart=/bin/sh /root/work.sh\n"
        "StandardOutput=append:/var/log/work.log\nStandardError=append:/var/log/work.log\n"
    ),
    "root/work.sh": (
        "echo begin; ip -4 -o addr show eth0\n"
        "fio --name=verify --filename=/var/tmp/fio.dat --size=16M --rw=randwrite --bs=4k --iodepth=16 "
        "--ioengine=libaio --direct=1 --verify=crc32c --do_verify=1 --fsync=64 --minimal > /dev/null; echo fio $?\n"
        "iperf3 -c 192.0.2.2 -t 2; echo up $?\n"
        "iperf3 -c 192.0.2.2 -t 2 -R; echo down $?\n"
        "echo end; sync; systemctl poweroff\n"
    ),
}

INIT_END = """
mount /dev/vda /mnt
for place in dev proc sys; do mount --move /$place /mnt/$place; done
umount /tmp /run
exec switch_root /mnt /sbin/init
"""

AROUND = """
set -e
ip link set lo up
ip link add out0 type veth peer name nowhere
ip addr add 192.0.2.2/24 dev out0
ip link set out0 up
ip link set nowhere up
ip route add default via 192.0.2.1
iperf3 -s > /dev/null &
server=$!
status=0
"$@" || status=$?
kill $server
exit $status
"""


def run(*words: object, **options: object) -> str:
    command = [str(word) for word in words]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return str(done.stdout)


@pytest.fixture(scope="module")
def root_archive() -> Path:
    """A minimal Debian as a tar file, made once and kept in the cache."""
    made = cache_root() / "test-debian-root.tar"
    if not made.exists():
        half = made.with_suffix(".half")
        run("mmdebstrap", "--format=tar", "--variant=minbase", f"--include={PACKAGES}", "bookworm", half)
        half.rename(made)
    return made


@pytest.fixture
def disk(tmp_path: Path, root_archive: Path) -> Path:
    """The root file system as a qcow2 image, by our own converter."""
    root = tmp_path / "root"
    root.mkdir()
    run("tar", "-C", root, "-xf", root_archive)
    for name, text in FILES.items():
        (root / name).write_text(text)
    (root / "etc/systemd/system/multi-user.target.wants/work.service").symlink_to("/etc/systemd/system/work.service")
    raw, image = tmp_path / "root.raw", tmp_path / "root.qcow2"
    with raw.open("wb") as file:
        file.truncate(1500 << 20)
    run("mke2fs", "-q", "-t", "ext4", "-d", root, raw)
    run(*PROGRAM, "image", "convert", "-f", "raw", raw, image)
    run("qemu-img", "compare", raw, image)
    raw.unlink()
    return image


def initramfs(folder: Path, shelf: Shelf) -> tuple[Path, Path]:
    """The kernel, and cardcage's initramfs with an init that goes on from the disk."""
    try:
        kernel = shelf.kernel()
    except HostError as error:
        pytest.skip(str(error))
    base = shelf.initramfs(kernel).read_bytes()
    init = next(entry.data for entry in cpio.parse(base) if entry.name == "init").decode()
    init = init[: init.index("for nic in")].replace("cd /root", "cd /") + INIT_END
    made = folder / "initrd"
    made.write_bytes(base + bytes(-len(base) % 4) + cpio.pack([cpio.file("init", init.encode(), 0o755)]))
    return kernel.path, made


def test_debian_works_and_shuts_down_cleanly(tmp_path: Path, disk: Path) -> None:
    """Debian boots from a qcow2, gets an address by DHCP, verifies what fio wrote, reaches a server, ends clean."""
    kernel, initrd = initramfs(tmp_path, Shelf(cache_root(), lambda what, percent: None, lambda line: None))
    around = tmp_path / "around.sh"
    around.write_text(AROUND)
    run(
        *("unshare", "-n", "sh", around, *PROGRAM, "boot", "--accel", "tcg", "--memory", "768M", "--timeout", "900"),
        *("--kernel", kernel, "--initrd", initrd, "--append", "net.ifnames=0 quiet"),
        *("--drive", f"file={disk},format=qcow2", "--net", "user"),
        stdin=subprocess.DEVNULL,
    )
    run("qemu-img", "check", disk)
    raw = tmp_path / "after.raw"
    run(*PROGRAM, "image", "convert", "-O", "raw", disk, raw)
    run("e2fsck", "-fn", raw)
    said = run("debugfs", "-R", "cat /var/log/work.log", raw)
    assert "inet 10.0.2.15/24" in said
    for line in ("fio 0", "up 0", "down 0", "end"):
        assert f"\n{line}\n" in said, said
