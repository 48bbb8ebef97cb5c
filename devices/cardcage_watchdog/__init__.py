"""Card ``watchdog``: a timer that does something to the machine when its guest no longer feeds it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.hookspecs import hookimpl

if TYPE_CHECKING:
    from cardcage.registry import Registry


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer the device ``i6300esb``."""
    registry.device(
        "i6300esb",
        "cardcage_watchdog.i6300esb:I6300esb",
        options="cardcage_watchdog.i6300esb:I6300esbOptions",
        bus="pci",
        help="watchdog timer of Intel's 6300ESB, for Linux's driver i6300esb",
    )
