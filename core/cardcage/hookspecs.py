"""The hooks of cardcage, in the order of a machine's life. All return None; hooks assemble, protocols operate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from cardcage.registry import Registry

__all__ = ["Hooks", "hookimpl", "hookspec"]

hookspec = pluggy.HookspecMarker("cardcage")
hookimpl = pluggy.HookimplMarker("cardcage")


class Hooks:
    """What a card may implement, as module-level functions marked with :data:`hookimpl`."""

    # start-up

    @hookspec
    def cardcage_register(self, registry: Registry) -> None:
        """Say what the card offers. Called once per host and card; only registers, with lazy references."""
