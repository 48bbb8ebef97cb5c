"""Card ``migrate``: a running machine moves to another process or host, and hardly stands still for it.

::

    vm.migrate("tcp:192.0.2.7:4444", tls_dir="/etc/pki/cardcage")      # here

    with Machine.incoming("tcp:0.0.0.0:4444", tls_dir="/etc/pki/cardcage") as vm:  # there
        vm.wait()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cardcage.hookspecs import hookimpl
from cardcage.lazy import lazy_names
from cardcage.security import Needs

if TYPE_CHECKING:
    from cardcage.machine import Machine as PlainMachine
    from cardcage.registry import Registry

    from cardcage_migrate.disks import Movable
    from cardcage_migrate.progress import Progress
    from cardcage_migrate.verbs import Machine, Verbs
    from cardcage_migrate.wire import BrokenStream, LinkLost, Refused

__all__ = ["BrokenStream", "LinkLost", "Machine", "Movable", "Progress", "Refused", "Verbs"]

MEANT = "migrate:meant"
"""The key by which a host shares that its next machine waits for one that comes into it, as ``incoming``; and its
:class:`~cardcage_migrate.credentials.Credentials`, by their ids, as ``credentials``."""
DOORS = "migrate:doors"
"""The key by which a host shares the directories of sockets at which machines come in, and are still waited for."""
QMP = (
    "migrate migrate_start_postcopy migrate_incoming migrate_cancel migrate_set_parameters query_migrate "
    "query_migrate_parameters migrate_set_capabilities query_migrate_capabilities"
)

HMP = {
    "migrate_start_postcopy": "migrate_start_postcopy",
    "migrate": "migrate [-d] URI",
    "migrate_incoming": "migrate_incoming URI",
    "migrate_cancel": "migrate_cancel",
    "info migrate": "info migrate",
}


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer the verbs, the commands ``migrate`` and ``incoming``, and what stands for disks that are on their way."""
    from cardcage_fleet import ControlOffer, SessionOffer
    from cardcage_qmp import HmpCommand, QmpCommand, QmpEvent

    out = "cardcage_migrate.leaving"
    registry.verb("migrate", f"{out}:migrate", help="move the running machine to who waits for it")
    registry.verb("migrate_cancel", f"{out}:migrate_cancel", help="give a migration up; the machine goes on here")
    registry.verb(
        "migrate_start_postcopy", f"{out}:migrate_start_postcopy", help="let the guest go over now, and its RAM follow"
    )
    registry.verb("migrate_progress", "cardcage_migrate.progress:migrate_progress", help="how far a migration is")
    registry.verb(
        "migrate_recover", "cardcage_migrate.hold:migrate_recover", help="go on with a migration that broke off"
    )
    registry.backend(
        "block",
        "arriving",
        "cardcage_migrate.disks:open_arriving",
        options="cardcage_migrate.disks:ArrivingOptions",
        help="a disk that another machine still has (Machine.incoming)",
    )
    registry.command(
        "migrate",
        "cardcage_migrate.command:run",
        configure="cardcage_migrate.command:configure",
        help="move a running machine to another process or host; cancel, show, recover, postcopy",
    )
    registry.command(
        "incoming",
        "cardcage_migrate.command:run_incoming",
        configure="cardcage_migrate.command:configure_incoming",
        help="wait for a machine that is moved here, and run it",
    )
    serve = "cardcage_migrate.serve"
    registry.add(SessionOffer("migrate", f"{serve}:migrate", help="move the machine over this connection"))
    registry.add(SessionOffer("migrate-resume", f"{serve}:resume", help="send memory that is missing over this"))
    for name in QMP.split():
        spelt = name if name == "migrate_cancel" else name.replace("_", "-")
        registry.add(QmpCommand(spelt, f"cardcage_migrate.qmp:{name}"))
    for name, usage in HMP.items():
        function = f"hmp_{name.replace(' ', '_')}"
        registry.add(HmpCommand(name, f"cardcage_migrate.qmp:{function}", help=usage))
    registry.add(QmpEvent("MIGRATION", "cardcage_migrate.qmp:MigrationEvent"))
    registry.add(
        ControlOffer(
            "migrate-act",
            f"{serve}:act",
            help="act on a migration: {act: cancel | show | recover | postcopy}",
        )
    )


@hookimpl
def cardcage_needs(machine: PlainMachine) -> Needs | None:
    """The right to remove the socket at which a machine came in, once all of its memory has."""
    doors: list[str] = machine.host.share(DOORS, list)
    return Needs(remove=tuple(doors)) if doors else None


@hookimpl(tryfirst=True)  # before there are peers that could speak of it
def cardcage_built(machine: PlainMachine) -> None:
    """Let a machine wait that was made to become one that comes, and have its certificates."""
    meant = machine.host.share(MEANT, dict)
    if found := meant.pop("credentials", None):
        from cardcage_migrate.credentials import credentials

        credentials(machine).update(found)
    if meant.pop("incoming", False):
        from cardcage_migrate.qmp import before_peers

        before_peers(machine)


_names: Any = lazy_names(
    "cardcage_migrate",
    disks="Movable",
    progress="Progress",
    verbs="Machine Verbs",
    wire="BrokenStream LinkLost Refused",
)
__getattr__ = _names
