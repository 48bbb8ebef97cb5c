"""virtio 1.2: queues, transports (PCI, MMIO), devices, and vhost-user front ends.

Another card offers a virtio device of its own with :func:`offer`; what it writes is told in
:mod:`cardcage_virtio.device`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cardcage.device import Mmio
from cardcage.hookspecs import hookimpl
from cardcage.registry import resolve
from cardcage.values import frozen

if TYPE_CHECKING:
    from cardcage.registry import Registry

__all__ = ["offer"]

DEVICES = (
    ("blk", "devices.blk:Blk", "disk: multi-queue, flush, discard, write zeroes"),
    ("net", "devices.net:Net", "network card: multi-queue, mergeable buffers, offloads"),
    ("console", "devices.console:Console", "consoles and named serial ports"),
    ("balloon", "devices.balloon:Balloon", "memory balloon: statistics, free page reporting"),
    ("vsock", "vsock.device:Vsock", "sockets between guest and host, AF_UNIX on the host"),
    ("fs", "share.fs:Fs", "host directory, confined to its root; mounted as virtiofs"),
    ("9p", "share.p9:P9", "host directory, confined to its root; mounted as 9p"),
    ("rng", "devices.rng:Rng", "entropy source"),
)

VHOST_USER = (
    ("blk", "VhostUserBlkOptions", "disk served by another process (qemu-storage-daemon)"),
    ("fs", "VhostUserFsOptions", "host directory served by virtiofsd"),
    ("device", "VhostUserOptions", "any virtio device served by another process"),
)

MOUNTS = {"fs": "virtiofs", "9p": "9p"}
"""The file system by which a guest mounts what the device shares."""


@frozen
class Behind:
    """A lazy factory: the device that *factory* names, behind the transport that *transport* names."""

    factory: Any
    transport: str

    def __call__(self, *options: Any) -> Any:
        return resolve(self.transport)(resolve(self.factory)(*options))

    def near_misses(self) -> list[str]:
        """For ``cardcage cards -v``; of a function, which may make anything, none are known."""
        from cardcage.abilities import near_misses

        from cardcage_virtio.device import OPTIONAL, VirtioDevice

        made = resolve(self.factory)
        return near_misses(made, (VirtioDevice, *OPTIONAL)) if isinstance(made, type) else []


def offer(registry: Registry, name: str, factory: Any, *, options: Any = None, help: str = "", **more: Any) -> None:
    """Offer a virtio device twice: *name* on the ``pci`` bus, and *name*\\ ``-mmio`` with keys ``address`` and ``irq``.

    Args:
        factory: ``"module:Class"`` of the author's object (:mod:`cardcage_virtio.device`), called with its options.
        options: attrs class of its options, or a reference to it.
        more: ``needs``, ``shorthand``, ``mounts`` of a device's offer.
    """
    pci, mmio = (
        Behind(factory, "cardcage_virtio.transport.pci:PciTransport"),
        Behind(factory, "cardcage_virtio.transport.mmio:MmioTransport"),
    )
    registry.device(name, pci, options=options, bus="pci", help=help, **more)
    regions = (Mmio(0x200, name="virtio-mmio"),)
    registry.device(f"{name}-mmio", mmio, options=options, regions=regions, help=f"{help} (virtio-mmio)", **more)


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer what this card has."""
    for name, place, help in DEVICES:
        factory = f"cardcage_virtio.{place}"
        more = {"mounts": MOUNTS[name]} if name in MOUNTS else {}
        offer(registry, f"virtio-{name}", factory, options=f"{factory}Options", help=help, **more)
    for name, options, help in VHOST_USER:
        factory = f"cardcage_virtio.vhost.kinds:vhost_user_{name}"
        more = {"mounts": MOUNTS[name]} if name in MOUNTS else {}
        kind = f"cardcage_virtio.vhost.kinds:{options}"
        offer(registry, f"vhost-user-{name}", factory, options=kind, help=help, **more)
    share, vsock = "cardcage_virtio.flags:parse_share", "cardcage_virtio.flags:parse_vsock"
    for flag, parse, metavar, help in (
        ("--device", "cardcage_virtio.flags:parse_device", "SPEC", "add a device: TYPE,key=value,..."),
        ("--share", share, "DIR", "share a host directory: DIR[,tag=share][,readonly=on][,type=virtiofs|9p]"),
        ("--vsock", vsock, "CID", "add sockets between host and guest: CID[,uds=PATH]"),
    ):
        registry.flag(flag, parse, metavar=metavar, asks=True, help=help)
