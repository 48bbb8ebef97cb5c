"""Card ``snapshot``: a machine in a directory, with its RAM and disks, and machines that go on from there.

::

    vm.snapshot("ready")

    with Machine.restore("ready") as vm:
        print(vm.run("uptime", text=True).stdout)

Also its state without RAM, as values and JSON: :func:`capture` and :func:`restore`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cardcage.errors import HostError
from cardcage.hookspecs import hookimpl
from cardcage.lazy import lazy_names
from cardcage_fleet import ControlOffer, SessionOffer

if TYPE_CHECKING:
    from cardcage.machine import Machine as PlainMachine
    from cardcage.registry import Registry

    from cardcage_snapshot.creating import Snapshot
    from cardcage_snapshot.state import DeviceState, MachineState, capture, dumps, loads, restore
    from cardcage_snapshot.verbs import Machine, Verbs

__all__ = ["DeviceState", "Machine", "MachineState", "Snapshot", "Verbs", "capture", "dumps", "loads", "restore"]

GIVEN = "snapshot:given"
"""The key by which a host shares the names that machines were given, and when: :mod:`cardcage_snapshot.given`."""
HMP = {"savevm": "savevm [TAG]", "loadvm": "loadvm TAG", "delvm": "delvm TAG", "info snapshots": "info snapshots"}


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer ``vm.snapshot``, the command ``snapshot``, and what restored machines are made of."""
    registry.verb("snapshot", "cardcage_snapshot.creating:snapshot", help="save the machine, its RAM and its disks")
    registry.memory(
        "snapshot",
        "cardcage_snapshot.backing:SnapshotRam",
        options="cardcage_snapshot.backing:RamOptions",
        help="a private map of a snapshot's RAM (Machine.restore)",
    )
    registry.memory(
        "arriving",
        "cardcage_snapshot.arriving:ArrivingRam",
        help="RAM that comes while the guest runs: of a compressed snapshot, or from another machine",
    )
    registry.doctor(
        "memory on demand",
        "cardcage_snapshot.check:faults",
        help="userfaultfd, for post-copy migrations and compressed snapshots",
    )
    registry.boot(
        "saved",
        "cardcage_snapshot.restoring:SavedBoot",
        options="cardcage_snapshot.restoring:SavedBootOptions",
        help="what a restored machine boots once it is reset (Machine.restore)",
    )
    registry.add(
        ControlOffer("snapshot-plan", "cardcage_snapshot.running:plan", help="files to save it in: {path: DIR}")
    )
    registry.add(SessionOffer("snapshot", "cardcage_snapshot.running:save", help="save the machine into these files"))
    from cardcage_qmp import HmpCommand, QmpCommand

    for name, usage in HMP.items():
        registry.add(HmpCommand(name, f"cardcage_snapshot.qmp:{name.replace(' ', '_')}", help=usage))
    for name in ("snapshot-save", "snapshot-load", "snapshot-delete"):
        registry.add(QmpCommand(name, f"cardcage_snapshot.qmp:{name.replace('-', '_')}"))
    registry.command(
        "snapshot",
        "cardcage_snapshot.tool:run",
        configure="cardcage_snapshot.tool:configure",
        help="save a running machine with its RAM and disks, list, check and restore what was saved",
    )


def _note(machine: PlainMachine, name: str) -> None:
    """*machine* is being made, and was given *name*, an empty one for whichever it has; here, for start-up's sake."""
    import time
    from weakref import WeakKeyDictionary

    machine.host.share(GIVEN, WeakKeyDictionary)[machine] = name, time.time()


@hookimpl(tryfirst=True)  # before a number is added to its name
def cardcage_admit(machine: PlainMachine) -> None:
    """Note the name that the machine was given: its snapshots have it in QEMU's words."""
    _note(machine, machine.name if "machine.name" in machine.config.origins else "")


@hookimpl
def cardcage_built(machine: PlainMachine) -> None:
    """Take what a snapshot needs, before a jail shuts it out."""
    if machine.host.owns_process or "jail" in machine.config.guards:
        from cardcage_snapshot.sealing import before_jail

        before_jail(machine)


@hookimpl
def cardcage_forking(machine: PlainMachine) -> str | None:
    """A copy has no process that unpacks RAM: wait until all of it is there."""
    if (arrival := machine.services.get("arriving-ram")) is not None:
        try:
            arrival.complete()
        except HostError as error:
            return str(error)
    return None


@hookimpl
def cardcage_forked(machine: PlainMachine) -> None:
    """Take it of this process, where there is any: what is open tells of the parent's memory."""
    import sys

    _note(machine, "")  # the copy is another machine
    if (watching := sys.modules.get("cardcage_snapshot.watching")) is not None:  # else there is none, nor time to load
        watching.renew()
    if (working := sys.modules.get("cardcage_snapshot.working")) is not None:
        working.forget(machine)


_names: Any = lazy_names(
    "cardcage_snapshot",
    creating="Snapshot",
    state="DeviceState MachineState capture dumps loads restore",
    verbs="Machine Verbs",
)
__getattr__ = _names
