"""Migration in QMP's words: ``migrate``, ``migrate-incoming``, ``query-migrate``, ``migrate_cancel``, its limits and
capabilities, and the event MIGRATION.

As QEMU has them: the source stands still once its machine is at the destination, until it is told to quit. ``cont``
there is ``migrate_recover``: who says it knows that no other copy runs.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict
from weakref import WeakKeyDictionary

from attrs import Factory, define, evolve
from cardcage.errors import CardcageError, StateError, UsageError
from cardcage.machine import Machine, State
from cardcage_qmp import QmpError, Session, control_of
from cardcage_qmp.control import Control, RunState

from cardcage_migrate.credentials import Credentials, Endpoint, credentials
from cardcage_migrate.expecting import Expected, Status, expect, expected
from cardcage_migrate.hold import migrate_recover, standing
from cardcage_migrate.leaving import migrate_cancel as cancel
from cardcage_migrate.leaving import migrate_start_postcopy as go_over
from cardcage_migrate.limits import Limits
from cardcage_migrate.outgoing import Cancelled, Outgoing
from cardcage_migrate.progress import Progress, current
from cardcage_migrate.reach import adopted, connect, parse
from cardcage_migrate.relay import relayed

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage_migrate.hold import Resume
    from cardcage_migrate.wire import Peer

__all__ = [
    "Coming",
    "MigrationEvent",
    "migrate",
    "migrate_cancel",
    "migrate_incoming",
    "migrate_set_capabilities",
    "migrate_set_parameters",
    "migrate_start_postcopy",
    "query_migrate",
    "query_migrate_capabilities",
    "query_migrate_parameters",
]

MigrationStatus = Literal[
    "none",
    "setup",
    "active",
    "postcopy-active",
    "postcopy-paused",
    "postcopy-recover",
    "device",
    "completed",
    "failed",
    "cancelled",
]


class InetAddress(TypedDict):
    """Where it listens."""

    type: Literal["inet"]
    host: str
    port: str


Ram = TypedDict(
    "Ram",
    {
        "transferred": int,
        "remaining": int,
        "total": int,
        "mbps": float,
        "dirty-sync-count": int,
        "postcopy-requests": int,
    },
)
MigrationInfo = TypedDict(
    "MigrationInfo",
    {
        "status": NotRequired[MigrationStatus],
        "ram": NotRequired[Ram],
        "total-time": NotRequired[int],
        "downtime": NotRequired[int],
        "expected-downtime": NotRequired[int],
        "cpu-throttle-percentage": NotRequired[int],
        "error-desc": NotRequired[str],
        "socket-address": NotRequired[list[InetAddress]],
    },
)
MigrationParameters = TypedDict(
    "MigrationParameters", {"max-bandwidth": int, "downtime-limit": int, "tls-creds": str, "tls-hostname": str}
)


class MigrationEvent(TypedDict):
    """The migration has another status."""

    status: MigrationStatus


class MigrationCapabilityStatus(TypedDict):
    """A capability, and whether it is on: events that say that a migration's state changes; vCPUs that write faster
    than can be sent are held up; the program of ``exec:`` passes on what the destination answers, which it does anyway
    where something can come back; the guest may go over before its memory, once it is told to."""

    capability: Literal["events", "auto-converge", "return-path", "postcopy-ram"]
    state: bool


@define
class Wishes:
    """Wishes of peers about migrations of a machine, out of it or into it."""

    limits: Limits = Factory(lambda: Limits(ram_alone=True))
    events: bool = False
    answers: bool = False
    """A program of exec: passes answers on."""
    tls_creds: str = ""
    """The id of a tls-creds-x509 object; empty for a plain connection."""
    tls_hostname: str = ""
    leaves: bool = False
    """Some peer had the machine moved away."""
    moving: bool = False

    def tell(self, control: Control, status: MigrationStatus) -> None:
        """Emit the event, where it is wanted."""
        if self.events:
            control.emit("MIGRATION", {"status": status})


_wishes: WeakKeyDictionary[Machine, Wishes] = WeakKeyDictionary()
_lock = threading.Lock()


def wishes(machine: Machine) -> Wishes:
    """Wishes of peers about *machine*."""
    return _wishes.setdefault(machine, Wishes())


class Gone:
    """A machine that was migrated away, and stands still here: ``cont`` goes on with it."""

    run_state: RunState = "postmigrate"

    def __init__(self, control: Control) -> None:
        self._control = control

    def cont(self) -> None:
        """Recover it. Raises HostError where another copy has a disk, or has written it."""
        machine = self._control.machine
        ways = standing(machine)
        if ways is not None and ways.here is None:
            raise QmpError(f"{machine.name} runs where it was migrated to: its memory here is out of date")
        migrate_recover(machine)
        if machine.state is State.PAUSED:  # and was so at its switch
            machine.resume()

    def back(self) -> None:
        """It goes on here."""
        self._control.elsewhere = None


class Coming:
    """A machine that waits for one that comes into it; ``cont`` starts it once that is here."""

    def __init__(self, machine: Machine, what: Expected) -> None:
        self._control = control_of(machine)
        self.run_state: RunState = "inmigrate"
        self._wished = wishes(machine)
        what.tell = self._tell
        self._control.elsewhere = self

    def _tell(self, status: Status) -> None:
        if status in ("completed", "postcopy-active") and self.run_state == "inmigrate":
            self.run_state = "paused"  # before anybody hears of it, and says cont
        self._wished.tell(self._control, status)

    def starts(self) -> None:
        """It runs from now on as any machine."""
        self._control.elsewhere = None

    def cont(self) -> None:
        """Let it start as soon as it can."""
        self._control.began.set()
        if self.run_state == "paused":
            self._control.ran.wait(60)


def before_peers(machine: Machine) -> None:
    """Let *machine*, which was just built, wait for one that comes into it."""
    Coming(machine, expect(machine))


def status_of(progress: Progress) -> MigrationStatus:
    """Its status in QEMU's words: a machine that went one way, and stands still here, is one that has migrated."""
    match progress.status:
        case "setup" | "active" | "completed" | "failed" | "cancelled":
            return progress.status
        case "postcopy-active" | "postcopy-paused" | "postcopy-recover":
            return progress.status
        case "switching":
            return "device"
        case "given up":
            return "failed" if progress.error else "completed"
    return "none"


