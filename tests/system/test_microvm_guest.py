"""``cardcage-qemu -machine microvm`` with a real guest: its devices are virtio over MMIO, and ACPI tells of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from cardcage_boot.fetch import Shelf
from test_qemu_guest import PROGRAM, conversation

ASKED = "; ".join(
    """ls /sys/bus/pci/devices; cat /sys/block/vda/size /sys/block/vda/serial; echo
cat /sys/class/misc/hw_random/rng_current; cat /sys/class/virtio-ports/*/name; cat /sys/class/net/*/address
modprobe 9pnet_virtio; mkdir -p /s; mount -t 9p -o trans=virtio,version=9p2000.L share /s; cat /s/file; cd /
dd if=/dev/vda bs=512 count=1 skip=1 2>/dev/null | head -c 7; echo changed > /dev/vda; sync; head -c 8 /dev/vda
ls -d /sys/bus/platform/devices/LNRO0005:*/virtio* | wc -l""".splitlines()
)
WORDS = """-m 256M -kernel {kernel} -initrd {initrd} -drive file={folder}/disk.img,if=none,id=d,format=raw
    -device virtio-blk-device,drive=d,serial=S1 -object rng-random,id=r,filename=/dev/urandom
    -device virtio-rng-device,rng=r -device virtio-serial-device -chardev null,id=c
    -device virtserialport,chardev=c,name=org.example -device virtio-balloon-device
    -netdev dgram,id=n,local.type=unix,local.path={folder}/a,remote.type=unix,remote.path={folder}/b
    -device virtio-net-device,netdev=n,mac=52:54:00:01:02:03
    -fsdev local,id=f,path={folder}/share,security_model=none -device virtio-9p-device,fsdev=f,mount_tag=share
    -nodefaults -display none -vga none -serial stdio -monitor none -no-reboot"""


@pytest.fixture
def words(generic: Path, tmp_path: Path) -> list[str]:
    """Disk, entropy, serial port, balloon, network and a share; Debian's generic kernel has 9p."""
    shelf = Shelf(generic / "cardcage", lambda what, percent: None, lambda line: None, ("linux-image-amd64",))
    kernel = shelf.kernel()
    (tmp_path / "share").mkdir()
    (tmp_path / "share" / "file").write_text("shared\n")
    (tmp_path / "disk.img").write_bytes(bytes(512) + b"second\n".ljust(1 << 20, b"\0"))
    text = WORDS.format(kernel=kernel.path, initrd=shelf.initramfs(kernel), folder=tmp_path)
    return [*text.split(), "-append", "console=ttyS0 panic=-1 no_timer_check quiet"]


@pytest.mark.parametrize("board", ["", ",pit=off,pic=off,rtc=off,kernel-irqchip=split", ",pcie=on"])
def test_devices_without_a_bus(words: list[str], board: str) -> None:
    """Each device is found and works, also without PIT, PIC and clock, and beside a PCI bus."""
    said = conversation([*PROGRAM, "-machine", f"microvm,accel=tcg{board}", "-cpu", "max", *words], ASKED)
    found = ["2049", "S1", "virtio_rng.0", "org.example", "52:54:00:01:02:03", "00:00:00:00:00:00", "shared", "second"]
    bridge = ["0000:00:00.0"] if "pcie" in board else []
    assert said == [*bridge, *found, "changed", "6"]
