"""ACPI tables: sums, pointers, the linker script, and AML that Intel's own disassembler and compiler accept."""

from __future__ import annotations

import shutil
import struct
import subprocess
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from cardcage.device import Mmio, Pio, Resource
from cardcage_pc.acpi import aml
from cardcage_pc.acpi import tables as acpi
from cardcage_pc.chips.fw_cfg import FwCfg, FwCfgOptions
from hypothesis import given, settings
from hypothesis import strategies as st
from pc_kit import Kit, KitMapping

if TYPE_CHECKING:
    from pathlib import Path

needs_iasl = pytest.mark.skipif(shutil.which("iasl") is None, reason="needs iasl (Debian: acpica-tools)")


class Bridge:
    """What a PCI host states."""

    bus_type = "pci"
    ecam = (0xE0000000, 1 << 20)
    windows = (("io", 0, 0xCF8), ("memory", 0xE0100000, 0x1000000), ("memory64", 1 << 38, 1 << 36))
    routing = tuple((slot, pin, 10 + (slot + pin) % 2) for slot in range(32) for pin in range(4))


def machine(*, irqchip: str = "split", pci: bool = True, resources: tuple[Resource, ...] = ()) -> Any:
    """A machine with a UART, an HPET, a wide region, and what else is asked for."""
    kit = Kit()
    kit.interrupts.irqchip = irqchip

    def plug(type: str, device: Any, mappings: list[Any], announced: tuple[Resource, ...]) -> None:
        slot = SimpleNamespace(ranges=SimpleNamespace(mappings=mappings, resources=list(announced)))
        kit.devices[type] = SimpleNamespace(device=device, slot=slot, type=type)

    if pci:
        plug("pci-host", Bridge(), [], ())
        plug("pci-hotplug", object(), [KitMapping(Pio(20), 0xAE00)], ())
    plug("isa-serial", object(), [KitMapping(Pio(8), 0x3F8)], (Resource("PNP0501", "COM", (4,)),))
    plug("i8042", object(), [KitMapping(Pio(1), 0x60)], (Resource("PNP0303", "KBD", (1,)), Resource("PNP0F13", "MOU")))
    plug("hpet", object(), [KitMapping(Mmio(0x400), 0xFED00000)], (Resource("PNP0103", "HPET"),))
    plug("lnro", object(), [KitMapping(Mmio(0x200), 0xFEB00000)], (Resource("LNRO0005", "VR00", (20,), level=True),))
    plug("big", object(), [KitMapping(Pio(0x400), 0x1000)], (Resource("TEST0001", "big!", memory=((1 << 33, 4096),)),))
    plug("fw_cfg", FwCfg(FwCfgOptions()), [], resources)
    return kit


def tables(blob: bytes) -> dict[str, bytes]:
    """The tables of a blob by signature, FACS aside."""
    found, at = {}, 64
    while at < len(blob):
        (length,) = struct.unpack_from("<I", blob, at + 4)
        found[blob[at : at + 4].decode()] = blob[at : at + length]
        at = (at + length + 15) & ~15
    return found


def rendered(kit: Kit, cpus: int) -> tuple[acpi.Blob, int, int]:
    """The tables of a machine."""
    return acpi.render(kit.board, cpus, kit.interrupts.irqchip)


def test_each_table_sums_to_zero_and_points_right() -> None:
    """RSDP, XSDT and RSDT lead to every table, each of which sums to zero."""
    base = 0xE0040
    blob, rsdt, xsdt = rendered(machine(), 2)
    data = blob.relocated(base)
    found = tables(data)
    assert list(found) == ["DSDT", "FACP", "APIC", "HPET", "MCFG", "RSDT", "XSDT"]
    assert all(sum(table) & 0xFF == 0 for table in found.values())
    root = acpi.rsdp(base + rsdt, base + xsdt)
    assert (sum(root) & 0xFF, sum(root[:20]) & 0xFF) == (0, 0)
    pointers = struct.unpack("<4Q", found["XSDT"][36:])
    assert pointers == struct.unpack("<4I", found["RSDT"][36:])
    assert [data[one - base : one - base + 4] for one in pointers] == [b"FACP", b"APIC", b"HPET", b"MCFG"]
    facs, dsdt = struct.unpack_from("<II", found["FACP"], 36)
    assert (data[facs - base : facs - base + 4], data[dsdt - base : dsdt - base + 4]) == (b"FACS", b"DSDT")
    assert (facs % 64, len(found["FACP"])) == (0, 244)


