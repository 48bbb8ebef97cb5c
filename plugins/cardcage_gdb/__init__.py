"""Card ``gdb``: GDB's remote serial protocol on a socket of any machine whose accelerator has ``guest-debug``.

``cardcage run --gdb PORT``, a device ``gdb`` in a configuration, or :func:`~cardcage_gdb.verb.gdb` as ``vm.gdb()``.
docs/gdb.md says what gdb can do with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.hookspecs import hookimpl

if TYPE_CHECKING:
    from cardcage.machine import Machine
    from cardcage.registry import Registry


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer the device ``gdb``, ``--gdb`` and the verb ``gdb``."""
    registry.device(
        "gdb",
        "cardcage_gdb.server:Gdb",
        options="cardcage_gdb.server:GdbOptions",
        help="a stub for gdb on a socket",
    )
    registry.flag(
        "--gdb",
        "cardcage_gdb.server:parse_gdb",
        metavar="PORT|tcp:HOST:PORT|unix:PATH",
        help="let gdb debug the guest; with ,wait=on from its first instruction on",
    )
    registry.verb("gdb", "cardcage_gdb.verb:gdb", help="a socket for gdb")


@hookimpl
def cardcage_built(machine: Machine) -> None:
    """Let the machine's ``gdb`` devices serve."""
    for one in machine.devices.values():
        if one.type == "gdb":
            one.device.serve(machine)


@hookimpl(tryfirst=True)  # a jail closes behind whoever is waited for
def cardcage_starting(machine: Machine) -> None:
    """Wait for gdb to say go, where the options ask for it."""
    for one in machine.devices.values():
        if one.type == "gdb":
            one.device.await_go()
