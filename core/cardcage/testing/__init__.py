"""The contracts as public tests, for our cards and for strangers'.

``check_device``, ``check_memory`` and ``check_accelerator`` raise AssertionError with what was broken;
:class:`TestSlot` is a slot without a machine; ``pytest_plugins = "cardcage.testing.pytest"`` brings fixtures. Names are
loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cardcage.testing.accelerator import check_accelerator
    from cardcage.testing.device import check_device
    from cardcage.testing.memory import check_memory
    from cardcage.testing.slot import TestSlot

__all__ = ["TestSlot", "check_accelerator", "check_device", "check_memory"]

_HOMES = {
    "TestSlot": "slot",
    "check_accelerator": "accelerator",
    "check_device": "device",
    "check_memory": "memory",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"cardcage.testing.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'cardcage.testing' has no attribute {name!r}")
