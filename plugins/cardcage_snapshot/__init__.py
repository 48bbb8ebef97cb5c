"""Card ``snapshot``: the state of a machine, captured as values and JSON, and restored into another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cardcage.hookspecs import hookimpl
from cardcage.lazy import lazy_names

if TYPE_CHECKING:
    from cardcage.registry import Registry

    from cardcage_snapshot.state import DeviceState, MachineState, capture, dumps, loads, restore

__all__ = ["DeviceState", "MachineState", "capture", "dumps", "loads", "restore"]


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Nothing is named by configurations: programs call :func:`capture` and :func:`restore`."""


_names: Any = lazy_names("cardcage_snapshot", state="DeviceState MachineState capture dumps loads restore")
__getattr__ = _names
