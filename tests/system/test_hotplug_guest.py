"""PCI devices that come and go under Linux, while it works on a disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cardcage_agent import Machine
from leftovers import Leftovers

pytestmark = pytest.mark.usefixtures("kernel")
MIB = 1 << 20
ROUNDS = 100 if os.environ.get("CARDCAGE_LONG_TESTS") else 10
LOAD = """cd /tmp; dd if=/dev/urandom of=want bs=1M count=4 2>/dev/null
while test -e /tmp/go; do
    dd if=want of=/dev/vda bs=64k oflag=direct 2>/tmp/said || exit 1
    dd if=/dev/vda of=got bs=64k count=64 iflag=direct 2>/tmp/said || exit 2
    cmp want got || exit 3
    echo >> /tmp/rounds
done"""
WAIT = "i=0; until test -e {0}; do i=$((i+1)); test $i -lt 600 || exit 1; usleep 50000; done; "


@pytest.mark.timeout(3600)
def test_disks_networks_and_a_strangers_card_under_load(tmp_path: Path) -> None:
    """Each serves the guest when it came and is gone when it went, again and again: the disk that the guest works on
    loses no request, the kernel complains of nothing, and the host is left with no descriptor more."""
    pytest.importorskip("virtio_card")
    base, spare = tmp_path / "base.img", tmp_path / "spare.img"
    for path in (base, spare):
        path.touch()
        os.truncate(path, 16 * MIB)
    devices = [
        {"type": "virtio-blk", "drive": {"file": str(base), "format": "raw"}},
        {"type": "virtio-net", "net": "null"},
    ]
    with Machine.debian(memory="256M", accel="tcg", name="hot", devices=devices, cpus=2) as vm:
        vm.start()
        vm.agent.wait(timeout=200)
        first = WAIT.format("/sys/block/vda") + WAIT.format("/dev/vda") + WAIT.format("/sys/class/net/eth0")
        vm.run(f"{first}touch /tmp/go", check=True)  # a card that came before the first one's driver would be eth0
        load = vm.popen(LOAD)
        left = Leftovers()
        for at in range(ROUNDS):
            disk = vm.add("virtio-blk", drive={"file": str(spare), "format": "raw"}).id
            net = vm.add("virtio-net", net="null").id
            numbers = vm.add("number-disk").id
            said = vm.run(
                WAIT.format("/sys/class/net/eth1")
                + WAIT.format("/dev/vdb")
                + WAIT.format("/dev/vdc")
                + f"echo round {at} | dd of=/dev/vdb bs=512 conv=sync,notrunc oflag=direct 2>/dev/null; "
                "ip link set eth1 up; cat /sys/class/net/eth1/operstate; cat /dev/vdc | head -c 16 | od -An -tx1",
                text=True,
                timeout=120,
            )
            assert said.returncode == 0, said
            for one in (disk, net, numbers):
                vm.remove(one, timeout=120)
            assert spare.read_bytes()[:16].startswith(f"round {at}\n".encode())
            assert load.poll() is None, vm.run("cat /tmp/said; dmesg | tail -30; df; free", text=True).stdout
            gone = vm.run("ls /sys/block /sys/class/net; ls /sys/bus/pci/devices | wc -l", text=True).stdout
            assert "vdb" not in gone
            assert "eth1" not in gone
            if at == 0:
                left = Leftovers()
        assert left() == []
        vm.run("rm /tmp/go", check=True)
        ended = load.wait(timeout=120)
        assert ended == 0, vm.run("cat /tmp/said; dmesg | tail -30; df; free", text=True).stdout
        assert int(vm.run("wc -l < /tmp/rounds", text=True).stdout) > 1
        assert (
            vm.run(
                "dmesg -r | grep -E '^<[0-4]>' | grep -v -E 'random|hrtimer: interrupt took|clocksource'", text=True
            ).stdout
            == ""
        )
