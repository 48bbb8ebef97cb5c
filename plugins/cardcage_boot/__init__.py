"""Boot protocols, the initramfs builder, the kernel fetcher and ``cardcage boot``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.hookspecs import hookimpl

if TYPE_CHECKING:
    from cardcage.registry import Registry


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer the boot protocols."""
    for name, stem, text in (("linux", "Linux", "Linux bzImage by the 64-bit boot protocol"),):
        registry.boot(
            name, f"cardcage_boot.{name}:{stem}Loader", options=f"cardcage_boot.options:{stem}Options", help=text
        )
