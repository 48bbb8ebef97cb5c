"""Card ``tcg``: an accelerator by binary translation of x86-64 guests on x86-64 hosts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.hookspecs import hookimpl

if TYPE_CHECKING:
    from cardcage.registry import Registry

__all__ = ["cardcage_register"]


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer the translator."""
    registry.accelerator(
        "tcg",
        "cardcage_tcg.accel:Tcg",
        options="cardcage_tcg.vm:TcgOptions",
        help="binary translation, needs no /dev/kvm",
    )
