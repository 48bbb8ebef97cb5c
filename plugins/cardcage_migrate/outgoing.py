"""A migration out of this process: RAM goes over while the guest runs, and then the guest; or the other way round.

The machine is the source's until it says COMMIT, and from there on the destination's. Whatever goes wrong before, the
source goes on. What goes wrong after that leaves at most one copy running: the source stands still, and goes on only
when the destination says that it has not run and never will, or when somebody who knows says so (``migrate_recover``).
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from cardcage.errors import CardcageError, HostError, StateError, UsageError
from cardcage.machine import State
from cardcage.security import OPERATOR, Act
from cardcage.units import say_size
from cardcage.waiting import Event
from cardcage_snapshot.creating import cards_of, has_agent, savable
from cardcage_snapshot.manifest import converter
from cardcage_snapshot.pages import held
from cardcage_snapshot.sealing import prepared
from cardcage_snapshot.state import capture, dumps, warm

from cardcage_migrate.disks import checked, held_disks
from cardcage_migrate.following import Following
from cardcage_migrate.hold import Hold, Ways, recoverable, standing
from cardcage_migrate.limits import Limits
from cardcage_migrate.pages import Written, bodies, joined, uncollected, why_not
from cardcage_migrate.passport import Passport, boot_id, this_process
from cardcage_migrate.progress import new_progress
from cardcage_migrate.reach import Program
from cardcage_migrate.throttle import Throttle
from cardcage_migrate.wire import PIECE, RUN, Channel, Kind, LinkLost, Refused

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.machine import Machine
    from cardcage_snapshot.pages import Run

    from cardcage_migrate.passport import Stamp
    from cardcage_migrate.progress import Progress
    from cardcage_migrate.wire import Peer

__all__ = ["Cancelled", "Limits", "Outgoing", "moving"]

OWN = 0.02
"""Seconds that the source itself takes at the switch."""
DISK = 0.005
"""Seconds that a disk takes to change hands."""
SLOW = 0.5
"""Of the bytes that went over in a pass: where the guest writes more meanwhile, another pass gains little, and it is
held up if it stands still for too long so."""
LITTLE = 1 << 20
"""Bytes that are not worth another pass."""
MANY = 30
"""Passes for the sake of a stop that is shorter than it has to be."""
PATIENT = 3
"""Passes before it is held up."""
TELL = 0.1
"""Seconds between two words about the progress."""
_busy: WeakKeyDictionary[Machine, Outgoing] = WeakKeyDictionary()
_lock = threading.Lock()


class Cancelled(StateError):
    """The migration was given up; the machine goes on here."""


def moving(machine: Machine) -> Outgoing:
    """The migration of *machine* that is under way. Raises StateError without one."""
    with _lock:
        found = _busy.get(machine)
    if found is None:
        raise StateError(f"{machine.name} is not being migrated")
    return found


class Outgoing:
    """One migration of *machine*, which has to be all that moves it. Raises StateError, in one line, for a machine that
    cannot be moved; nothing has happened then.

    Args:
        stays: its process does not end with the migration: it stands still here, and can be recovered, until it is
            ended.

    Attributes:
        recovered: called once it was recovered here.
    """

    def __init__(
        self,
        machine: Machine,
        where: str,
        limits: Limits,
        tell: Callable[[Progress], object] | None = None,
        *,
        stays: bool = False,
    ) -> None:
        if machine.state not in (State.RUNNING, State.PAUSED):
            raise StateError(f"cannot migrate: the machine is {machine.state}")
        if machine.state is State.PAUSED and limits.mode == "postcopy":
            raise StateError("cannot migrate by post-copy: the machine is paused, and waits for no memory there")
        self._machine, self._where, self._limits, self._tell, self._stays = machine, where, limits, tell, stays
        self.recovered: Callable[[], object] = lambda: None
        self._block = savable(machine)
        if why := why_not(machine):
            raise StateError(f"{machine.name} cannot be migrated: {why}")
        self._tables, self._seal = prepared(machine)
        self._disks = held_disks(machine)
        checked(self._disks, self._tables)
        self._due: list[Run] = []
        """Pages that were written before the last pass, and have not gone over."""
        self._left: list[tuple[Any, Stamp | None]] = []
        machine.mediator.check(Act(OPERATOR, machine.label, "machine", ("migrate_out",), {"machine": machine.name}))
        self._running = machine.state is State.RUNNING
        self._cancelled, self._given_up = Event(), False
        self._hold: Hold | None = None
        self._written: Written | None = None
        self._throttle: Throttle | None = None
        self._channel: Channel
        self._following: Following | None = None
        self._told_to, self._sent_to = Event(), 0
        self._began = self._stopped = self._told = 0.0
        self._fixed = OWN + DISK * len(self._disks)

    def cancel(self) -> None:
        """Give it up. Any thread. Raises StateError once the machine is the destination's."""
        with _lock:
            if self._given_up:
                raise StateError(f"{self._machine.name}: too late: it was given up to {self._where}")
            self._cancelled.set()

    def go_over(self) -> None:
        """Let the guest go over now, and the rest follow. Any thread. Raises StateError where it cannot."""
        if self._limits.mode != "hybrid":
            raise StateError(f'{self._machine.name} is migrated with the mode "{self._limits.mode}": expected "hybrid"')
        with _lock:
            if self._given_up:
                raise StateError(f"{self._machine.name}: it was given up to {self._where} already")
            self._told_to.set()

    def over(self, link: Callable[[], tuple[Peer, bool]]) -> Progress:
        """Make the connection and carry the machine over it. See :func:`migrate`.

        Args:
            link: makes a connection to the destination, and says whether nothing can come back on it. It is called once
                more, for the pages, unless the mode is ``precopy``.
        """
        with _lock:
            if self._machine in _busy or standing(self._machine):
                raise StateError(f"{self._machine.name} is being migrated already")
            _busy[self._machine] = self
        try:
            return self._over(link)
        finally:
            with _lock:
                del _busy[self._machine]

    def _over(self, link: Callable[[], tuple[Peer, bool]]) -> Progress:
        self._progress = progress = new_progress(self._machine, self._where)
        progress.mode = self._limits.mode
        self._began = time.monotonic()
        try:
            peer, one_way = link()
            self._channel = Channel(peer, patience=self._limits.patience, one_way=one_way)
            try:
                self._carry(link)
            except BaseException as error:
                self._undo(error)
                raise
            finally:
                self._channel.close()
                if self._following is not None and not standing(self._machine):
                    self._following.close()
        except BaseException as error:
            if not self._given_up:
                progress.status = "cancelled" if isinstance(error, Cancelled) else "failed"
            progress.error = progress.error or str(error)
            raise
        finally:
            progress.total = time.monotonic() - self._began
            self._report(now=True)
        return progress

    # while the guest runs

    def _carry(self, link: Callable[[], tuple[Peer, bool]]) -> None:
        channel, progress = self._channel, self._progress
        channel.begin()
        channel.send(Kind.HELLO, self._passport().written())
        warm(self._machine)
        later = self._limits.mode != "precopy"
        if later and channel.one_way:
            raise UsageError(f"post-copy: nothing can come back from {self._where}")
        if not channel.one_way:
            accept = channel.receive(Kind.ACCEPT)
            self._fixed += accept.argument / 1e9
            if later:
                self._following = self._followed(bytes(accept.body))
                self._machine.defer(self._following.close)
                self._following.join(link()[0])
            self._fixed += 3 * self._ping()
            if self._fixed > self._limits.downtime and self._running and not self._limits.ram_alone:
                least, most = (f"{one * 1000:.0f} ms" for one in (self._fixed, self._limits.downtime))
                raise UsageError(f"the guest would stand still for about {least} at the least: downtime is {most}")
        progress.status = "active"
        self._written = Written(self._machine, self._block)
        self._throttle = Throttle(self._machine)
        try:
            over = self._converge()
            with uncollected():
                self._switch(over)
            if over is not None:
                over.follow()
        finally:
            self._throttle.close()
            if self._machine.state is not State.STOPPED:
                self._written.close()

    def _followed(self, secret: bytes) -> Following:
        ways = self._machine, self._where, secret, self._limits, self._progress
        return Following(*ways, self._report, self._stay, self._completed)

    def _passport(self) -> Passport:
        machine = self._machine
        from importlib.metadata import version

        return Passport(
            version("cardcage"),
            machine.name,
            machine.label,
            int(machine.config.machine.memory),
            len(machine.vcpus),
            machine.accelerator.name,
            self._tables,
            cards_of(machine),
            self._seal,
            [one.described() for one in self._disks],
            boot_id(),
            has_agent(machine),
            self._channel.one_way,
            not self._running,
            self._limits.mode != "precopy",
            this_process() if self._limits.mode != "precopy" else "",
        )

    def _ping(self) -> float:
        """Seconds until the other side has taken all that was sent."""
        began = time.monotonic()
        if not self._channel.one_way:
            self._channel.send(Kind.PING)
            self._channel.receive(Kind.PONG)
        return time.monotonic() - began

    def _converge(self) -> Following | None:
        """Pass after pass, until what is left is little enough; or until the guest is to go over before it, by what is
        returned then."""
        assert self._written is not None
        assert self._throttle is not None
        progress, limits = self._progress, self._limits
        runs, link, said = self._written.touched(), 0.0, False
        if limits.mode == "postcopy":
            self._due = runs
            return self._following
        while True:
            progress.passes += 1
            progress.remaining = held(runs)
            began = time.monotonic()
            size, waited = self._send(runs, zeros=progress.passes > 1, limit=limits.bandwidth, until=self._told_to)
            if self._told_to.is_set():
                self._due = [one for one in runs if sum(one) > self._sent_to]
                return self._following
            self._ping()
            took = time.monotonic() - began
            progress.rate = size / took if took else 0.0
            if size >= PIECE or not link:
                link = max(size, PIECE) / max(took - waited, 1e-6)
            if not self._running:
                return None
            runs = self._due = self._written.fetch()
            progress.remaining = left = held(runs)
            progress.dirtied = left / took if took else 0.0
            progress.expected = left / link + self._fixed
            self._report()
            late = limits.timeout is not None and time.monotonic() - self._began > limits.timeout
            if progress.expected <= limits.downtime + (self._fixed if limits.ram_alone else 0) and (
                left <= LITTLE or left > SLOW * size or progress.passes >= MANY or late
            ):
                return None  # it may stand still so long, and another pass would not make that much shorter
            slow = progress.passes >= PATIENT and left > SLOW * size
            if self._following is not None and not limits.told_only and (late or slow):
                self._machine.log.info(
                    "the migration does not converge: the guest goes over, and the rest of its memory follows",
                    left=say_size(left),
                )
                return self._following
            if late:
                if limits.strategy == "force":
                    self._machine.log.warning(
                        "the migration does not converge: the guest stands still for longer than it should",
                        expected=f"{progress.expected:.3f} s",
                    )
                    return None
                raise Cancelled(
                    f"{self._machine.name}: after {limits.timeout:g} s the guest would still stand still for "
                    f"{progress.expected:.2f} s: the migration is given up"
                )
            if limits.throttle and slow and self._throttle.more():
                progress.throttle = self._throttle.percent
                self._machine.log.warning(
                    "the migration does not converge: the guest writes too much, and its vCPUs are held up",
                    percent=progress.throttle,
                    written=f"{say_size(int(progress.dirtied))}/s",
                    sent=f"{say_size(int(progress.rate))}/s",
                )
            elif not said and slow:
                said = True
                self._machine.log.warning("the migration does not converge: the guest writes more than can be sent")

    def _send(
        self, runs: list[Run], *, zeros: bool, limit: int | None = None, until: Event | None = None
    ) -> tuple[int, float]:
        """Send these, *until* that is set; returns bytes, and seconds of waiting for the sake of the *limit*."""
        piece = PIECE if limit is None else min(PIECE, max(limit // 20 // 4096 * 4096, 4096))
        began, waited, size, first = time.monotonic(), 0.0, 0, self._channel.sent
        self._sent_to = 0
        for number, body in bodies(self._block, runs, piece=piece, zeros=zeros):
            if self._cancelled.is_set():
                raise Cancelled(f"{self._machine.name}: the migration was cancelled")
            if self._machine.state is State.STOPPED:
                raise StateError(f"{self._machine.name} ended: {self._machine.outcome}")
            if until is not None and until.is_set():
                break
            self._channel.send(Kind.PAGES, body, argument=number)
            self._sent_to = sum(RUN.unpack_from(body, (number - 1) * RUN.size))
            size = self._channel.sent - first
            self._report()
            if limit is not None and (ahead := size / limit - (time.monotonic() - began)) > 0:
                self._cancelled.wait(ahead)
                waited += ahead
        return size, waited

    # while it stands still

    def _switch(self, over: Following | None) -> None:
        """Hand the machine over; with *over* before its RAM is there."""
        assert self._written is not None
        assert self._throttle is not None
        machine, channel, progress = self._machine, self._channel, self._progress
        for one in self._disks:
            one.backend.flush()  # the guest runs: little is left for later
        if over is not None:
            over.miss(channel, self._due)
            self._ping()
        self._throttle.close()
        progress.status = "switching"
        self._hold = Hold(machine, f"it is on its way to {self._where}")
        self._stopped = time.monotonic()
        if self._running:
            machine.pause()
        if machine.state is not State.PAUSED:
            raise StateError(f"{machine.name} ended: {machine.outcome}")
        state = dumps(capture(machine)).encode()
        if over is not None:
            over.miss(channel, self._written.fetch())
            over.begin()
        else:
            self._send(joined([*self._due, *self._written.fetch()]), zeros=True)
        for at in range(0, len(state), PIECE):
            channel.send(Kind.STATE, state[at : at + PIECE])
        channel.send(Kind.END)
        if not channel.one_way:
            channel.receive(Kind.READY)
        if over is not None:
            over.check()
        for one in self._disks:
            self._left.append((one, None))
            self._left[-1] = one, one.let_go()
        with _lock:  # from here on it is too late to cancel
            if self._cancelled.is_set():
                raise Cancelled(f"{machine.name}: the migration was cancelled")
            if machine.state is not State.PAUSED:
                raise StateError(f"{machine.name} ended: {machine.outcome}")
            self._given_up = True
        program = channel.peer if channel.one_way and isinstance(channel.peer, Program) else None
        if program is None:  # else it is not over before the program is
            progress.status = "given up"
        import json

        stamps = [converter().unstructure(left) for _, left in self._left if left is not None]
        channel.send(Kind.COMMIT, json.dumps(stamps).encode())
        if channel.one_way:
            if program is not None:  # what it failed to pass on nobody has
                program.finish(lambda: machine.state is not State.STOPPED)
            progress.downtime = time.monotonic() - self._stopped
            self._stay(f"it was sent to {self._where}", "completed" if self._stays else "given up")
            return
        try:
            channel.receive(Kind.STARTED)
        except LinkLost:  # the other connection may know
            if over is None or not over.await_runs():
                raise
        progress.downtime = time.monotonic() - self._stopped
        if over is None:
            self._completed()

    def _completed(self) -> None:
        machine, progress = self._machine, self._progress
        progress.status, progress.remaining = "completed", 0
        machine.log.info("migrated", to=self._where, downtime=f"{progress.downtime * 1000:.0f} ms")
        if self._stays:
            went = self._following is not None and self._following.goes
            self._stay(f"it was migrated to {self._where}", "completed", Ways(None) if went else None)
            return
        self._report(now=True)
        machine.stop(f"migrated to {self._where}")

    # when it goes wrong

    def _undo(self, error: BaseException) -> None:
        """Go on here if nobody else can have the machine; else stand still, and say so in *error*."""
        if self._progress.status == "completed" or standing(self._machine):
            return  # only its end here went wrong, or all is said
        if self._given_up and not isinstance(error, Refused):
            self._stay(f"it was given up to {self._where}, and nobody answered")
            if self._following is not None and self._following.goes:
                self._following.linger()
            raise LinkLost(
                f"{error}: {self._machine.name} was given up to {self._where} and stands still here. If it runs there, "
                f'end it here; if it does not, "cardcage migrate recover" (migrate_recover) goes on with one of them'
            ) from error
        self._given_up = False
        if not isinstance(error, Refused | LinkLost) and not self._channel.one_way:
            with suppress(HostError):  # it will find out
                self._channel.say(Kind.ABORT, "the source goes on with it")
        try:
            self._go_on()
        except CardcageError as other:
            self._given_up = True
            self._progress.status = "given up"
            self._stay(f"it cannot go on after its migration failed: {other}")
            raise

    def _stay(self, why: str, status: str = "given up", ways: Ways | None = None) -> None:
        """Stand still until it is recovered."""
        assert self._hold is not None
        if ways is None:
            resume = self._following.resume if self._following is not None and self._following.goes else None
            ways = Ways(self._recover, resume, self._where)
            why = f'{why}; "cardcage migrate recover" goes on with it here'
        self._hold.drop()
        self._hold = Hold(self._machine, why)
        recoverable(self._machine, ways)
        self._progress.status = status

    def _recover(self) -> None:
        if self._following is not None:
            if self._following.known:
                raise StateError(f"{self._machine.name} runs at {self._where}")
            self._following.close()
        self._go_on()
        recoverable(self._machine, None)
        self._progress.status = "failed"
        self.recovered()
        self._machine.log.warning("recovered: it goes on here", migration=self._where)

    def _go_on(self) -> None:
        """Take the disks back, and run if it ran. Raises HostError where a disk is another's now."""
        while self._left:
            one, left = self._left[-1]
            one.take_back(left)
            self._left.pop()
        if self._hold is not None:
            self._hold.drop()
            if self._running and self._machine.state is State.PAUSED:
                self._machine.resume()

    def _report(self, *, now: bool = False) -> None:
        progress, moment = self._progress, time.monotonic()
        progress.total = moment - self._began
        if hasattr(self, "_channel"):
            progress.sent = self._channel.sent + (0 if self._following is None else self._following.sent)
        if self._tell is not None and (now or moment - self._told > TELL):
            self._told = moment
            self._tell(progress)
