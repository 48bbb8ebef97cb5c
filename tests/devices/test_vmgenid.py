"""The generation of a machine: where the guest finds it, when it is another, and who is told."""

from __future__ import annotations

import shutil
import subprocess
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cardcage import Machine
from cardcage.device import Mmio
from cardcage.errors import ConfigError
from cardcage_pc.acpi import aml
from cardcage_snapshot.testing import check_snapshot
from cardcage_testing import check_device
from cardcage_vmgenid.vmgenid import GPE, OFFSET, VmGenId, VmGenIdOptions, VmGenIdState
from pc_kit import Kit, KitMapping
from qmp_kit import Client

REGION = Mmio(0x1000, 0xFEDA0000)
GUID = "00112233-4455-6677-8899-aabbccddeeff"
BYTES = bytes.fromhex("33221100 5544 7766 8899aabbccddeeff")


class Events:
    """A device that raises general-purpose events."""

    def __init__(self) -> None:
        self.raised: list[int] = []

    def read(self, offset: int, size: int, /) -> int:
        return 0

    def write(self, offset: int, size: int, value: int, /) -> None: ...

    def general_event(self, number: int) -> None:
        self.raised.append(number)


@pytest.fixture
def kit() -> Any:
    """A board with events."""
    made: Any = Kit()
    made.ranges.mappings = [KitMapping(REGION, REGION.base)]
    made.devices["events"] = SimpleNamespace(device=Events(), slot=Kit(), type="events")
    return made


def plugged(kit: Any, guid: str = GUID) -> VmGenId:
    device: VmGenId = kit.plugged(VmGenId(VmGenIdOptions(guid)), "vmgenid")
    return device


def test_the_guest_finds_it(kit: Any) -> None:
    """The page has the identifier in the order of memory where ACPI says, and zeros; nothing of it can be written."""
    device = plugged(kit)
    page = b"".join(device.read(at, 8).to_bytes(8, "little") for at in range(0, 0x1000, 8))
    assert page == bytes(OFFSET) + BYTES + bytes(0x1000 - OFFSET - 16)
    device.write(OFFSET, 8, 0)
    assert device.read(OFFSET, 8).to_bytes(8, "little") == BYTES[:8]
    (resource,) = kit.ranges.resources
    address = aml.package(aml.integer(0xFEDA0000 + OFFSET), aml.integer(0))
    assert aml.name("ADDR", address) in resource.extra


def test_it_is_another_when_the_guest_is_at_another_point(kit: Any) -> None:
    """A fork and a way back give each a random identifier, and raise the event; a saved state keeps it."""
    device, seen = plugged(kit), {GUID}
    for act in (device.forked, device.reverted, device.forked):
        act()
        seen.add(str(device.guid))
    assert len(seen) == 4
    (events,) = (one.device for one in kit.board.devices.values() if isinstance(one.device, Events))
    assert events.raised == [GPE] * 3
    other = VmGenId(VmGenIdOptions())
    other.load(device.save())
    assert other.guid == device.guid != VmGenId(VmGenIdOptions()).guid
    with pytest.raises(ConfigError, match="an identifier of 1 bytes: expected 16"):
        other.load(VmGenIdState("00"))


def test_contracts() -> None:
    """It keeps the contracts of devices, and is saved and loaded."""
    check_device(lambda: VmGenId(VmGenIdOptions(GUID)), REGION)
    check_snapshot(lambda: VmGenId(VmGenIdOptions(GUID)), REGION, points=5)


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    """A second one, and text that is no GUID, are refused by their place."""
    with pytest.raises(ConfigError, match=r'guid: expected "auto" or a GUID, got "x"'):
        Machine(accel="tcg", memory="4M", devices=[{"type": "vmgenid", "guid": "x"}])
    with pytest.raises(ConfigError, match="there is one already: a machine has one generation"):
        Machine(
            accel="tcg",
            memory="4M",
            devices=[{"type": "vmgenid"}, {"type": "vmgenid", "id": "b", "address": [0xFEDB0000]}],
        )


def test_qmp_tells_it(tmp_path: Path) -> None:
    """``query-vm-generation-id`` has the identifier, as QEMU's, or says that there is no device."""
    for devices, key in (([], "error"), ([{"type": "vmgenid", "guid": GUID}], "return")):
        monitor = {"type": "qmp", "socket": f"unix:{tmp_path}/qmp"}
        with Machine(accel="tcg", memory="4M", devices=[*devices, monitor]) as vm:
            vm.start()
            with Client(tmp_path / "qmp") as peer:
                said = peer.ask("query-vm-generation-id")[key]
        assert said == {"guid": str(uuid.UUID(GUID))} or said["desc"] == "VM Generation ID device not found"


@pytest.mark.skipif(shutil.which("iasl") is None, reason="needs iasl (Debian: acpica-tools)")
def test_iasl_takes_its_terms(tmp_path: Path, kit: Any) -> None:
    """ACPICA's compiler takes the device's terms apart: the event's method outside of it too."""
    from cardcage_pc.acpi.tables import Blob, dsdt

    plugged(kit)
    blob = Blob()
    blob.table("DSDT", 2, dsdt(kit.board))
    (tmp_path / "dsdt.aml").write_bytes(blob.relocated(0))
    subprocess.run(["iasl", "-d", "dsdt.aml"], cwd=tmp_path, check=True, capture_output=True)
    source = (tmp_path / "dsdt.dsl").read_text()
    run = subprocess.run(["iasl", "-tc", "dsdt.dsl"], cwd=tmp_path, capture_output=True, text=True)
    assert "0 Errors, 0 Warnings" in run.stdout, run.stdout + run.stderr
    for word in ('"VM_Gen_Counter"', f"Method (_E{GPE:02X}, 0, NotSerialized)", "Notify (\\_SB.VGEN, 0x80)"):
        assert word in source
