"""``-device``: QEMU's device and its properties as a ``[[device]]`` table."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from cardcage.errors import near
from cardcage_qmp.names import DEVICES, ON_PCI

from cardcage_qemu import backends
from cardcage_qemu.board import wire_of

if TYPE_CHECKING:
    from cardcage_qemu.keyval import Options
    from cardcage_qemu.line import Line

__all__ = ["add_device", "add_port"]

SAME = {"virtio-blk": "virtio-blk-pci", "virtio-net": "virtio-net-pci", "virtio-rng": "virtio-rng-pci"}
SAME |= {"virtio-serial": "virtio-serial-pci", "virtio-balloon": "virtio-balloon-pci", "virtio-9p": "virtio-9p-pci"}
SLOT = re.compile(r"(0x)?([0-9a-fA-F]{1,2})(\.(?:0x)?([0-7]))?")
QUIET = {
    "disable-legacy": "on off",
    "disable-modern": "off",
    "multifunction": "on off",
    "iommu_platform": "off",
    "ats": "off",
    "bootindex": "",
    "romfile": "",
    "rombar": "0 1",
    "vectors": "",
    "scsi": "off",
    "write-cache": "on auto",
    "config-wce": "",
    "event_idx": "on",
    "ioeventfd": "",
    "mq": "on off",
    "share-rw": "off",
    "max_ports": "",
    "wakeup": "",
    "cache-size": "0",
}
"""Properties that change nothing here at these values (any, where there are none)."""


def add_device(line: Line, options: Options) -> None:
    """Add the device, or a port to one. Raises ConfigError."""
    name = options.need("driver", "type", "")
    full = SAME.get(name, name).removesuffix("-non-transitional").removesuffix("-transitional")
    known = DEVICES.get(full)
    if known is None:
        hint = near(full, DEVICES) or " -device help lists what there is."
        raise options.error(f"{name}: cardcage has no such device.{hint}")
    if full in ("virtserialport", "virtconsole"):
        add_port(line, options, full)
        return
    wire = wire_of(name, full)
    if wire == "mmio":
        full = full.removesuffix("-device") + "-pci"
        known = DEVICES[full]
    device: dict[str, Any] = {"type": known.type}
    if id := options.take("id"):
        device["id"] = id
    if wire == "mmio":
        if (bus := options.take("bus")) is not None and not bus.startswith("virtio-mmio-bus."):
            raise options.error(f"bus={bus}: expected virtio-mmio-bus.N, any of which is as good as another")
    elif known.parent in ON_PCI:
        _place(options, device)
    if wire:
        line.wires.append((options, device, wire))
    for key, values in QUIET.items():
        if key not in known.options:
            options.harmless(**{key: values})
    label = _links(line, options, full, device)
    for property, key in known.options.items():
        if key in device and property in ("rx_queue_size", "tx_queue_size"):
            if options.number(property) not in (None, device[key]):
                raise options.error("rx_queue_size, tx_queue_size: cardcage has one size for both")
            continue
        if known.types.get(property) == "bool":
            value: Any = options.truth(property)
        elif known.types.get(property) == "uint32":
            value = options.number(property)
        else:
            value = options.take(property)
        if value is not None:
            device[key] = value
    if full == "i6300esb":
        line.watchdogs.append(device)
    if full == "isa-serial":
        index = options.number("index")
        line.serial_port(device, index)
    options.end()
    if full == "virtio-serial-pci":
        line.serial_bus(id or f"virtio-serial{len(line.buses)}", device)
        return
    if label is not None:
        device.setdefault("id", label)
        line.names[device["id"]] = label
    line.devices.append(device)


def _place(options: Options, device: dict[str, Any]) -> None:
    if (bus := options.take("bus")) not in (None, "pci.0", "pcie.0"):
        raise options.error(f"bus={bus}: cardcage has one PCI bus, pci.0")
    if (address := options.take("addr")) is not None:
        found = SLOT.fullmatch(address)
        slot = int(found[2], 16 if found[1] or found[4] else 10) if found else 32
        if found is None or slot > 31:
            raise options.error(f"addr={address}: expected a slot such as 0x3, or 3.0")
        device["address"] = f"{slot:02x}.{found[4] or 0}"


def _links(line: Line, options: Options, full: str, device: dict[str, Any]) -> str | None:
    """Take the property that names another option's part; returns the name, where QMP has to know it."""
    if full == "virtio-blk-pci":
        name = options.need("drive")
        if name not in line.drives:
            raise backends.unknown(options, "-drive or -blockdev", name, line.drives)
        spec, more = line.drives[name]
        device |= {"drive": spec, **more}
        return name
    if full == "virtio-net-pci":
        name = options.need("netdev")
        if name not in line.netdevs:
            raise backends.unknown(options, "-netdev", name, line.netdevs)
        device["net"] = line.netdevs[name]
        if "id" in device:
            line.cards[device["id"]] = name
        if (queues := line.netdevs[name].get("queues", 1)) > 1:
            device["queues"] = queues
    elif full == "virtio-9p-pci":
        name = options.need("fsdev")
        if name not in line.shares:
            raise backends.unknown(options, "-fsdev", name, line.shares)
        device |= line.shares[name]
    elif full == "virtio-rng-pci":
        name = options.take("rng") or ""
        if name and name not in line.objects:
            raise backends.unknown(options, "-object", name, line.objects)
        options.harmless(period="")
    elif full.startswith("vhost-user"):
        name = options.need("chardev")
        table = line.char(options, name)
        if table["type"] != "socket" or "path" not in table:
            raise options.error(f"chardev={name}: expected a socket with a path")
        device["socket"] = table["path"]
    elif full in ("isa-serial", "isa-debugcon"):
        if name := options.take("chardev") or "":
            device["char"] = line.char_for(options, name)
            return name if full == "isa-serial" else None
        device["char"] = "null"
    return None


def add_port(line: Line, options: Options, kind: str) -> None:
    """A port of a virtio console."""
    bus = (options.take("bus") or "").removesuffix(".0")
    if not line.buses:
        raise options.error("no -device virtio-serial-pci before it")
    if bus and bus not in line.buses:
        raise options.error(f"bus={bus}: no -device virtio-serial-pci before it has this id")
    number, name, id = options.number("nr"), options.take("name"), options.take("id")
    label = options.need("chardev")
    char = line.char_for(options, label)
    options.end()
    ports = line.buses[bus or next(iter(line.buses))]
    first = kind == "virtconsole" and number in (None, 0) and 0 not in ports
    wanted = 0 if first else number if number is not None else max([0, *ports]) + 1
    if wanted in ports or not 0 <= wanted <= 30 or (wanted == 0 and kind != "virtconsole"):
        raise options.error(f"nr={wanted}: expected the number of a free port, 1 to 30")
    ports[wanted] = ({"char": char, "name": name or "", "console": kind == "virtconsole"}, label, id or "")
