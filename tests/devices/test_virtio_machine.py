"""virtio devices in a whole machine, driven through its buses as a guest's driver would, without guest code."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from cardcage import ConfigError, Machine
from virtio_function import WINDOW, Function


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(b"".join(struct.pack("<Q", at) * 64 for at in range(2048)))
    return path


def machine(*devices: dict[str, Any], **keys: Any) -> Machine:
    return Machine(memory="32M", accel="tcg", devices=devices, **keys)


def test_a_disk_in_a_machine(disk: Path) -> None:
    """From configuration to sectors: the file's bytes come through BARs and rings, and INTx rises."""
    with machine({"type": "virtio-blk", "drive": {"file": str(disk), "format": "raw"}}) as vm:
        function = Function(vm, 0x1042)
        (driver,) = function.start(1)
        data = function.call(driver, 0, [struct.pack("<IIQ", 0, 0, 77)], [512, 1])
        assert data == struct.pack("<Q", 77) * 64 + b"\0"
        assert vm.devices["virtio-blk"].slot.interrupts.gsis[0] in (10, 11)


def test_every_device_fits_one_machine(tmp_path: Path, disk: Path) -> None:
    """All of them on one bus: distinct slots and BARs, each with its own id."""
    devices: list[dict[str, Any]] = [
        {"type": "virtio-blk", "drive": {"file": str(disk), "format": "raw"}},
        {"type": "virtio-net", "net": "null"},
        {"type": "virtio-rng"},
        {"type": "virtio-console", "char": "null", "ports": [{"char": "null", "name": "agent"}]},
        {"type": "virtio-balloon", "stats_interval": 1},
        {"type": "virtio-vsock", "cid": 3, "uds": str(tmp_path / "v")},
        {"type": "virtio-9p", "path": str(tmp_path)},
        {"type": "virtio-fs", "path": str(tmp_path), "address": "1f.0"},
    ]
    with machine(*devices) as vm:
        functions = [Function(vm, 0x1040 + id) for id in (2, 1, 4, 3, 5, 19, 9, 26)]
        assert functions[-1].slot == 0x1F
        assert len({function.bar for function in functions}) == 8
        (driver,) = functions[2].start(1)
        assert len(functions[2].call(driver, 0, [], [32])) == 32


def test_state_goes_through_text_into_another_machine(tmp_path: Path, disk: Path) -> None:
    """A machine's state, as JSON and back, continues each device in a second machine over the same memory."""
    from cardcage_snapshot.state import capture, dumps, loads, restore

    (tmp_path / "share").mkdir()
    devices: list[dict[str, Any]] = [
        {"type": "virtio-blk", "drive": {"file": str(disk), "format": "raw", "readonly": True}},
        {"type": "virtio-net", "net": "null"},
        {"type": "virtio-rng"},
        {"type": "virtio-console", "char": "null"},
        {"type": "virtio-balloon"},
        {"type": "virtio-9p", "path": str(tmp_path / "share")},
        {"type": "virtio-fs", "path": str(tmp_path / "share")},
        {"type": "virtio-rng-mmio", "address": 0xD0000000, "irq": 5},
    ]
    with machine(*devices) as vm:
        function = Function(vm, 0x1042)
        (driver,) = function.start(1)
        for at in range(20):
            assert function.call(driver, 0, [struct.pack("<IIQ", 0, 0, at)], [512, 1])[:8] == struct.pack("<Q", at)
        text, ram = dumps(capture(vm)), vm.memory.read(WINDOW, 1 << 20)
    with machine(*devices) as other:
        other.memory.write(WINDOW, ram)
        restore(other, loads(text))
        with other.lock:  # as a start does: nothing is served before
            for one in other.devices.values():
                if "pause" in one.abilities:
                    one.device.resume()
        again = Function(other, 0x1042, enable=False)
        assert again.read(0x14, 1) == 15
        driver.adopt(other.memory)
        for at in range(20):
            assert again.call(driver, 0, [struct.pack("<IIQ", 0, 0, at)], [512, 1])[:8] == struct.pack("<Q", at)


def test_a_device_without_pci(disk: Path) -> None:
    """The -mmio variant sits at a configured address and interrupt."""
    table = {"type": "virtio-blk-mmio", "drive": {"file": str(disk)}, "address": 0xD0000000, "irq": 5}
    with machine(table) as vm, vm.lock:
        assert vm.mmio.read(0xD0000000, 4) == 0x74726976
        assert vm.mmio.read(0xD0000008, 4) == 2


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"type": "virtio-blk"}, "drive"),
        ({"type": "virtio-rng", "max_bytes": 0}, "max_bytes"),
        ({"type": "virtio-vsock", "cid": 2, "uds": "x"}, "cid"),
        ({"type": "virtio-net", "net": "null", "mac": "zz"}, "mac"),
        ({"type": "virtio-9p", "path": "/nonexistent/x"}, "/nonexistent/x"),
        ({"type": "virtio-rng", "address": "77.0"}, "77.0"),
        ({"type": "vhost-user-blk", "socket": "/nonexistent/s"}, "memory.type"),
        ({"type": "virtio-rnd"}, "virtio-rng"),
    ],
)
def test_wrong_tables_are_refused_with_their_key(table: dict[str, Any], message: str) -> None:
    """Each mistake in a device's table ends in one line that names it."""
    with pytest.raises(ConfigError, match=message):
        machine(table)
