"""The contracts as public tests, for our cards and for strangers'.

``check_device``, ``check_block_backend``, ``check_memory`` and ``check_memory_backend`` say what was broken;
:class:`TestSlot` is a slot without a machine; ``pytest_plugins = "cardcage_testing.pytest"`` brings fixtures. A card
with a seam of its own has its contract with it: :mod:`cardcage_conformance` that of accelerators,
:mod:`cardcage_memory_policies.testing` and :mod:`cardcage_fleet.testing` those of policies and admission. Names are
loaded when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.lazy import lazy_names

if TYPE_CHECKING:
    from cardcage_testing.backing import check_memory_backend
    from cardcage_testing.block import check_block_backend
    from cardcage_testing.device import check_device
    from cardcage_testing.memory import check_memory
    from cardcage_testing.slot import TestSlot

__all__ = [
    "TestSlot",
    "check_block_backend",
    "check_device",
    "check_memory",
    "check_memory_backend",
]

__getattr__ = lazy_names(
    "cardcage_testing",
    backing="check_memory_backend",
    block="check_block_backend",
    device="check_device",
    memory="check_memory",
    slot="TestSlot",
)
