"""``-machine microvm``: the board and its virtio devices, as a configuration."""

from __future__ import annotations

from typing import Any

import pytest
from cardcage.errors import ConfigError
from cardcage_qemu import translate

WORDS = "-kernel k -append quiet -drive file=a,if=virtio -netdev user,id=n"
RNG, NET = "-device virtio-rng-device", "-device virtio-net,netdev=n"


def config(machine: str, words: str = "", before: str = WORDS) -> dict[str, Any]:
    return translate(f"{before} -machine {machine} {words}".split()).config()


def places(found: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(one["type"], one.get("address"), one.get("irq")) for one in found["device"] if one["type"] != "microvm"]


def test_virtio_devices_are_on_mmio() -> None:
    """Virtio devices are on MMIO, each at a place of its own, unless there is a PCI bus and they are not named so."""
    found = config("microvm", f"{RNG} {NET}")
    assert found["machine"]["platform"] == "microvm"
    assert found["boot"]["append"] == "quiet"
    assert places(found) == [
        ("virtio-blk-mmio", 0xFEB00000, 16),
        ("virtio-rng-mmio", 0xFEB00200, 17),
        ("virtio-net-mmio", 0xFEB00400, 18),
    ]
    assert places(config("microvm,pcie=on", f"{RNG} {NET}")) == [
        ("virtio-blk", None, None),
        ("virtio-rng-mmio", 0xFEB00000, 16),
        ("virtio-net", None, None),
    ]


def test_without_acpi_the_kernel_is_told() -> None:
    """Without ACPI the command line names each device, unless auto-kernel-cmdline=off, at interrupts that ISA has."""
    told = "virtio_mmio.device=512@0xfeb00000:5 virtio_mmio.device=512@0xfeb00200:6"
    found = config("microvm,acpi=off", RNG)
    assert found["boot"]["append"] == f"quiet {told}"
    assert {"type": "microvm", "acpi": False} in found["device"]
    assert config("microvm,acpi=off,auto-kernel-cmdline=off", RNG)["boot"]["append"] == "quiet"
    assert "append" not in config("microvm,acpi=off", before="-kernel k")["boot"]


def test_the_parts_of_the_board() -> None:
    """Properties become options of the device microvm, in whatever option of the command line they stand."""
    found = config("pit=off,pic=off,rtc=auto,isa-serial=off,ioapic2=on", "-M microvm,x-option-roms=off -nographic")
    (board,) = (one for one in found["device"] if one["type"] == "microvm")
    assert board == {"type": "microvm", "pit": False, "pic": False, "serial": False}
    assert not [one for one in found["device"] if one["type"] == "isa-serial"]
    assert found["machine"]["console"] == "none"


@pytest.mark.parametrize(
    ("machine", "words", "said"),
    [
        ("microvm", "-device i6300esb", "no PCI bus"),
        ("microvm", "-device virtio-rng-pci", "no PCI bus"),
        ("microvm", "-device virtio-rng-device,bus=pci.0", "virtio-mmio-bus.N"),
        ("microvm", "-device virtio-gpu-device", "no such device"),
        ("microvm", " ".join([RNG] * 24), "room for 24"),
        ("microvm", "-bios b", "by itself"),
        ("microvm", "-pflash b", "by itself"),
        ("microvm,isa-serial=off", "-serial stdio", "no port"),
        ("microvm,isa-serial=off", "-device isa-serial", "no port"),
        ("microvm,dtb=x", "", "no such thing"),
    ],
)
def test_what_the_board_has_not_is_refused(machine: str, words: str, said: str) -> None:
    """One line names the option."""
    with pytest.raises(ConfigError, match=said) as caught:
        config(machine, words)
    assert str(caught.value).startswith("-")
    with pytest.raises(ConfigError, match="say -kernel"):
        config("microvm", before="")
