"""A card of one virtio device: a disk whose sectors say their numbers."""

from cardcage.hookspecs import hookimpl
from cardcage_virtio import offer


@hookimpl
def cardcage_register(registry):
    offer(
        registry,
        "number-disk",
        "virtio_card.device:NumberDisk",
        options="virtio_card.device:Options",
        help="a read-only disk whose sectors say their numbers",
    )
