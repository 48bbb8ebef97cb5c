"""The contracts as public tests, for our cards and for strangers'.

``check_device``, ``check_block_backend``, ``check_memory``, ``check_memory_backend``, ``check_admission``,
``check_policy``, ``check_accelerator`` and ``check_busy_eventfds`` say what was broken;
:class:`RemoteGuest` does what a test asks;
:class:`TestSlot` is a slot without a machine, :class:`TestMachine` a machine without vCPUs;
``pytest_plugins = "cardcage.testing.pytest"`` brings fixtures. Names are loaded when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.lazy import lazy_names

if TYPE_CHECKING:
    from cardcage.testing.accelerator import check_accelerator
    from cardcage.testing.admission import check_admission
    from cardcage.testing.backing import check_memory_backend
    from cardcage.testing.block import check_block_backend
    from cardcage.testing.busy import check_busy_eventfds
    from cardcage.testing.device import check_device
    from cardcage.testing.memory import check_memory
    from cardcage.testing.policy import TestBalloon, TestMachine, check_policy
    from cardcage.testing.remote import RemoteGuest
    from cardcage.testing.slot import TestSlot

__all__ = [
    "RemoteGuest",
    "TestBalloon",
    "TestMachine",
    "TestSlot",
    "check_accelerator",
    "check_admission",
    "check_block_backend",
    "check_busy_eventfds",
    "check_device",
    "check_memory",
    "check_memory_backend",
    "check_policy",
]

__getattr__ = lazy_names(
    "cardcage.testing",
    accelerator="check_accelerator",
    admission="check_admission",
    backing="check_memory_backend",
    block="check_block_backend",
    busy="check_busy_eventfds",
    device="check_device",
    memory="check_memory",
    policy="TestBalloon TestMachine check_policy",
    remote="RemoteGuest",
    slot="TestSlot",
)
