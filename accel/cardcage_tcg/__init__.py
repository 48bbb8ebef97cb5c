"""Card ``tcg``: an accelerator by binary translation of x86-64 guests on x86-64 hosts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.hookspecs import hookimpl

if TYPE_CHECKING:
    from types import ModuleType

    from cardcage.machine import Machine
    from cardcage.registry import Registry
    from cardcage.security import Needs

__all__ = ["NOT_BUILT", "cardcage_register"]

CODE_MEMORY = "cardcage-code"
"""Name of the memfd that holds translated code."""
MAX_INSTRUCTIONS = 64
"""The most in one block."""
NOT_BUILT = "the translator's native half is not built here; to build it: python -m cardcage_tcg.native.build"


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer the translator."""
    registry.accelerator(
        "tcg",
        "cardcage_tcg.accel:Tcg",
        options="cardcage_tcg.vm:TcgOptions",
        help="binary translation; does not need /dev/kvm",
    )


@hookimpl
def cardcage_needs(machine: Machine) -> Needs | None:
    """The directory in which the translator leaves word of what it had no templates for.

    It is asked before the process gives up its capabilities: root's, which may have been what this code is read by.
    """
    from cardcage.security import Needs

    if machine.accelerator.name != "tcg":
        return None
    from cardcage_tcg.library import is_ours

    if not is_ours("cardcage_tcg", "iced_x86"):
        import cardcage_tcg.cpu.emulate
        import cardcage_tcg.translate.blocks  # noqa: F401  now, since later it may not be readable
    folder = machine.vm.store.recipes.ready()  # type: ignore[attr-defined]  # it is a TcgVm
    return None if folder is None else Needs(write=(str(folder),))


def __getattr__(name: str) -> ModuleType:
    """``layout``, which is generated: where nothing was built, the error says what builds it."""
    if name != "layout":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    try:
        return import_module("cardcage_tcg.layout")
    except ModuleNotFoundError as error:
        raise ImportError(NOT_BUILT) from error
