"""A copy that stands still, and must: nobody lets it go on but who knows that no other copy runs."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

from attrs import frozen
from cardcage.errors import Denied, StateError, UsageError

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable

    from cardcage.machine import Machine
    from cardcage.security import Act

    from cardcage_migrate.progress import Progress
    from cardcage_migrate.wire import Peer

__all__ = ["Hold", "Resume", "Ways", "migrate_recover", "recoverable", "standing"]

STOPPED = frozenset({"start", "resume", "reset", "add", "fork"})
"""Acts that are refused of a machine meanwhile."""
_ways: WeakKeyDictionary[Machine, Ways] = WeakKeyDictionary()
_lock = threading.Lock()


class Hold:
    """Keeps a machine from going on, or from other *acts*, as a checker that comes last, until :meth:`drop`."""

    def __init__(self, machine: Machine, why: str, acts: Iterable[str] = STOPPED) -> None:
        self._machine, self._why, self._acts = machine, why, frozenset(acts)
        machine.mediator.checkers = (*machine.mediator.checkers, self)

    def check(self, act: Act, /) -> None:
        """Refuse it."""
        if act.tclass == "machine" and self._acts & set(act.permissions):
            raise Denied(f"{self._machine.name}: {self._why}")

    def drop(self) -> None:
        """Let it be. Idempotent."""
        self._machine.mediator.checkers = tuple(one for one in self._machine.mediator.checkers if one is not self)


class Resume(Protocol):
    """Sends what is missing over a new connection, and returns once all is there."""

    def __call__(self, link: Callable[[], Peer], tell: Callable[[Progress], object] = ..., /) -> None: ...


@frozen
class Ways:
    """The ways to go on with a copy that stands still.

    Attributes:
        here: let it go on; None where it runs at its destination. resume: make the connection for pages anew, and send
            what is missing; None without post-copy. where: the URI of that.
    """

    here: Callable[[], None] | None
    resume: Resume | None = None
    where: str = ""


def recoverable(machine: Machine, ways: Ways | None) -> None:
    """From now on :func:`migrate_recover` has these *ways*; None for none."""
    with _lock:
        if ways is None:
            _ways.pop(machine, None)
        else:
            _ways[machine] = ways


def standing(machine: Machine) -> Ways | None:
    """The ways of a copy that stands still until :func:`migrate_recover`; None for any other machine."""
    with _lock:
        return _ways.get(machine)


def migrate_recover(
    self: Machine,
    uri: str | None = None,
    *,
    tls_dir: str | os.PathLike[str] | None = None,
    tls_hostname: str = "",
) -> None:
    """Go on with a migration that broke off.

    At a source whose machine runs at its destination already, by post-copy: connect to it anew, at *uri*, by default
    where the machine went, and send the memory that is missing there; this returns once all of it is there. *tls_dir*
    and *tls_hostname* are as for ``migrate``.

    Elsewhere, without *uri*, go on with a machine that stands still because its migration broke off in the moment of
    the switch. Whoever calls it knows that no other copy runs: that is what nobody could tell. A disk is the witness
    where there is one: it is locked, and must be as this copy left it. A source of post-copy can be told a *uri* then
    too: whether its machine runs there is found out so.

    Raises StateError for a machine that no migration left so, HostError where a disk is another's or was changed,
    LinkLost.
    """
    found = standing(self)
    if found is None:
        raise StateError(f"{self.name}: no migration of it waits to be recovered")
    if found.here is None and found.resume is None:
        raise StateError(f"{self.name} runs where it was migrated to, or was lost there")
    if found.here is not None and uri is None:
        found.here()
    elif found.resume is None:
        raise UsageError(f"{self.name}: no memory of it is missing anywhere: expected no URI")
    else:
        from cardcage_migrate.reach import connect, parse
        from cardcage_migrate.relay import relayed

        place = parse(uri or found.where)
        place.ask(self.mediator, self.label, self.name, listen=False)

        def link() -> Peer:
            peer: Any = connect(place, tls_dir, tls_hostname)[0]
            return peer if tls_dir is None else relayed(peer)

        found.resume(link)
