"""Card ``hotplug``: the devices of machines that run, listed, added, removed and resized by ``cardcage device``.

The kernel and the buses do it (:meth:`cardcage.machine.Machine.add` and ``remove``); this is the way there from another
process, by the machine's control socket.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.hookspecs import hookimpl

if TYPE_CHECKING:
    from cardcage.registry import Registry


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer the command ``device``, and what it has machines do."""
    from cardcage_fleet import ControlOffer

    registry.command(
        "device",
        "cardcage_hotplug.command:run",
        configure="cardcage_hotplug.command:configure",
        help="list, add, remove and resize devices of a machine that runs",
    )
    registry.verb("grow_drive", "cardcage_hotplug.control:grow_drive", help="make a disk that is in use larger")
    for name in ("list", "add", "remove", "resize"):
        registry.add(ControlOffer(f"device-{name}", f"cardcage_hotplug.control:{name}_device"))
