"""Card ``vmgenid``: a number by which a guest sees that it goes on from an earlier point, or that it is a copy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.device import Mmio
from cardcage.hookspecs import hookimpl

if TYPE_CHECKING:
    from cardcage.registry import Registry


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer the device ``vmgenid``, and QMP's ``query-vm-generation-id``."""
    registry.device(
        "vmgenid",
        "cardcage_vmgenid.vmgenid:VmGenId",
        options="cardcage_vmgenid.vmgenid:VmGenIdOptions",
        regions=(Mmio(0x1000, 0xFEDA0000),),
        help="Virtual Machine Generation ID: the guest is told of forks, restores and reverts",
    )
    from cardcage_qmp import QmpCommand

    registry.add(QmpCommand("query-vm-generation-id", "cardcage_vmgenid.qmp:query_vm_generation_id"))
