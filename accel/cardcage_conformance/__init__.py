"""The contract of accelerators: guest programs that every accelerator must run alike, and where they run.

``check_accelerator``, ``check_busy_eventfds``, ``check_guest_debug`` and ``check_parking`` say what was broken;
:class:`RemoteGuest` does what a test asks. Names are loaded when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.lazy import lazy_names

if TYPE_CHECKING:
    from cardcage_conformance.accelerator import check_accelerator
    from cardcage_conformance.busy import check_busy_eventfds
    from cardcage_conformance.debugging import check_guest_debug
    from cardcage_conformance.remote import RemoteGuest
    from cardcage_conformance.standstill import check_parking

__all__ = ["RemoteGuest", "check_accelerator", "check_busy_eventfds", "check_guest_debug", "check_parking"]

__getattr__ = lazy_names(
    "cardcage_conformance",
    accelerator="check_accelerator",
    busy="check_busy_eventfds",
    debugging="check_guest_debug",
    remote="RemoteGuest",
    standstill="check_parking",
)
