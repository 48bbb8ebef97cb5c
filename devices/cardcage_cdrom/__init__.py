"""Card ``cdrom``: a CD-ROM drive behind a virtio SCSI controller, whose disc firmware boots from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.hookspecs import hookimpl
from cardcage_fleet import SessionOffer
from cardcage_virtio import offer

if TYPE_CHECKING:
    from cardcage.registry import Registry


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer the device ``virtio-cdrom``, ``--cdrom``, and the command that changes its disc."""
    offer(
        registry,
        "virtio-cdrom",
        "cardcage_cdrom.device:Cdrom",
        options="cardcage_cdrom.device:CdromOptions",
        help="CD-ROM drive: a disc that firmware boots from, and that comes and goes",
    )
    registry.add(SessionOffer("cdrom", "cardcage_cdrom.discs:change", help="eject a CD-ROM drive's disc, or change it"))
    registry.command(
        "cdrom",
        "cardcage_cdrom.discs:run",
        configure="cardcage_cdrom.discs:configure",
        help="change the disc in a running machine's CD-ROM drive, or eject it",
    )
    registry.flag(
        "--cdrom", "cardcage_cdrom.device:parse_flag", metavar="FILE", help="add a CD-ROM drive with this ISO image"
    )
