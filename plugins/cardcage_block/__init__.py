"""Disks: raw and qcow2 images as block back ends, the ``--drive`` shorthand, and ``cardcage image``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.hookspecs import hookimpl

if TYPE_CHECKING:
    from cardcage.registry import Registry


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer the back ends ``block:drive raw qcow2 temporary commit throttle``, ``--drive`` and ``image``."""
    drive = "cardcage_block.drive"
    shapes = {
        "drive": ("open_drive", "an image file or block device; the format is detected"),
        "raw": ("open_raw", "a raw image or a block device"),
        "qcow2": ("open_qcow2", "a qcow2 image, version 2 or 3"),
    }
    for name, (factory, help) in shapes.items():
        registry.backend(
            "block",
            name,
            f"{drive}:{factory}",
            options=f"{drive}:Drive",
            shorthand=f"{drive}:parse_file",
            help=help,
            default=name == "drive",
        )
    registry.backend(
        "block",
        "temporary",
        "cardcage_block.temporary:open_temporary",
        options=f"{drive}:Drive",
        shorthand=f"{drive}:parse_file",
        help="an image that stays as it is: what is written ends with the machine",
    )
    registry.backend(
        "block",
        "commit",
        "cardcage_block.committing:open_commit",
        options="cardcage_block.committing:CommitOptions",
        help="an overlay whose contents go into an image below it",
    )
    registry.backend(
        "block",
        "throttle",
        "cardcage_block.throttle:open_throttle",
        options="cardcage_block.throttle:ThrottleOptions",
        help="another drive with limits on bytes and requests a second",
    )
    registry.flag(
        "--drive",
        f"{drive}:parse_drive_flag",
        asks=True,
        help="add a virtio disk: file=root.qcow2,format=qcow2,readonly=on, or just a path",
    )
    registry.command(
        "image",
        "cardcage_block.tool:run",
        configure="cardcage_block.tool:configure",
        help="create, info, check, resize or convert a disk image",
    )