def migrate(
    session: Session, uri: str, detach: bool = True, resume: bool = False, blk: bool = False, inc: bool = False
) -> None:
    """Begin to move the machine; ``fd:NAME`` is a descriptor that ``getfd`` has got. It says nothing of the end."""
    machine, control, wished = session.machine, session.control, wishes(session.machine)
    if blk or inc:
        raise QmpError("Parameters 'blk', 'inc': disks stay where they are, and none is copied")
    ways = standing(machine)
    if resume:
        if ways is None or ways.resume is None:
            raise QmpError("Parameter 'resume': there is no post-copy that could be taken up again")
        _resume(session, uri, ways.resume)
        return
    if ways is not None:
        raise QmpError(f"{machine.name} has been migrated already, and stands still: cont goes on with it here")
    last = "none"

    def tell(progress: Progress) -> None:
        nonlocal last
        if (now := status_of(progress)) != last and now in ("setup", "active", "device", "postcopy-active"):
            last = now
            wished.tell(control, now)

    name, where = uri.removeprefix("fd:"), uri
    if named := uri != name and not name.isdigit():
        if name not in session.fds:
            raise QmpError(f"File descriptor named '{name}' has not been found")
        if wished.tls_creds:
            raise QmpError(f"{uri:.100}: TLS is for tcp: and unix: (parameter 'tls-creds')")
        if wished.limits.mode != "precopy":
            raise QmpError(f"{uri:.100}: post-copy takes two connections (capability 'postcopy-ram')")
    else:
        again, place = _linked(machine, wished, uri), parse(uri)
        where = str(place)
    # Nobody is connected to before it: no program starts, no file is emptied, no descriptor is used up.
    outgoing, gone = Outgoing(machine, where, wished.limits, tell, stays=True), Gone(control)
    with _lock:
        if wished.moving:
            raise QmpError("There's a migration process in progress")
        wished.moving = True
    try:
        if named:  # its end is the other side's word that all has come
            links = [adopted(session.fds.pop(name))]
        else:
            peer, one_way = again()
            links = [(peer, one_way or (place.scheme == "exec" and not wished.answers))]
    except BaseException:
        wished.moving = False
        raise
    wished.leaves = True
    tell(Progress())  # libvirt wants to hear of it before the answer

    def move() -> None:
        status: MigrationStatus = "failed"
        try:
            status = status_of(outgoing.over(lambda: links.pop() if links else again()))
        except CardcageError as error:  # query-migrate says it, too
            machine.log.warning("the migration failed", why=str(error))
            status = "cancelled" if isinstance(error, Cancelled) else _failed(machine)
        finally:
            wished.moving = False
            if standing(machine):  # before anybody hears of it, and says cont
                outgoing.recovered, control.elsewhere = gone.back, gone
            wished.tell(control, status)

    threading.Thread(target=move, name=f"{machine.name}-migrate").start()


