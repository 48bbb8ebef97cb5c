"""QEMU's names for devices that cardcage has, with the properties that are theirs: for QMP and ``cardcage-qemu``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from attrs import evolve
from cardcage.values import frozen

__all__ = ["DEVICES", "OBJECTS", "ON_PCI", "Known", "qemu_name"]

ON_PCI = ("virtio-pci", "pci-device")
"""Parent types of devices on the PCI bus, which have an address."""
NOTHING: Mapping[str, str] = MappingProxyType({})


@frozen
class Known:
    """A device under QEMU's name.

    Attributes:
        type: the device's type here. parent: QEMU's parent type.
        options: QEMU's property to the option here. types: property to QEMU's word for its type, ``str`` by default.
        links: properties that name another part of the command line: ``drive``, ``netdev``, ``chardev``, ``fsdev``.
    """

    type: str
    parent: str
    options: Mapping[str, str] = NOTHING
    types: Mapping[str, str] = NOTHING
    links: tuple[str, ...] = ()


RING = {"packed": "packed", "queue-size": "queue_size"}
NUMBERS = dict.fromkeys(
    (
        "num-queues queue-size logical_block_size physical_block_size opt_io_size max-bytes host_mtu rx_queue_size "
        "tx_queue_size iobase irq iosize ioport index"
    ).split(),
    "uint32",
)
TRUTHS = dict.fromkeys(
    "packed share-rw write-cache mrg_rxbuf deflate-on-oom free-page-reporting readback".split(), "bool"
)
TYPES = {**NUMBERS, **TRUTHS}
VIRTIO = "virtio-pci"
DEVICES: dict[str, Known] = {
    "virtio-blk-pci": Known(
        "virtio-blk",
        VIRTIO,
        {
            **RING,
            "serial": "serial",
            "num-queues": "queues",
            "logical_block_size": "logical_block",
            "physical_block_size": "physical_block",
            "opt_io_size": "optimal_io",
            "werror": "werror",
            "rerror": "rerror",
        },
        TYPES,
        ("drive",),
    ),
    "virtio-net-pci": Known(
        "virtio-net",
        VIRTIO,
        {
            "packed": "packed",
            "rx_queue_size": "queue_size",
            "tx_queue_size": "queue_size",
            "mac": "mac",
            "mrg_rxbuf": "mergeable",
            "host_mtu": "mtu",
        },
        TYPES,
        ("netdev",),
    ),
    "virtio-serial-pci": Known("virtio-console", VIRTIO),
    "virtio-rng-pci": Known("virtio-rng", VIRTIO, {"max-bytes": "max_bytes"}, TYPES, ("rng",)),
    "virtio-balloon-pci": Known(
        "virtio-balloon",
        VIRTIO,
        {"deflate-on-oom": "deflate_on_oom", "free-page-reporting": "free_page_reporting"},
        TYPES,
    ),
    "virtio-9p-pci": Known("virtio-9p", VIRTIO, {"mount_tag": "tag"}, TYPES, ("fsdev",)),
    "vhost-user-fs-pci": Known(
        "vhost-user-fs", VIRTIO, {"tag": "tag", "queue-size": "queue_size"}, TYPES, ("chardev",)
    ),
    "vhost-user-blk-pci": Known(
        "vhost-user-blk", VIRTIO, {"num-queues": "queues", "queue-size": "queue_size"}, TYPES, ("chardev",)
    ),
    "virtserialport": Known("virtio-console", "device", {"name": "name"}, links=("chardev",)),
    "virtconsole": Known("virtio-console", "device", {"name": "name"}, links=("chardev",)),
    "isa-serial": Known("isa-serial", "isa-device", {"iobase": "port", "irq": "irq"}, TYPES, ("chardev",)),
    "isa-debugcon": Known("debugcon", "isa-device", {"iobase": "port", "readback": "readback"}, TYPES, ("chardev",)),
    "isa-debug-exit": Known("isa-debug-exit", "isa-device", {"iobase": "iobase", "iosize": "iosize"}, TYPES),
    "pvpanic": Known("pvpanic", "isa-device", {"ioport": "port"}, TYPES),
    "pc-testdev": Known("pc-testdev", "isa-device"),
    "i6300esb": Known("i6300esb", "pci-device"),
    "vmgenid": Known("vmgenid", "device", {"guid": "guid"}),
}
DEVICES |= {
    f"{name.removesuffix('-pci')}-device": evolve(one, type=f"{one.type}-mmio", parent="virtio-device")
    for name, one in DEVICES.items()
    if one.parent == VIRTIO
}
"""By QEMU's name, virtio devices by that of each transport. ``links`` are resolved by who has the command line."""

OBJECTS: dict[str, tuple[str, dict[str, str]]] = {
    "memory-backend-ram": ("memory-backend", {"size": "int", "share": "bool", "prealloc": "bool"}),
    "memory-backend-memfd": ("memory-backend", {"size": "int", "share": "bool", "prealloc": "bool"}),
    "memory-backend-file": (
        "memory-backend",
        {"size": "int", "share": "bool", "prealloc": "bool", "mem-path": "string"},
    ),
    "rng-random": ("rng-backend", {"filename": "string"}),
    "rng-builtin": ("rng-backend", {}),
    "secret": ("secret_common", {"data": "string", "file": "string"}),
    "tls-creds-x509": ("tls-creds", {"dir": "string", "endpoint": "QCryptoTLSCredsEndpoint", "verify-peer": "bool"}),
    "kvm-accel": ("accel", {}),
    "tcg-accel": ("accel", {}),
}
"""Types that ``-object`` and ``-accel`` take: QEMU's parent type, and properties with their types."""
OTHERS = {"i440fx": "i440FX-pcihost", "rtc": "mc146818rtc", "pic": "isa-i8259", "pit": "isa-pit", "hpet": "hpet"}


def qemu_name(type: str) -> str:
    """QEMU's name for a device's *type*; the type itself where QEMU has no such device."""
    found = next((name for name, one in DEVICES.items() if one.type == type), None)
    return found or OTHERS.get(type, type)
