"""SMBIOS tables against DSP0134, and as dmidecode reads them."""

from __future__ import annotations

import shutil
import struct
import subprocess
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
from cardcage.errors import ConfigError
from cardcage.memory import RamBlock, RamRange
from cardcage_pc.chips.fw_cfg import FwCfg, FwCfgOptions
from cardcage_pc.firmware.smbios import AREA, Smbios, SmbiosOptions
from pc_kit import Kit

if TYPE_CHECKING:
    from pathlib import Path

NAME = "12345678-9abc-def0-1122-334455667788"
OPTIONS = SmbiosOptions(product="Lab", serial="ds=nocloud", uuid=NAME, family="Lab")


def written(options: SmbiosOptions, kit: Kit) -> bytes:
    """The entry point that the device leaves in memory."""
    device = kit.plugged(Smbios(options))
    context: Any = SimpleNamespace(memory=kit.memory)
    device.contribute(context)
    return kit.memory.read(AREA, 31)


def test_the_entry_point_sums_to_zero_and_leads_to_the_tables() -> None:
    """Both sums are right, and walking the structures ends at type 127 after the number that is stated."""
    kit = Kit()
    anchor = written(OPTIONS, kit)
    assert (sum(anchor) & 0xFF, sum(anchor[16:]) & 0xFF, anchor[:4], anchor[16:21]) == (0, 0, b"_SM_", b"_DMI_")
    length, address, count = struct.unpack_from("<HIH", anchor, 22)
    data, at, types = kit.memory.read(address, length), 0, []
    while at < len(data):
        types.append(data[at])
        at = data.index(b"\0\0", at + data[at + 1]) + 2
    assert (types, count, at) == ([0, 1, 3, 32, 127], 5, length)


def test_firmware_gets_the_same_by_fw_cfg_and_its_rom_is_left_alone() -> None:
    """The files are set, the UUID item too; where a ROM shows nothing is written."""
    kit = Kit()
    rom = RamBlock(0x10000, "rom")
    kit.memory.add(RamRange(AREA, 0x10000, rom, 0, True, 10))
    card = kit.plugged(FwCfg(FwCfgOptions()))
    assert written(OPTIONS, kit) == bytes(31)
    assert card.items[2] == UUID(NAME).bytes
    assert b"ds=nocloud" in card.files["etc/smbios/smbios-tables"]
    assert card.files["etc/smbios/smbios-anchor"][:4] == b"_SM_"


def test_what_cannot_be_is_refused() -> None:
    """A UUID that is none, and text that SMBIOS cannot hold, are configuration errors."""
    with pytest.raises(ConfigError, match="is not a UUID"):
        Smbios(SmbiosOptions(uuid="abc"))
    with pytest.raises(ValueError, match="match"):
        SmbiosOptions(serial="a\0b")


@pytest.mark.skipif(shutil.which("dmidecode") is None, reason="needs dmidecode")
def test_dmidecode_reads_it(tmp_path: Path) -> None:
    """dmidecode prints the configured names without a complaint."""
    kit = Kit()
    written(OPTIONS, kit)
    # dmidecode's dump format: the entry point at 0 with the tables' address as an offset in the file
    anchor = bytearray(kit.memory.read(AREA, 32))
    length, address = struct.unpack_from("<HI", anchor, 22)
    struct.pack_into("<I", anchor, 24, 32)
    anchor[21] = 0
    anchor[21] = -sum(anchor[16:31]) & 0xFF
    anchor[4] = 0
    anchor[4] = -sum(anchor[:31]) & 0xFF
    (tmp_path / "dump").write_bytes(bytes(anchor) + kit.memory.read(address, length))
    run = subprocess.run(["dmidecode", "--from-dump", str(tmp_path / "dump")], capture_output=True, text=True)
    for line in ("Product Name: Lab", "Serial Number: ds=nocloud", f"UUID: {NAME}", "Family: Lab", "Status: No errors"):
        assert line in run.stdout, run.stdout + run.stderr
    assert run.stderr == ""