def test_madt_names_processors_and_overrides() -> None:
    """One local APIC a processor, one IOAPIC, interrupt 0 at input 2, level-triggered SCI and PCI lines."""
    blob, _, _ = rendered(machine(), 3)
    data, at, entries = tables(blob.relocated(0))["APIC"], 44, []
    while at < len(data):
        entries.append(data[at : at + data[at + 1]])
        at += data[at + 1]
    assert [one[0] for one in entries] == [0, 0, 0, 1, 2, 2, 2, 2, 4]
    assert [struct.unpack_from("<BIH", one, 3) for one in entries if one[0] == 2] == [
        (0, 2, 0),
        (9, 9, 0x0D),
        (10, 10, 0x0D),
        (11, 11, 0x0D),
    ]


def test_what_a_machine_lacks_is_not_described() -> None:
    """Without local APICs there is no MADT, without a PCI host no MCFG and no PCI root; the reset port follows."""
    blob, _, _ = rendered(machine(irqchip="none", pci=False), 1)
    found = tables(blob.relocated(0))
    assert list(found) == ["DSDT", "FACP", "HPET", "RSDT", "XSDT"]
    assert b"PCI0" not in found["DSDT"]
    assert struct.unpack_from("<Q", found["FACP"], 120) == (0x64,)


@needs_iasl
@pytest.mark.parametrize("pci", [True, False])
def test_iasl_takes_the_tables_apart_and_compiles_the_dsdt_again(tmp_path: Path, pci: bool) -> None:
    """Every table disassembles without a complaint, and the DSDT's source compiles without error or warning."""
    blob, _, _ = rendered(machine(pci=pci), 2)
    for signature, data in tables(blob.relocated(0xE0040)).items():
        (tmp_path / f"{signature}.aml").write_bytes(data)
        run = subprocess.run(["iasl", "-d", f"{signature}.aml"], cwd=tmp_path, capture_output=True, text=True)
        said = run.stdout + run.stderr
        assert run.returncode == 0, said
        assert "rror" not in said, said
        assert "Invalid" not in (tmp_path / f"{signature}.dsl").read_text()
    run = subprocess.run(["iasl", "-tc", "DSDT.dsl"], cwd=tmp_path, capture_output=True, text=True)
    assert "0 Errors, 0 Warnings" in run.stdout, run.stdout + run.stderr
    source = (tmp_path / "DSDT.dsl").read_text()
    for word in ("\\_S5", 'EisaId ("PNP0501")', '"LNRO0005"', "Device (COM1)", "Device (DEV1)", "Device (VR00)"):
        assert word in source
    for word in ("Device (PCI0)", "Device (SF8)", "Method (_E01, 0, NotSerialized)", "Notify (S10, Arg1)"):
        assert (word in source) == pci


def test_linker_script_gives_what_relocation_gives() -> None:
    """A firmware that follows the script ends with the tables that we would have written ourselves."""
    kit = machine()
    kit.plugged(acpi.Acpi(), "acpi")
    reserved: list[tuple[int, ...]] = []
    context: Any = SimpleNamespace(
        cpus=2, memory=kit.memory, rsdp=None, reserve=lambda *one: reserved.append(one), ram_below_4g=1, ram_above_4g=0
    )
    kit.devices["acpi"].device.contribute(context)
    files = kit.devices["fw_cfg"].device.files
    assert files["etc/e820"] == struct.pack("<QQI", *Bridge.ecam, 2)
    where = {"etc/acpi/rsdp": 0xF5000, "etc/acpi/tables": 0x7FE0000}
    loaded = {name: bytearray(files[name]) for name in where}
    script = files["etc/table-loader"]
    assert len(script) % 128 == 0
    for at in range(0, len(script), 128):
        entry = script[at : at + 128]
        kind, name = struct.unpack("<I56s", entry[:60])
        name = name.rstrip(b"\0").decode()
        if kind == 1:
            align, zone = struct.unpack_from("<IB", entry, 60)
            assert (name, align, zone) in ((("etc/acpi/rsdp"), 16, 2), (("etc/acpi/tables"), 64, 1))
        elif kind == 2:
            pointee, offset, size = struct.unpack_from("<56sIB", entry, 60)
            field = slice(offset, offset + size)
            value = int.from_bytes(loaded[name][field], "little") + where[pointee.rstrip(b"\0").decode()]
            loaded[name][field] = value.to_bytes(size, "little")
        else:
            offset, start, length = struct.unpack_from("<III", entry, 60)
            loaded[name][offset] = -sum(loaded[name][start : start + length]) & 0xFF
    blob, rsdt, xsdt = rendered(kit, 2)
    base = where["etc/acpi/tables"]
    assert bytes(loaded["etc/acpi/tables"]) == blob.relocated(base)
    assert bytes(loaded["etc/acpi/rsdp"]) == acpi.rsdp(base + rsdt, base + xsdt)
    assert (context.rsdp, kit.memory.read(0xE0000, 8), reserved) == (0xE0000, b"RSD PTR ", [Bridge.ecam])


