"""``vm.migrate()``, and what can be said to a migration that is under way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from cardcage_migrate.limits import Limits
from cardcage_migrate.outgoing import Outgoing, moving
from cardcage_migrate.reach import connect, parse
from cardcage_migrate.relay import relayed

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from cardcage.machine import Machine

    from cardcage_migrate.limits import Mode
    from cardcage_migrate.progress import Progress
    from cardcage_migrate.wire import Peer

__all__ = ["migrate", "migrate_cancel", "migrate_start_postcopy"]


def migrate(
    self: Machine,
    uri: str,
    *,
    bandwidth: int | None = None,
    downtime: float = 0.3,
    timeout: float | None = 3600.0,
    timeout_strategy: Literal["cancel", "force"] = "cancel",
    throttle: bool = True,
    patience: float = 30.0,
    mode: Mode = "precopy",
    tls_dir: str | os.PathLike[str] | None = None,
    tls_hostname: str = "",
    progress: Callable[[Progress], object] | None = None,
) -> Progress:
    """Move the machine, running or paused, to who waits at *uri* (``Machine.incoming``); it ends here.

    Args:
        uri: ``unix:PATH``, ``tcp:HOST:PORT``, ``exec:COMMAND`` (its standard input and output are the connection),
            ``fd:NUMBER``; a pipe, or ``file:PATH``, takes it one way: nothing is heard, and the machine stands still
            here until it is ended, or recovered.
        bandwidth: bytes a second while the guest runs. downtime: seconds that the guest may stand still.
        timeout: seconds until that has to be possible; then *timeout_strategy*: ``cancel``, or ``force`` a longer stop.
        throttle: hold up vCPUs that write faster than it sends; the log says so.
        patience: seconds that the other side may be silent before it counts as lost.
        mode: ``precopy``: RAM goes over while the guest runs here. ``postcopy``: the guest goes over at once, and RAM
            follows, what it waits for first. ``hybrid``: RAM goes over, until that does not converge or somebody says
            so (``migrate_start_postcopy``), then the guest, then the rest of it.
        tls_dir: directory with ``ca-cert.pem``, ``client-cert.pem``, ``client-key.pem``. tls_hostname: the name that
            the destination's certificate has to have, by default the host of ``tcp:``.
        progress: called now and then, on this thread.

    Disks stay where they are, on storage that both sides share. Raises, and the machine goes on: StateError for one
    that cannot be moved, before anything is stopped; :exc:`~cardcage_migrate.outgoing.Cancelled`;
    :exc:`~cardcage_migrate.wire.Refused` with the destination's words; HostError, LinkLost. LinkLost after the machine
    was given up leaves it standing still: then ``migrate_progress().status`` is ``given up``, and ``migrate_recover``
    goes on here, if it does not run there; or ``postcopy-paused``, where it does, and ``migrate_recover`` connects anew
    and sends the rest of its memory.
    """
    limits = Limits(bandwidth, downtime, timeout, timeout_strategy, throttle, patience, mode=mode)
    place = parse(uri)

    def link() -> tuple[Peer, bool]:
        place.ask(self.mediator, self.label, self.name, listen=False)
        peer: Any
        peer, one_way = connect(place, tls_dir, tls_hostname)
        return (peer if tls_dir is None or mode == "precopy" else relayed(peer)), one_way  # poll(2) sees no TLS

    return Outgoing(self, str(place), limits, progress).over(link)


def migrate_cancel(self: Machine) -> None:
    """Give the machine's migration up; ``migrate`` raises Cancelled. Raises StateError without one, or too late."""
    moving(self).cancel()


def migrate_start_postcopy(self: Machine) -> None:
    """Let the guest of a migration with the mode ``hybrid`` go over now; the rest of its RAM follows. Raises StateError
    without one, or where it has gone over already."""
    moving(self).go_over()
