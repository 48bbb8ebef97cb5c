"""Boot protocols, the initramfs builder, the kernel fetcher and ``cardcage boot``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.hookspecs import hookimpl

if TYPE_CHECKING:
    from cardcage.registry import Registry


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer the boot protocols."""
    for name, stem, text in (
        ("linux", "Linux", "Linux bzImage by the 64-bit boot protocol"),
        ("pvh", "Pvh", "ELF kernel with a PVH entry note (vmlinux, Xen)"),
        ("multiboot", "Multiboot", "Multiboot 1 kernel, ELF or flat"),
        ("raw", "Raw", "flat binary at a given address, in 16-, 32- or 64-bit mode"),
        ("firmware", "Firmware", "ROM below 4 GiB, entered at the reset vector (SeaBIOS)"),
        ("auto", "Auto", "decides by the kernel file's magic"),
    ):
        registry.boot(
            name, f"cardcage_boot.{name}:{stem}Loader", options=f"cardcage_boot.options:{stem}Options", help=text
        )
