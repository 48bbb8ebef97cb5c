"""``query-pci``: what is on the PCI bus, as its configuration space says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict

from cardcage_qmp.session import Session

if TYPE_CHECKING:
    from cardcage.machine import Machine

__all__ = ["PciInfo", "query_pci"]

PciDeviceClass = TypedDict("PciDeviceClass", {"class": int})
PciDeviceId = TypedDict("PciDeviceId", {"device": int, "vendor": int, "subsystem": int, "subsystem-vendor": int})


class PciMemoryRegion(TypedDict):
    """A base address register that is decoded."""

    bar: int
    type: Literal["io", "memory"]
    address: int
    size: int
    prefetch: NotRequired[bool]
    mem_type_64: NotRequired[bool]


class PciDeviceInfo(TypedDict):
    """A function of the bus; ``irq_pin`` is 1 to 4 for INTA to INTD, 0 for none."""

    bus: int
    slot: int
    function: int
    class_info: PciDeviceClass
    id: PciDeviceId
    irq: NotRequired[int]
    irq_pin: int
    qdev_id: str
    regions: list[PciMemoryRegion]


class PciInfo(TypedDict):
    """A bus."""

    bus: int
    devices: list[PciDeviceInfo]


def query_pci(session: Session) -> list[PciInfo]:
    """The buses: one, or none where the machine has no PCI."""
    machine = session.machine
    with machine.lock:
        return [{"bus": 0, "devices": found}] if (found := functions(machine)) else []


def functions(machine: Machine) -> list[PciDeviceInfo]:
    """The functions of the machine's PCI bus, by their places. Under the machine's lock."""
    known = [one.device for one in machine.devices.values() if one.type == "pci-host"]
    return [_function(where, one) for host in known for where, one in sorted(host.functions.items())]


def _function(where: int, function: Any) -> PciDeviceInfo:
    def word(at: int, size: int = 2) -> int:
        return int.from_bytes(function.config[at : at + size], "little")

    found: PciDeviceInfo = {
        "bus": 0,
        "slot": where >> 3,
        "function": where & 7,
        "class_info": {"class": word(0x0A)},
        "id": {"vendor": word(0), "device": word(2), "subsystem-vendor": word(0x2C), "subsystem": word(0x2E)},
        "irq_pin": word(0x3D, 1),
        "qdev_id": function.slot.id,
        "regions": [],
    }
    if found["irq_pin"]:
        found["irq"] = word(0x3C, 1)
    for index, bar in sorted(function.bars.items()):
        if (address := function.mappings[index].address) is None:
            continue
        if bar.kind == "io":
            found["regions"].append({"bar": index, "type": "io", "address": address, "size": bar.size})
            continue
        found["regions"].append(
            {
                "bar": index,
                "type": "memory",
                "address": address,
                "size": bar.size,
                "prefetch": bar.prefetch,
                "mem_type_64": bar.kind == "memory64",
            }
        )
    return found
