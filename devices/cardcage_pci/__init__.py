"""PCI: host bridge, configuration space, BARs, INTx, MSI and MSI-X (PCI Local Bus 3.0, PCI Express ECAM).

Device ``pci-host`` carries others: their registrations say ``bus="pci"``. What such a device states of itself is told
in :mod:`cardcage_pci.spec`; nothing of this package has to be imported for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.device import Pio
from cardcage.hookspecs import hookimpl

if TYPE_CHECKING:
    from cardcage.registry import Registry


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer the host bridge."""
    registry.device(
        "pci-host",
        "cardcage_pci.host:PciHost",
        options="cardcage_pci.host:PciHostOptions",
        regions=(
            Pio(4, base=0xCF8, name="pci-address", read="read_address", write="write_address"),
            Pio(4, base=0xCFC, name="pci-data", read="read_data", write="write_data"),
        ),
        help="PCI host bridge: one bus of 32 slots, configuration ports and ECAM",
    )
