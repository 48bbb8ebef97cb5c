"""cardcage: a virtual machine monitor as a microkernel; everything that does something is a card.

::

    from cardcage import Machine

    with Machine(memory="512M", kernel="vmlinuz", append="console=ttyS0") as vm:
        vm.start()
        vm.console.expect("login:", timeout=60)

Names here are loaded when first used. A card imports from the modules: ``cardcage.device``, ``cardcage.hookspecs``, ...
"""

from __future__ import annotations

from cardcage.lazy import lazy_names

TYPE_CHECKING = False  # typing is slow to import, and until main() runs a Ctrl-C is a traceback

if TYPE_CHECKING:
    from cardcage.errors import (
        AcceleratorError,
        CardcageError,
        CardError,
        ConfigError,
        Denied,
        GuestError,
        HostError,
        MissingExtra,
        StateError,
        UsageError,
    )
    from cardcage.host import Host
    from cardcage.machine import GuestFailed, Machine
    from cardcage.outcome import Crashed, DebugExit, Outcome, Panicked, PoweredOff, Reset, Stopped, TimedOut
    from cardcage.units import Duration, Size

__version__ = "0.1.0"

__all__ = [
    "AcceleratorError",
    "CardError",
    "CardcageError",
    "ConfigError",
    "Crashed",
    "DebugExit",
    "Denied",
    "Duration",
    "GuestError",
    "GuestFailed",
    "Host",
    "HostError",
    "Machine",
    "MissingExtra",
    "Outcome",
    "Panicked",
    "PoweredOff",
    "Reset",
    "Size",
    "StateError",
    "Stopped",
    "TimedOut",
    "UsageError",
]

__getattr__ = lazy_names(
    "cardcage",
    errors="AcceleratorError CardError CardcageError ConfigError Denied GuestError HostError MissingExtra StateError "
    "UsageError",
    host="Host",
    machine="GuestFailed Machine",
    outcome="Crashed DebugExit Outcome Panicked PoweredOff Reset Stopped TimedOut",
    units="Duration Size",
)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