@needs_iasl
@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.builds(
            Resource,
            hid=st.from_regex(r"[A-Z]{3}[0-9A-F]{4}|[A-Z]{4}[0-9A-F]{4}", fullmatch=True),
            name=st.text(max_size=6),
            irqs=st.lists(st.integers(3, 23), max_size=3, unique=True).map(tuple),
            level=st.booleans(),
            io=st.lists(st.tuples(st.integers(0, 0xEFFF), st.integers(1, 0x1000)), max_size=2).map(tuple),
            memory=st.lists(st.tuples(st.integers(0, 1 << 36), st.integers(1, 1 << 33)), max_size=2).map(tuple),
        ),
        max_size=30,
    )
)
def test_any_announcement_gives_a_sound_dsdt(
    tmp_path_factory: pytest.TempPathFactory, resources: list[Resource]
) -> None:
    """Whatever devices announce, names stay unique and iasl finds no fault in the encoding."""
    blob, _, _ = rendered(machine(resources=tuple(resources)), 1)
    folder = tmp_path_factory.mktemp("aml")
    (folder / "DSDT.aml").write_bytes(tables(blob.relocated(0))["DSDT"])
    run = subprocess.run(["iasl", "-d", "DSDT.aml"], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "rror" not in run.stdout + run.stderr, run.stdout + run.stderr


def test_encodings_of_the_specification() -> None:
    """Package lengths, names, integers and compressed ids are those of ACPI 6.4."""
    assert aml.integer(0x1234) == b"\x0b\x34\x12"
    assert aml.hardware_id("PNP0A03") == b"\x0c\x41\xd0\x0a\x03"
    assert aml.path("\\_SB.PCI0.ISA") == b"\\\x2f\x03_SB_PCI0ISA_"
    assert aml.buffer(bytes(100))[:4] == b"\x11\x48\x06\x0a"
    assert aml.scope("\\", aml.name("X", aml.integer(1))) == b"\x10\x09\\\x00\x08X___\x01"
    with pytest.raises(ValueError, match="is not an ACPI name"):
        aml.path("bad-name")


def test_tables_are_rendered_when_what_they_say_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A boot renders tables anew only after a device was announced, a range moved or the processors changed."""
    kit = machine(pci=False)
    kit.plugged(acpi.Acpi(), "acpi")
    calls: list[int] = []
    render = acpi.render
    monkeypatch.setattr(acpi, "render", lambda *given: (calls.append(given[1]), render(*given))[1])

    def boot(cpus: int = 2) -> int:
        context: Any = SimpleNamespace(cpus=cpus, memory=kit.memory, rsdp=None, reserve=lambda *one: None)
        kit.devices["acpi"].device.contribute(context)
        return len(calls)

    assert [boot(), boot(), boot()] == [1, 1, 1]
    kit.devices["isa-serial"].slot.ranges.mappings[0].move(0x2F8)
    assert [boot(), boot()] == [2, 2]
    kit.devices["big"].slot.ranges.resources.append(Resource("TEST0002", "more"))
    assert [boot(), boot()] == [3, 3]
    assert [boot(cpus=3), boot(cpus=3)] == [4, 4]
