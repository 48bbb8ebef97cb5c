"""Which devices the platform gives a machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cardcage.config import Draft
from cardcage.registry import Registry
from cardcage_pc import cardcage_register
from cardcage_pc.platform import expand


def types(*devices: dict[str, Any], **machine: Any) -> list[str]:
    return [one["type"] for one in expand(Draft.of({"machine": machine, "device": list(devices)}).config())]


def serial(*devices: dict[str, Any]) -> list[dict[str, Any]]:
    tables = expand(Draft.of({"device": list(devices)}).config())
    return [one for one in tables if one["type"] == "isa-serial"]


def test_the_default_pc() -> None:
    """A PC has interrupt controllers, timers, a clock, i8042, the firmware interface, PCI and one serial port."""
    assert set(types()) == {
        *("pic", "ioapic", "pit", "rtc", "hpet", "i8042", "acpi-pm", "fw_cfg", "port80", "pvpanic", "pci-host"),
        *("pci-hotplug",),
        *("i440fx", "isa-serial", "acpi", "smbios", "bios-data"),
    }


@pytest.mark.parametrize(("irqchip", "gone"), [("full", {"pic", "ioapic", "pit", "hpet"}), ("none", {"ioapic"})])
def test_what_steps_aside(irqchip: str, gone: set[str]) -> None:
    """What the accelerator has itself, and what needs local APICs that it lacks, is left out."""
    assert set(types()) - set(types(irqchip=irqchip)) == gone


def test_configured_types_are_left_to_the_configuration() -> None:
    """A device that the user configures takes the place of the default one."""
    assert "rtc" not in types({"type": "rtc", "base": "localtime"})
    assert types().count("acpi") == 1


def test_the_console_port() -> None:
    """COM1 has the console, unless a device is configured there or takes the console."""
    assert serial() == [{"type": "isa-serial", "port": 0x3F8, "irq": 4, "char": "console"}]
    assert serial({"type": "isa-serial", "port": 0x2F8}) == serial()
    assert serial({"type": "isa-serial"}) == []
    (port,) = serial({"type": "isa-serial", "port": 0x2F8, "char": "console"})
    assert port["char"] == "null"


def test_the_documentation_names_every_device_and_back_end() -> None:
    """Each name that the card registers has its row in docs/pc.md."""
    registry = Registry()
    cardcage_register(registry)
    text = (Path(__file__).parents[2] / "docs" / "pc.md").read_text()
    for offer in registry:
        if offer.kind in ("device", "backend"):
            assert f"| `{offer.name.removeprefix('char:')}` |" in text


def test_every_reference_can_be_imported() -> None:
    """Factories, options and shorthands that are registered lazily exist."""
    registry = Registry()
    cardcage_register(registry)
    for offer in registry:
        offer.load()
        offer.load_options()
        offer.load_shorthand()