def _failed(machine: Machine) -> MigrationStatus:
    progress = current(machine)
    status = "failed" if progress is None else status_of(progress)
    return status if status == "postcopy-paused" else "failed"


def _linked(machine: Machine, wished: Wishes, uri: str) -> Callable[[], tuple[Peer, bool]]:
    """Makes a connection there, each time it is called. Raises UsageError, QmpError, Denied."""
    place = parse(uri)
    place.ask(machine.mediator, machine.label, machine.name, listen=False)
    tls, name = _tls(machine, wished, "client"), wished.tls_hostname

    def link() -> tuple[Peer, bool]:
        peer, one_way = connect(place, tls=None if tls is None else tls.context, tls_hostname=name)
        later: Any = peer
        return (peer if tls is None or wished.limits.mode == "precopy" else relayed(later)), one_way

    return link


def _resume(session: Session, uri: str, resume: Resume) -> None:
    """Begin to send the memory that is missing at *uri*. It says nothing of the end."""
    machine, control, wished = session.machine, session.control, wishes(session.machine)
    peer, _ = _linked(machine, wished, uri)()
    wished.tell(control, "postcopy-recover")

    def send() -> None:
        try:
            resume(lambda: peer)
        except CardcageError as error:  # query-migrate says it, too
            machine.log.warning("the migration was not recovered", why=str(error))
        if (progress := current(machine)) is not None:
            wished.tell(control, status_of(progress))

    threading.Thread(target=send, name=f"{machine.name}-migrate").start()


def migrate_start_postcopy(session: Session) -> None:
    """Let the guest go over before the rest of its memory."""
    if wishes(session.machine).limits.mode == "precopy":
        raise QmpError("Enable postcopy with migrate_set_capability before the start of migration")
    try:
        go_over(session.machine)
    except StateError as error:
        raise QmpError(str(error)) from error


def _tls(machine: Machine, wished: Wishes, endpoint: Endpoint) -> Credentials | None:
    """The certificates that the parameters name; None for a plain connection. Raises QmpError."""
    if not (name := wished.tls_creds):
        return None
    if (found := credentials(machine).get(name)) is None:
        raise QmpError(f"No TLS credentials with id '{name:.100}'")
    if found.endpoint != endpoint:
        raise QmpError(f"Expected TLS credentials for a {endpoint} endpoint: '{name:.100}' is for a {found.endpoint}")
    return found


def migrate_incoming(session: Session, uri: str) -> None:
    """Listen for what comes into a machine that was made with ``-incoming defer``."""
    what = expected(session.machine)
    if what is None:
        raise QmpError("'-incoming' was not specified on the command line")
    what.listen(uri, _tls(session.machine, wishes(session.machine), "server"))


def migrate_cancel(session: Session) -> None:
    """Give it up; nothing where there is none, or where it is too late."""
    progress = current(session.machine)
    if progress is not None and progress.status in ("setup", "active", "switching"):  # else it is too late
        with suppress(StateError):
            cancel(session.machine)


def query_migrate(session: Session) -> MigrationInfo:
    """How far it is; empty where none was asked for."""
    what = expected(session.machine)
    progress = current(session.machine)
    if what is not None and not wishes(session.machine).leaves:
        if what.status is None:
            return {}
        found: MigrationInfo = {"status": what.status}
        if what.error is not None:
            found["error-desc"] = str(what.error)
        if (address := what.address) is not None:
            found["socket-address"] = [{"type": "inet", "host": address[0], "port": str(address[1])}]
        return found
    if progress is None:
        return {"status": "setup"} if wishes(session.machine).moving else {}
    found = {
        "status": status_of(progress),
        "total-time": round(progress.total * 1000),
        "ram": {
            "transferred": progress.sent,
            "remaining": progress.remaining,
            "total": int(session.machine.config.machine.memory),
            "mbps": progress.rate * 8 / 1e6,
            "dirty-sync-count": progress.passes,
            "postcopy-requests": progress.asked,
        },
    }
    if progress.status in ("completed", "given up"):
        found["downtime"] = round(progress.downtime * 1000)
    elif progress.status == "active":
        found["expected-downtime"] = round(progress.expected * 1000)
        found["cpu-throttle-percentage"] = progress.throttle
    if progress.error:
        found["error-desc"] = progress.error
    return found


