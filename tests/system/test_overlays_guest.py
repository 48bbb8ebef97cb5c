"""Overlays of a disk that come and go under Linux, while it works on that disk."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from cardcage_agent import Machine
from cardcage_block.make import create_raw
from qmp_kit import Client

pytestmark = [pytest.mark.usefixtures("kernel"), pytest.mark.once]
MIB = 1 << 20
ROUNDS = 30 if os.environ.get("CARDCAGE_LONG_TESTS") else 3
LOAD = """cd /tmp; dd if=/dev/urandom of=want bs=1M count=4 2>/dev/null
at=0
while test -e /tmp/go; do
    dd if=want of=/dev/vda bs=16k seek=$((at * 16)) oflag=direct conv=notrunc 2>/tmp/said || exit 1
    dd if=/dev/vda of=got bs=16k skip=$((at * 16)) count=256 iflag=direct 2>/tmp/said || exit 2
    cmp want got || exit 3
    at=$(((at + 1) % 12)); echo >> /tmp/rounds
done"""
WAIT = "i=0; until {0}; do i=$((i+1)); test $i -lt 1200 || exit 1; usleep 50000; done; "


@pytest.mark.timeout(3600)
def test_a_disk_under_load_stands_on_overlays(tmp_path: Path) -> None:
    """Again and again an overlay is put on the disk that the guest works on, and merged: no request is lost, what was
    written is read, the kernel complains of nothing, and the image has at the end what the guest sees."""
    create_raw(str(tmp_path / "base.raw"), 16 * MIB)
    devices = [
        {"type": "virtio-blk", "id": "d", "drive": {"file": f"{tmp_path}/base.raw", "format": "raw"}},
        {"type": "qmp", "socket": f"unix:{tmp_path}/qmp"},
    ]
    with Machine.debian(memory="256M", accel="tcg", name="over", devices=devices, cpus=2) as vm:
        vm.start()
        vm.agent.wait(timeout=200)
        vm.run(WAIT.format("test -e /dev/vda") + "touch /tmp/go", check=True)
        load = vm.popen(LOAD)
        with Client(tmp_path / "qmp") as peer:
            for at in range(ROUNDS):
                vm.run(f"n=$(cat /tmp/rounds 2>/dev/null | wc -l); {WAIT.format('test $(wc -l < /tmp/rounds) -gt $n')}")
                over = f"{tmp_path}/over{at}"
                assert peer.ask("blockdev-snapshot-sync", device="d", snapshot_file=over) == {"return": {}}
                vm.run(f"n=$(wc -l < /tmp/rounds); {WAIT.format('test $(wc -l < /tmp/rounds) -gt $n')}", check=True)
                assert peer.ask("block-commit", device="d") == {"return": {}}
                assert peer.event("BLOCK_JOB_READY")
                assert peer.ask("job-complete", id="d") == {"return": {}}
                assert "error" not in peer.event("BLOCK_JOB_COMPLETED")["data"]
                while peer.event("JOB_STATUS_CHANGE")["data"] != {"id": "d", "status": "null"}:
                    pass
                os.unlink(over)
                assert load.poll() is None
        vm.run("rm /tmp/go", check=True)
        assert load.wait(timeout=120) == 0
        complaints = "dmesg -r | grep -E '^<[0-4]>' | grep -v -E 'random|hrtimer: interrupt took|clocksource'"
        assert vm.run(complaints, text=True).stdout == ""
        said = vm.run("sync; md5sum < /dev/vda", text=True, check=True).stdout.split()[0]
    assert hashlib.md5((tmp_path / "base.raw").read_bytes(), usedforsecurity=False).hexdigest() == said
