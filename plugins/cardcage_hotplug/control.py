"""The machine's side of ``cardcage device``: commands of its control socket.

``device-list``, without arguments, answers ``{"devices": [...]}``; ``device-add`` takes a device's table and answers
what the list says of it; ``device-remove`` takes ``id`` and ``timeout`` in seconds; ``device-resize`` takes ``id`` and
``size`` in bytes.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Protocol

from cardcage.abilities import has
from cardcage.device import HotplugBus
from cardcage.errors import StateError, UsageError, near
from cardcage.machine import reconfigure
from cardcage.security import OPERATOR, Act
from cardcage.units import Size

if TYPE_CHECKING:
    from cardcage.machine import Machine, PluggedDevice

__all__ = ["TIMEOUT_MAX", "ChangesDrive", "GrowsDrive", "add_device", "change_drive", "grow_drive"]
__all__ += ["list_device", "remove_device", "resize_device"]

TIMEOUT_MAX = 3600


class GrowsDrive(Protocol):
    """A device whose disk can become larger while it is used."""

    def grow_drive(self, size: int, /) -> None:
        """Make the disk *size* bytes long, and tell the guest. Any thread, not under the machine's lock. Raises
        UsageError for a size that cannot be, HostError where the drive or the host does not do it."""


class ChangesDrive(Protocol):
    """A device that can have another drive in the place of its own, while it is used."""

    def change_drive(self, drive: str | dict[str, Any], /) -> None:
        """Have *drive*, which shows the same disk: an overlay of the one that is there, or what it was merged into.
        Under the machine's lock. Raises what opening it raises; all is as before then."""


def change_drive(machine: Machine, id: str, drive: str | dict[str, Any], /) -> None:
    """Have *drive*, the same disk to the guest, in the place of that of device *id*; the configuration says so then.

    Raises StateError for a device that has no such drive, what opening it raises, Denied.
    """
    machine.mediator.check(Act(OPERATOR, machine.label, "machine", ("add",), {"machine": machine.name}))
    with machine.lock:
        if (plugged := machine.devices.get(id)) is None:
            raise StateError(f'this machine has no device "{id}".{near(id, machine.devices)}')
        device = getattr(plugged.device, "device", plugged.device)  # behind its transport
        if not has(device, ChangesDrive, plugged.who):
            raise StateError(f'device "{id}" has no drive that another can stand for')
        device.change_drive(drive)
        reconfigure(machine, id, drive=drive)


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


def grow_drive(machine: Machine, id: str, size: int | str, /) -> None:
    """Make the disk of device *id* larger, at any time: ``vm.grow_drive("virtio-blk", "20G")``. The guest is told.

    Args:
        size: bytes, or text; no less than the disk has.

    Raises StateError for a device that is not there or has no such disk, UsageError for a size that cannot be,
    HostError where the drive has one size or the host fails it, Denied.
    """
    machine.mediator.check(Act(OPERATOR, machine.label, "machine", ("add",), {"machine": machine.name}))
    try:
        wanted = int(Size(size))
    except ValueError as error:
        raise UsageError(f"size: {error}") from error
    if wanted >= 1 << 63:
        raise UsageError(f"size: expected less than {1 << 63} bytes")
    if (plugged := machine.devices.get(id)) is None:
        raise StateError(f'this machine has no device "{id}".{near(id, machine.devices)}')
    device = getattr(plugged.device, "device", plugged.device)  # behind its transport
    if not has(device, GrowsDrive, plugged.who):
        raise StateError(f'device "{id}" has no disk that can grow')
    lock: threading.Lock = machine.host.share("hotplug:growing", threading.Lock)
    with lock:  # one after another
        device.grow_drive(wanted)


def resize_device(machine: Machine, arguments: dict[str, Any]) -> dict[str, Any]:
    """Make a device's disk larger. Raises what :func:`grow_drive` does."""
    if unknown := arguments.keys() - {"id", "size"}:
        raise UsageError(f'device-resize: no argument "{sorted(unknown)[0]}"')
    id, size = arguments.get("id"), arguments.get("size")
    if not isinstance(id, str):
        raise UsageError('device-resize: expected "id", a device of the machine')
    if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size < 1 << 63:
        raise UsageError(f'device-resize: "size": expected bytes, got {size!r:.40}')
    grow_drive(machine, id, size)
    return {}
