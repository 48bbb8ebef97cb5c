"""``cardcage kernel``: its files, and the initramfs that mounts root= and goes on with the init there."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from cardcage import Machine, Panicked, PoweredOff
from cardcage.errors import HostError
from cardcage_boot.cache import cache_root
from cardcage_boot.fetch import Shelf
from installed import cardcage

INIT = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc 2> /dev/null
echo "init of the disk: $(/bin/busybox cat /name), arguments: $*"
/bin/busybox grep ' / ' /proc/mounts
[ -c /dev/vda ] || [ -b /dev/vda ] && echo "dev is there"
/bin/busybox poweroff -f
"""


@pytest.fixture(scope="module")
def files(kernel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which ``cardcage kernel`` was run."""
    folder = tmp_path_factory.mktemp("files")
    done = cardcage("kernel", folder=folder)
    assert done.returncode == 0, done.stderr
    assert sorted(one.name for one in folder.iterdir()) == ["initrd.img", "vmlinuz"]
    assert (folder / "vmlinuz").read_bytes() == kernel.read_bytes()
    return folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root file system of a busybox and an init, which absolute links lead to."""
    root = tmp_path_factory.mktemp("tree")
    for name in ("bin", "sbin", "lib", "proc", "sys", "dev"):
        (root / name).mkdir()
    try:
        shutil.copy(Shelf(cache_root(), lambda what, percent: None, lambda line: None).busybox(), root / "bin/busybox")
    except HostError as error:
        pytest.skip(str(error))
    (root / "lib/init").write_text(INIT)
    for one in (root / "lib/init", root / "bin/busybox"):
        one.chmod(0o755)
    (root / "sbin/init").symlink_to("/lib/init")
    (root / "name").write_text("alpha\n")
    return root


@pytest.fixture(scope="module")
def disk(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on a disk."""
    tool = shutil.which("mke2fs", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if tool is None:
        pytest.skip("needs mke2fs")
    image = tmp_path_factory.mktemp("disk") / "disk.img"
    label = ["-L", "alpha", "-U", "11111111-2222-3333-4444-555555555555"]
    subprocess.run([tool, "-q", "-t", "ext4", *label, "-d", tree, image, "16M"], check=True)
    return image


@pytest.mark.parametrize(
    ("root", "mode"),
    [
        ("root=/dev/vda", "ro"),
        ("root=LABEL=alpha rw", "rw"),
        ("root=UUID=11111111-2222-3333-4444-555555555555 rootfstype=ext4 rootflags=noatime", "ro"),
        ("root=/dev/vda init=/lib/init", "ro"),
    ],
)
def test_root_is_mounted_and_its_init_goes_on(files: Path, disk: Path, tmp_path: Path, root: str, mode: str) -> None:
    """A disk by its device, label or UUID: its init runs as the first process, with devices and the arguments."""
    device = {"type": "virtio-blk", "drive": {"file": shutil.copy(disk, tmp_path), "format": "raw"}}
    append = f"console=ttyS0 quiet panic=-1 no_timer_check {root} -- single"
    keys = {"kernel": files / "vmlinuz", "initrd": files / "initrd.img", "append": append, "memory": "256M"}
    with Machine(accel="tcg", devices=[device], **keys) as machine:  # type: ignore[arg-type]  # of several types
        machine.start()
        machine.console.expect("init of the disk: alpha, arguments: single", timeout=120)
        mount = machine.console.expect("dev is there", timeout=60)
        assert f" / ext4 {mode}," in mount
        assert ("noatime" in mount) == ("noatime" in root)
        assert machine.wait(60) == PoweredOff()


def test_root_may_be_a_shared_directory(files: Path, tree: Path) -> None:
    """With rootfstype=virtiofs, root= is the share's tag."""
    device = {"type": "virtio-fs", "path": str(tree), "tag": "alpha"}
    append = "console=ttyS0 quiet panic=-1 no_timer_check root=alpha rootfstype=virtiofs rw"
    keys = {"kernel": files / "vmlinuz", "initrd": files / "initrd.img", "append": append, "memory": "256M"}
    with Machine(accel="tcg", devices=[device], **keys) as machine:  # type: ignore[arg-type]  # of several types
        machine.start()
        machine.console.expect("init of the disk: alpha", timeout=120)
        machine.console.expect("alpha / virtiofs rw", timeout=60)
        assert machine.wait(60) == PoweredOff()


@pytest.mark.parametrize(
    ("root", "why"),
    [
        (
            "",
            "cardcage: no root= on the kernel's command line: expected root=/dev/vda, UUID=, LABEL=, or a share's tag",
        ),
        ("root=/dev/vdb", "cardcage: root=/dev/vdb did not appear; block devices here: vda"),
        ("root=/dev/vda rootfstype=vfat", "cardcage: root=/dev/vda cannot be mounted"),
    ],
)
def test_a_root_that_cannot_be_is_said(files: Path, disk: Path, root: str, why: str) -> None:
    """Without a root file system the reason is on the console, and the machine ends with the kernel's panic."""
    device = {"type": "virtio-blk", "drive": {"file": str(disk), "format": "raw"}, "readonly": True}
    append = f"console=ttyS0 quiet panic=-1 no_timer_check {root}"
    keys = {"kernel": files / "vmlinuz", "initrd": files / "initrd.img", "append": append, "memory": "256M"}
    with Machine(accel="tcg", devices=[device], **keys) as machine:  # type: ignore[arg-type]  # of several types
        machine.start()
        machine.console.expect(why, timeout=120)
        assert machine.wait(120) == Panicked("Attempted to kill init! exitcode=0x00000100")


def test_other_files_are_not_overwritten(kernel: Path, tmp_path: Path) -> None:
    """A file of that name with other contents is refused before anything is written, unless --force is given."""
    (tmp_path / "initrd.img").write_text("mine")
    done = cardcage("kernel", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.endswith("initrd.img: there is another file of this name: give --force to overwrite it\n")
    assert [one.name for one in tmp_path.iterdir()] == ["initrd.img"]
    assert cardcage("kernel", str(tmp_path), "--force").returncode == 0
    assert cardcage("kernel", str(tmp_path)).returncode == 0, "the same files again are no trouble"
    done = cardcage("kernel", str(tmp_path / "initrd.img"))
    assert done.returncode in (2, 70)
    assert "outcome: " in done.stderr.splitlines()[-1]
    assert "XDG_CACHE_HOME" not in done.stderr