def migrate_set_parameters(
    session: Session,
    max_bandwidth: int | None = None,
    downtime_limit: int | None = None,
    tls_creds: str | None = None,
    tls_hostname: str | None = None,
) -> None:
    """Limits of the next migration: bytes a second, 0 for none; milliseconds. The id of a tls-creds-x509 object for its
    connection, and the name that the destination's certificate has to have, by default the host of tcp:; empty for
    none."""
    wished = wishes(session.machine)
    limits = wished.limits
    try:
        if max_bandwidth is not None:
            limits = evolve(limits, bandwidth=max_bandwidth or None)
        if downtime_limit is not None:
            limits = evolve(limits, downtime=downtime_limit / 1000)
    except UsageError as error:
        raise QmpError(str(error)) from error
    wished.limits = limits
    if tls_creds is not None:
        wished.tls_creds = tls_creds
    if tls_hostname is not None:
        wished.tls_hostname = tls_hostname


def query_migrate_parameters(session: Session) -> MigrationParameters:
    """Limits of the next migration, and its certificates."""
    wished = wishes(session.machine)
    return {
        "max-bandwidth": wished.limits.bandwidth or 0,
        "downtime-limit": round(wished.limits.downtime * 1000),
        "tls-creds": wished.tls_creds,
        "tls-hostname": wished.tls_hostname,
    }


def query_migrate_capabilities(session: Session) -> list[MigrationCapabilityStatus]:
    """The capabilities there are."""
    wished = wishes(session.machine)
    return [
        {"capability": "events", "state": wished.events},
        {"capability": "auto-converge", "state": wished.limits.throttle},
        {"capability": "return-path", "state": wished.answers},
        {"capability": "postcopy-ram", "state": wished.limits.mode != "precopy"},
    ]


def migrate_set_capabilities(session: Session, capabilities: list[MigrationCapabilityStatus]) -> None:
    """Switch them."""
    wished = wishes(session.machine)
    for one in capabilities:
        if one["capability"] == "events":
            wished.events = one["state"]
        elif one["capability"] == "return-path":
            wished.answers = one["state"]
        elif one["capability"] == "postcopy-ram":
            wished.limits = evolve(wished.limits, mode="hybrid" if one["state"] else "precopy", told_only=True)
        else:
            wished.limits = evolve(wished.limits, throttle=one["state"])


# lines of the human monitor


def hmp_migrate(session: Session, words: list[str]) -> str:
    """``migrate [-d] URI``: it says nothing of the end either way."""
    given = words[1:] if words[:1] == ["-d"] else words
    if len(given) != 1:
        raise QmpError("expected migrate [-d] URI")
    session.run("migrate", {"uri": given[0]})
    return ""


def hmp_migrate_incoming(session: Session, words: list[str]) -> str:
    """``migrate_incoming URI``."""
    if len(words) != 1:
        raise QmpError("expected migrate_incoming URI")
    session.run("migrate-incoming", {"uri": words[0]})
    return ""


def hmp_migrate_cancel(session: Session, words: list[str]) -> str:
    """``migrate_cancel``."""
    session.run("migrate_cancel", {})
    return ""


def hmp_migrate_start_postcopy(session: Session, words: list[str]) -> str:
    """``migrate_start_postcopy``."""
    session.run("migrate-start-postcopy", {})
    return ""


def hmp_info_migrate(session: Session, words: list[str]) -> str:
    """``info migrate``."""
    found = session.run("query-migrate", {})
    if "status" not in found:
        return ""
    rows = [f"Migration status: {found['status']}\n"]
    if "error-desc" in found:
        rows = [f"Migration status: {found['status']} ({found['error-desc']})\n"]
    rows += [f"{key.replace('-', ' ')}: {found[key]} ms\n" for key in ("total-time", "downtime") if key in found]
    if "ram" in found:
        rows += [f"{key} ram: {found['ram'][key] >> 10} kbytes\n" for key in ("transferred", "remaining", "total")]
    return "".join(rows)
