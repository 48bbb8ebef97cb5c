"""Card ``qmp``: QEMU's monitor protocol on a socket of any machine.

A command is an offer, a :class:`QmpCommand`, whose function's signature is its schema; so is an event,
:class:`QmpEvent`. ``query-qmp-schema`` is generated from both, whichever card they are of. docs/qemu.md has them all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from cardcage.hookspecs import hookimpl
from cardcage.lazy import lazy_names
from cardcage.registry import Offer

if TYPE_CHECKING:
    from cardcage.machine import Machine
    from cardcage.registry import Registry

    from cardcage_qmp.control import Control, control_of
    from cardcage_qmp.errors import QmpError
    from cardcage_qmp.session import Session

__all__ = ["Control", "HmpCommand", "QmpCommand", "QmpError", "QmpEvent", "Session", "control_of"]


class QmpCommand(Offer):
    """A command: ``factory(session, ...)``, whose parameters are its arguments, by the names that QMP has for them.

    The annotations are the schema, and resolve in the function's module: ``str``, ``int`` (64 bits), ``float``,
    ``bool``, ``object`` (anything), ``Literal`` of texts, ``list`` of one of these, ``TypedDict``, and unions of
    these: several ``TypedDict`` are told apart by a member that is a ``Literal`` of other texts in each. A parameter
    with a default is optional. An underscore is a dash, and one at the end is none. One parameter may stand before a
    slash: a ``TypedDict``, or a union of such, is all the arguments as one object; a ``dict[str, Any]`` has those
    that no other parameter takes. What it returns is checked by types alone; None is an empty object. It runs on its
    peer's thread, without the machine's lock; :class:`Session` has the machine. It raises :exc:`QmpError`, or any
    error of :mod:`cardcage.errors`, for the peer to hear.
    """

    kind: ClassVar[str] = "qmp command"
    form: ClassVar[str] = "[a-z][a-zA-Z0-9_-]*"


class QmpEvent(Offer):
    """An event that :meth:`Control.emit` may send; *data* is the ``TypedDict`` of what it tells, None for nothing."""

    kind: ClassVar[str] = "qmp event"
    form: ClassVar[str] = "[A-Z][A-Z0-9_]*"

    def __init__(self, name: str, data: Any = None, *, help: str = "") -> None:
        super().__init__(name, data, help=help)


class HmpCommand(Offer):
    """A line of the human monitor: ``factory(session, words)``, its words after the name, as a list; returns what it
    prints. Its *name* may be ``info`` and a word; *help* is its usage, ``NAME TAG``. It is asked for as a QMP command
    of its name, and raises :exc:`QmpError`, or any error of :mod:`cardcage.errors`, for the peer to read.
    """

    kind: ClassVar[str] = "hmp command"
    form: ClassVar[str] = "(info )?[a-z][a-z_]*"


LIFE = "quit stop cont system_reset system_powerdown set_action inject_nmi memsave pmemsave"
ABOUT = (
    "query_version query_commands query_qmp_schema query_status query_name query_uuid query_target query_kvm "
    "query_machines query_current_machine query_cpu_definitions query_cpus_fast query_hotpluggable_cpus "
    "query_iothreads query_memory_size_summary query_memory_devices query_memdev "
    "query_tpm_models query_tpm_types"
)
PARTS = (
    "query_block query_named_block_nodes query_blockstats query_chardev query_balloon balloon block_resize "
    "qom_list qom_get qom_list_types qom_list_properties device_list_properties"
)
FILES = "getfd closefd add_fd remove_fd query_fdsets"
JOBS = "query_jobs job_dismiss job_complete job_cancel query_block_jobs block_job_complete block_job_cancel"
WITH_UNDERSCORES = {"system_reset", "system_powerdown", "block_resize"}
EVENTS = {
    "STOP": None,
    "RESUME": None,
    "POWERDOWN": None,
    "SHUTDOWN": "cardcage_qmp.control:Shutdown",
    "RESET": "cardcage_qmp.control:Shutdown",
    "GUEST_PANICKED": "cardcage_qmp.control:GuestPanicked",
    "BLOCK_IO_ERROR": "cardcage_qmp.control:BlockIoError",
    "WATCHDOG": "cardcage_qmp.control:Watchdog",
    "DEVICE_DELETED": "cardcage_qmp.control:DeviceGone",
    "DEVICE_UNPLUG_GUEST_ERROR": "cardcage_qmp.control:DeviceGone",
    "JOB_STATUS_CHANGE": "cardcage_qmp.jobs:JobChange",
    "BLOCK_JOB_READY": "cardcage_qmp.jobs:BlockJobChange",
    "BLOCK_JOB_COMPLETED": "cardcage_qmp.jobs:BlockJobChange",
    "BLOCK_JOB_CANCELLED": "cardcage_qmp.jobs:BlockJobChange",
}


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer the device ``qmp``, ``--qmp``, the commands and the events."""
    registry.device(
        "qmp",
        "cardcage_qmp.server:Qmp",
        options="cardcage_qmp.server:QmpOptions",
        help="QEMU's monitor protocol on a socket",
    )
    registry.flag(
        "--qmp", "cardcage_qmp.server:parse_qmp", metavar="unix:PATH", help="listen for QMP clients on a socket"
    )
    for module, names in (("life", LIFE), ("about", ABOUT), ("parts", PARTS), ("files", FILES)):
        for name in names.split():
            spelt = name if name in WITH_UNDERSCORES else name.replace("_", "-")
            registry.add(QmpCommand(spelt, f"cardcage_qmp.{module}:{name}"))
    for name in JOBS.split():
        registry.add(QmpCommand(name.replace("_", "-"), f"cardcage_qmp.jobs:{name}"))
    registry.add(QmpCommand("device_del", "cardcage_qmp.removals:device_del"))
    registry.add(QmpCommand("query-pci", "cardcage_qmp.pci:query_pci"))
    registry.add(QmpCommand("human-monitor-command", "cardcage_qmp.hmp:human_monitor_command"))
    for name, data in EVENTS.items():
        registry.add(QmpEvent(name, data))


@hookimpl
def cardcage_built(machine: Machine) -> None:
    """Let the machine's ``qmp`` devices serve."""
    if any(one.type == "qmp" for one in machine.devices.values()):
        from cardcage_qmp.control import serve

        serve(machine)


@hookimpl(tryfirst=True)  # a jail closes behind whoever is waited for
def cardcage_starting(machine: Machine) -> None:
    """Wait for the peers of sockets with ``wait``."""
    for one in machine.devices.values():
        if one.type == "qmp":
            one.device.await_peer()


_names: Any = lazy_names("cardcage_qmp", control="Control control_of", errors="QmpError", session="Session")
__getattr__ = _names
