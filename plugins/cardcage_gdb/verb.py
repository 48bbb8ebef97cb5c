"""The verb ``gdb`` of a machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cardcage.machine import Machine

__all__ = ["gdb"]


def gdb(machine: Machine, socket: str = "tcp:127.0.0.1:0", *, wait: bool = False) -> str:
    """Listen for gdb: ``vm.gdb()`` before the machine starts. Returns what gdb's ``target remote`` takes.

    Args:
        socket: ``unix:PATH`` or ``tcp:HOST:PORT``; port 0 is one that is free.
        wait: ``start`` waits until gdb says ``continue``.

    Raises ConfigError for what it cannot listen at, or an accelerator that cannot debug; StateError for a machine that
    was started.
    """
    plugged = machine.add("gdb", socket=socket, wait=wait)
    plugged.device.serve(machine)
    address: str = plugged.device.address
    return address
