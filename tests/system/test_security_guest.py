"""The default policy around real guests: nothing that Linux does is denied, and a disk is taken away and given back."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cardcage.config import Draft
from cardcage.errors import HostError
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage_boot import cpio
from cardcage_boot.cache import cache_root
from cardcage_boot.command import COMMAND_LINE
from cardcage_boot.fetch import Shelf
from cardcage_selinux.card import DEFAULT
from installed import PROGRAM


@pytest.fixture(scope="module")
def shelf() -> Shelf:
    """The distribution's kernel, from the cache or fetched; the tests are skipped where it cannot be had."""
    made = Shelf(cache_root(), lambda what, percent: None, lambda line: None)
    try:
        made.kernel()
    except HostError as error:
        pytest.skip(str(error))
    return made


@pytest.mark.once
def test_linux_on_every_device_is_denied_nothing(tmp_path: Path, shelf: Shelf) -> None:
    """Under the default policy Linux probes and uses the devices, and the log has no denial."""
    (tmp_path / "d").touch()
    os.truncate(tmp_path / "d", 8 << 20)
    arguments = ["--share", str(tmp_path), "--vsock", f"5,uds={tmp_path}/v", "--net", "null"]
    arguments += ["--drive", f"{tmp_path}/d,format=raw", "--device", "virtio-rng", "--device", "virtio-balloon"]
    arguments += ["--device", "virtio-console,char=null", "--device", "virtio-rng-mmio,address=0xd0000000,irq=5"]
    script = "dd if=/dev/urandom of=/dev/vda bs=1M count=4 conv=fsync 2>/dev/null; ls /sys/bus/virtio/drivers/*/virtio*"
    command = [*PROGRAM, "boot", "--accel", "tcg", "--timeout", "250", "--security", "default", *arguments]
    state = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")}
    done = subprocess.run([*command, "--exec", script], capture_output=True, check=False, text=True, env=state)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "avc:" not in done.stderr
    assert any((tmp_path / "d").read_bytes()[: 4 << 20])


@pytest.mark.once
def test_a_disk_is_revoked_and_restored_under_a_guest(tmp_path: Path, shelf: Shelf) -> None:
    """A policy without the right to images takes a running guest's disk away; with it the guest reads on."""
    disk, policy, initrd = tmp_path / "d", tmp_path / "policy.cil", tmp_path / "initrd"
    disk.write_bytes(bytes(8 << 20))
    policy.write_text(DEFAULT.read_text())
    kernel = shelf.kernel()
    loop = (
        "while :; do echo 3 > /proc/sys/vm/drop_caches; "
        "dd if=/dev/vda of=/dev/null bs=4k count=1 2>/dev/null && echo disk-reads || echo disk-fails; done > /dev/ttyS0"
    )
    base = shelf.initramfs(kernel).read_bytes()
    files = [cpio.file("cardcage/settings", b"token=x\n"), cpio.file("cardcage/exec", loop.encode() + b"\n")]
    initrd.write_bytes(base + bytes(-len(base) % 4) + cpio.pack(files))
    spec = {"type": "selinux", "policy": [str(policy)], "audit": str(tmp_path / "log"), "state": str(tmp_path / "s")}
    devices = [
        {"type": "isa-serial", "port": 0x3F8, "irq": 4, "char": "console"},
        {"type": "isa-serial", "port": 0x2F8, "irq": 3, "char": "null"},
        {"type": "virtio-blk", "drive": {"file": str(disk), "format": "raw"}},
    ]
    security = Draft.of({"security": [spec]}).config().security
    with Host(security=security) as host:
        card: Any = host.mediator.checkers[0]
        start = {"kernel": str(kernel.path), "initrd": str(initrd), "append": COMMAND_LINE}
        with Machine(host=host, memory="256M", accel="tcg", devices=devices, **start) as vm:  # type: ignore[arg-type]  # keys of the boot table
            vm.start()
            vm.console.expect("disk-reads", timeout=200)
            policy.write_text(DEFAULT.read_text().replace("(allow disk_t svirt_image_t", "; (allow"))
            card.reload()
            vm.console.expect("disk-fails", timeout=100)
            policy.write_text(DEFAULT.read_text())
            card.reload()
            vm.console.expect("disk-reads", timeout=100)
            assert vm.state == "running"
    assert "tclass=image permissive=0" in (tmp_path / "log").read_text()
