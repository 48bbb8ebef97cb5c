"""The machine's side of ``cardcage device``: commands of its control socket.

``device-list``, without arguments, answers ``{"devices": [...]}``; ``device-add`` takes a device's table and answers
what the list says of it; ``device-remove`` takes ``id`` and ``timeout`` in seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cardcage.abilities import has
from cardcage.device import HotplugBus
from cardcage.errors import UsageError

if TYPE_CHECKING:
    from cardcage.machine import Machine, PluggedDevice

__all__ = ["TIMEOUT_MAX", "add_device", "list_device", "remove_device"]

TIMEOUT_MAX = 3600


def list_device(machine: Machine, arguments: dict[str, Any]) -> dict[str, Any]:
    """All devices: ``id``, ``type``, and ``address`` on a bus whose devices come and go."""
    if arguments:
        raise UsageError(f'device-list takes no arguments, got "{next(iter(arguments))}"')
    with machine.lock:
        return {"devices": [_row(one) for one in machine.devices.values()]}


def _row(plugged: PluggedDevice) -> dict[str, Any]:
    carrier = plugged.carrier
    address = carrier.place_of(plugged.device) if has(carrier, HotplugBus) else None
    return {"id": plugged.id, "type": plugged.type, "address": address}


def add_device(machine: Machine, arguments: dict[str, Any]) -> dict[str, Any]:
    """Add a device. Raises what :meth:`~cardcage.machine.Machine.add` does."""
    keys = dict(arguments)
    type = keys.pop("type", None)
    if not isinstance(type, str):
        raise UsageError('device-add: expected "type", the name of a device')
    return _row(machine.add(type, **keys))


def remove_device(machine: Machine, arguments: dict[str, Any]) -> dict[str, Any]:
    """Remove a device. Raises what :meth:`~cardcage.machine.Machine.remove` does."""
    if unknown := arguments.keys() - {"id", "timeout"}:
        raise UsageError(f'device-remove: no argument "{sorted(unknown)[0]}"')
    id, timeout = arguments.get("id"), arguments.get("timeout", 30)
    if not isinstance(id, str):
        raise UsageError('device-remove: expected "id", a device of the machine')
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 <= timeout <= TIMEOUT_MAX:
        raise UsageError(f'device-remove: "timeout": expected 0 to {TIMEOUT_MAX} seconds, got {timeout!r:.40}')
    machine.remove(id, timeout=timeout)
    return {}
