"""A machine that is built, and waits to become one that comes: QEMU's ``-incoming`` and ``migrate-incoming``.

Its configuration is that of who made it; RAM, state and disks come from the source. It does not start before.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Literal
from weakref import WeakKeyDictionary

from cardcage.errors import FAULTS, CardcageError, HostError, StateError, in_words
from cardcage.waiting import Event
from cardcage_snapshot.sealing import original
from cardcage_snapshot.tables import ids_of, tables_of

from cardcage_migrate.disks import KEY, original_spec
from cardcage_migrate.hold import Hold
from cardcage_migrate.incoming import Arrival, Incomplete

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.machine import Machine

    from cardcage_migrate.credentials import Credentials

__all__ = ["Expected", "Status", "expect", "expected", "waiting_drive", "waiting_memory"]

Status = Literal["setup", "active", "completed", "failed", "postcopy-active", "postcopy-paused"]
MEMORY: dict[str, Status] = {"active": "postcopy-active", "paused": "postcopy-paused", "failed": "failed"}
"""Words for it once the machine is here, by how its memory comes."""
END = 5.0
"""Seconds that the thread may take to end with its machine; one that reads from a pipe does not hear of it."""


def waiting_drive(spec: object) -> dict[str, object]:
    """The drive of a device whose disk is another machine's until it comes."""
    return {"type": "arriving", "disk": spec}


def waiting_memory(table: dict[str, object]) -> None:
    """Let a machine with this table ``[memory]`` have memory that may come after it, where it has no other kind."""
    table.setdefault("type", "arriving")


class Expected:
    """One that is expected to come into *machine*, which is built and has not started.

    Attributes:
        status: in QEMU's words, None before somebody listens. error: why it failed.
        tell: called with each status, on whatever thread.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._hold = Hold(machine, "it waits for the machine that is to come into it")
        self._over, self._runs, self._ended = Event(), Event(), Event()
        self._here = False
        self._lock = threading.Lock()
        self._arrival: Arrival[Machine] | None = None
        self._thread: threading.Thread | None = None
        self.status: Status | None = None
        self.error: CardcageError | None = None
        self.tell: Callable[[Status], object] = lambda status: None
        machine.observers.add("state", lambda state: self._end() if state == "stopped" else None)
        machine.defer(self._close)
        tables = tables_of(machine.config, ids_of(machine))
        for one in tables["device"]:
            if KEY in one:
                one[KEY] = original_spec(one[KEY])
        if tables["memory"].get("type") == "arriving":
            del tables["memory"]["type"]
        original(machine, tables)

    def listen(self, uri: str, tls: Credentials | None = None) -> None:
        """Wait at *uri* from now on, on a thread. Raises what opening it raises, StateError where one waits already."""
        machine = self._machine
        with self._lock:
            if self._arrival is not None or self._ended.is_set():
                raise StateError("The incoming migration has already been started")
            arrival = Arrival(type(machine), uri, machine.name, host=machine.host, into=machine)
            arrival.open(tls=tls)
            arrival.memory_told = self._memory
            self._arrival = arrival
            self._thread = threading.Thread(target=self._take, name=f"{machine.name}-incoming", daemon=True)
            self._say("setup")
            self._thread.start()

    @property
    def address(self) -> tuple[str, int] | None:
        """Address and port at which it listens; None but for ``tcp:``, and once somebody has come."""
        return None if self._arrival is None else self._arrival.address

    @property
    def paused(self) -> bool:
        """The machine was paused at its source."""
        return self._arrival is not None and self._arrival.paused

    def wait(self) -> bool:
        """Wait until it is all here; False where the machine was ended before. Raises why nothing came."""
        self._over.wait()
        if self.error is not None:
            raise self.error
        return not self._ended.is_set()

    def started(self) -> None:
        """The machine runs now."""
        self._runs.set()

    def _say(self, status: Status) -> None:
        self.status = status
        self.tell(status)

    def _memory(self) -> None:
        """Tell how the memory comes, once the machine is here."""
        assert self._arrival is not None
        now = MEMORY.get(self._arrival.memory_status, "completed")
        if self._here and now != self.status:
            self._say(now)

    def _take(self) -> None:
        assert self._arrival is not None
        arrival = self._arrival
        if came := self._came(arrival):
            self._hold.drop()
            self._here = True
            self._memory()
        self._over.set()
        if came:
            self._runs.wait()
            if not self._ended.is_set():
                arrival.settle()

    def _came(self, arrival: Arrival[Machine]) -> bool:
        try:
            arrival.wait()
            self._say("active")
            arrival.machine()
            return True
        except Incomplete as error:  # it stands still; whoever knows that its source does goes on with it
            self._machine.log.warning("the migration broke off", why=str(error))
            self._say("failed")
            return arrival.await_recovery()
        except FAULTS as error:
            if not self._ended.is_set():
                self.error = error if isinstance(error, CardcageError) else HostError(in_words(error))
                self._say("failed")
            return False

    def _end(self) -> None:
        self._ended.set()
        self._over.set()
        self._runs.set()
        with self._lock:
            arrival = self._arrival
        if arrival is not None:
            arrival.abandon()

    def _close(self) -> None:
        self._end()
        if self._thread is not None:
            self._thread.join(END)


def _known(machine: Machine) -> WeakKeyDictionary[Machine, Expected]:
    found: WeakKeyDictionary[Machine, Expected] = machine.host.share("migrate:expected", WeakKeyDictionary)
    return found


def expect(machine: Machine) -> Expected:
    """From now on *machine*, which is built, waits for one that comes into it."""
    known = _known(machine)
    if machine not in known:
        known[machine] = Expected(machine)
    return known[machine]


def expected(machine: Machine) -> Expected | None:
    """The one that *machine* waits for, or has become; None for one that was made to boot."""
    return _known(machine).get(machine)
