"""``Machine.incoming()``: a machine that comes from another process or host, and goes on here."""

from __future__ import annotations

import copy
import os
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from cardcage.abilities import has
from cardcage.errors import FAULTS, CardcageError, ConfigError, HostError, StateError, UsageError, in_words
from cardcage.machine import State
from cardcage.security import OPERATOR, Act
from cardcage.waiting import Event
from cardcage_snapshot.restoring import STATE_MOST, given, machine_of, may_boot
from cardcage_snapshot.sealing import is_ours, original
from cardcage_snapshot.state import capture, dumps, loads
from cardcage_snapshot.state import restore as load_state

from cardcage_migrate.announce import announce
from cardcage_migrate.disks import arrivals, awaited, replaced
from cardcage_migrate.hold import Hold, Ways, recoverable
from cardcage_migrate.pages import put, uncollected
from cardcage_migrate.paging import Pager, Paging, own_ram
from cardcage_migrate.passport import Passport, Stamp, structured, this_process
from cardcage_migrate.progress import new_progress
from cardcage_migrate.reach import DIAL, Waiting, hang_up, parse
from cardcage_migrate.wire import SECRET, BrokenStream, Channel, Kind, LinkLost, Refused, bare_runs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from cardcage.host import Host
    from cardcage.machine import Machine

    from cardcage_migrate.credentials import Credentials
    from cardcage_migrate.progress import Progress

M = TypeVar("M", bound="Machine")

__all__ = ["Arrival", "incoming"]

SILENT = 60.0
"""Seconds that a source may be silent once it has said what machine it sends."""
AGENT = 5.0
"""Seconds that the agent of the guest may take to hear what time it is."""


def incoming(
    cls: type[M],
    uri: str,
    *,
    name: str | None = None,
    accel: str | Iterable[str] | None = None,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    trust: bool = False,
    any_cpu: bool = False,
    tls_dir: str | os.PathLike[str] | None = None,
    timeout: float | None = None,
    waiting: Callable[[Waiting], object] | None = None,
    host: Host | None = None,
) -> M:
    """Wait at *uri* for a machine that is migrated here; it runs when this returns (or is built, where it was paused:
    then ``start(boot=False)`` goes on with it).

    Args:
        uri: ``unix:PATH``, ``tcp:HOST:PORT`` (port 0: a free one), ``exec:COMMAND``, ``fd:NUMBER``, ``file:PATH``.
        name: of the machine, by default that of the source's; a number is added to one that is taken.
        accel: accelerators to try, by default as the source's configuration says.
        config: the machine's configuration, a TOML file or tables, instead of the one that comes along.
        trust: take the configuration of a machine that is not this account's. It can name any file of this host.
        any_cpu: go on also where the processor lacks features that the guest was told of.
        tls_dir: directory with ``ca-cert.pem``, ``server-cert.pem`` and ``server-key.pem``; the source has to show a
            certificate of that authority.
        timeout: seconds until somebody connects, None for as long as it takes.
        waiting: called once there is somebody to connect to.
        host: whose cards to use; by default a private one.

    Raises ConfigError, HostError, Denied: it goes on at the source then, which is told why. LinkLost with the attribute
    ``machine`` has a copy that is complete and stands still, because nobody knows whether the source goes on: its
    ``migrate_recover`` goes on here; else close it.
    """
    arrival: Arrival[M] = Arrival(cls, uri, name, accel, config, trust, any_cpu, host)
    arrival.wait(tls_dir, timeout, waiting)
    return arrival.machine()


class GetsReady(Protocol):
    """A VM that loads some of its code when a guest first needs it."""

    def get_ready(self) -> None:
        """Load it now."""


class Arrival(Generic[M]):
    """One machine that comes. The arguments are those of :func:`incoming`.

    Args:
        console: char back end for its console, where a device has that.
        may_pause: take one that was paused at its source, which is then built, and not started.
        into: a machine that is built, and is to be the one that comes; whoever made it starts it.
    """

    def __init__(
        self,
        cls: type[M],
        uri: str,
        name: str | None = None,
        accel: str | Iterable[str] | None = None,
        config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        trust: bool = False,
        any_cpu: bool = False,
        host: Host | None = None,
        *,
        console: str | None = None,
        may_pause: bool = True,
        into: M | None = None,
    ) -> None:
        self._console, self._may_pause, self._into = console, may_pause, into
        self._cls, self._name, self._accel, self._host = cls, name, accel, host
        self._place, self._trust, self._any_cpu = parse(uri), trust, any_cpu
        self._given = None if config is None else given(config)
        self._channel: Channel
        self._passport: Passport
        self._hold: Hold
        self._vm: M
        self._tls_dir: str | None = None
        self._pager: Pager | None = None
        self._paging: Paging | None = None
        self.memory_told: Callable[[], object] = lambda: None
        self._going_on = threading.Lock()
        self._goes_on = Event()
        self._door: Waiting | None = None

    @property
    def address(self) -> tuple[str, int] | None:
        """Address and port at which it listens; None but for ``tcp:``, and once somebody has come."""
        return None if self._door is None else self._door.address

    @property
    def paused(self) -> bool:
        """The machine was paused at its source."""
        return self._passport.paused

    def open(self, tls_dir: str | os.PathLike[str] | None = None, *, tls: Credentials | None = None) -> Waiting:
        """Listen. Raises HostError, ConfigError, Denied."""
        if self._door is None:
            folder = tls_dir if tls is None else tls.folder
            self._tls_dir = None if folder is None else os.fspath(folder)
            if self._host is not None:
                self._place.ask(self._host.mediator, OPERATOR, self._name or "", listen=True)
            self._door = Waiting(self._place, tls_dir, tls=None if tls is None else tls.context)
        return self._door

    def abandon(self) -> None:
        """Whoever waits here for a machine, or takes one, hears that there is none. Any thread."""
        for one in (self._door, getattr(getattr(self, "_channel", None), "peer", None)):
            if one is not None:
                hang_up(one)

    def wait(
        self,
        tls_dir: str | os.PathLike[str] | None = None,
        timeout: float | None = None,
        waiting: Callable[[Waiting], object] | None = None,
    ) -> None:
        """Wait for a source that says what machine it sends. Raises HostError, BrokenStream, LinkLost."""
        place, door = self._place, self.open(tls_dir)
        try:
            if waiting is not None:
                waiting(door)
            until = None if timeout is None else time.monotonic() + timeout
            while True:
                try:
                    peer, one_way = door.accept(None if until is None else max(until - time.monotonic(), 0.001))
                except TimeoutError as error:
                    raise LinkLost(f"{place}: nobody came within {timeout:g} s") from error
                except HostError as error:
                    self._strange(door, error)
                    continue
                self._channel = Channel(peer, patience=DIAL, one_way=one_way)
                try:
                    self._channel.meet()
                    self._passport = Passport.read(bytes(self._channel.receive(Kind.HELLO).body))
                    if one_way and not self._passport.one_way:
                        raise BrokenStream(f"{place}: the source waits for answers, which go nowhere")
                    return
                except HostError as error:
                    self._channel.close()
                    self._strange(door, error)
        finally:
            if not (hasattr(self, "_passport") and self._passport.postcopy):  # else somebody comes for its memory
                door.close()

    def _strange(self, door: Waiting, error: HostError) -> None:
        """Go on waiting after somebody who is no source, unless nobody else can come."""
        if door.only_one:
            raise error
        if self._host is not None:
            self._host.log.warning("who connected sent no machine", where=str(self._place), why=str(error))

    def machine(self) -> M:
        """Take it. Raises as :func:`incoming`."""
        channel = self._channel
        channel.one_way = channel.one_way or self._passport.one_way
        try:
            self._take()
        except LinkLost as error:
            if not hasattr(error, "machine"):
                self._drop(error)
            raise
        except BaseException as error:
            self._drop(error)
            raise
        finally:
            channel.close()
            if self._paging is None and self._door is not None:
                self._door.close()
        return self._vm

    @property
    def memory_status(self) -> str:
        """``active`` or ``paused`` while memory comes after the machine, else ``done``, ``failed`` or empty."""
        return "" if self._paging is None or not self._paging.expected else self._paging.status

    def _drop(self, error: BaseException) -> None:
        """Nothing is left here, and the source hears why."""
        if not self._channel.one_way and not isinstance(error, Refused | LinkLost):
            with suppress(HostError):  # it finds out
                self._channel.say(Kind.FAILED, str(error) if isinstance(error, CardcageError) else in_words(error))
        if hasattr(self, "_vm") and self._into is None:
            self._vm.dismantle()
        elif self._paging is not None:
            self._paging.close()

    def _take(self) -> None:
        channel = self._channel
        self._build()
        vm = self._vm
        self._progress = progress = new_progress(vm, str(self._place))
        began = time.monotonic()
        channel.set_patience(SILENT)
        secret = self._page(progress) if self._passport.postcopy else b""
        self._get_ready()
        if not channel.one_way:
            took = self._rehearsed()
            if self._pager is not None:
                self._pager.ready()
            channel.send(Kind.ACCEPT, secret, argument=took)
        progress.status = "active"
        state = self._receive()
        with uncollected():
            self._switch(state)
        progress.total = time.monotonic() - began
        if not self._started_there():
            progress.status = "completed"
        if not channel.one_way:
            try:
                channel.send(Kind.STARTED)
            except LinkLost:  # the source stands still and says how to find out
                vm.log.warning("the source could not be told that the machine runs here: it stands still there")
        if self._into is None:
            self.settle()

    def _page(self, progress: Progress) -> bytes:
        """Have a pager; return the secret by which it knows the source."""
        assert self._door is not None
        if self._passport.process == this_process():
            raise ConfigError("post-copy: the source is this very process, which could wait for a page of its own")
        secret = os.urandom(SECRET)
        self._pager = Pager(self._vm, self._door, secret, self._tls_dir, SILENT)
        self._paging = Paging(self._vm, self._pager, progress, lambda: self.memory_told())
        return secret

    def _started_there(self) -> bool:
        """Let the source's pager know that the guest runs; False where none has memory come."""
        if self._paging is None or not self._paging.expected:
            return False
        self._paging.started()
        return True

    def _switch(self, state: bytes) -> None:
        """Load what came, and run once the source has given the machine up."""
        vm, progress = self._vm, self._progress
        if self._paging is not None:
            if self._paging.expected:
                self._paging.begin()
            else:  # it was all sent before
                self._paging.close()
        try:
            load_state(vm, loads(state.decode()), any_cpu=self._any_cpu)
        except (ConfigError, UnicodeDecodeError, RecursionError) as error:
            raise BrokenStream(f"{vm.name}: {error}") from error
        if self._paging is not None and self._paging.expected:
            self._paging.loaded()
            progress.mode = "postcopy"
        progress.status = "waiting"
        stamps = self._await_commit()
        try:
            self._go_on(stamps)
        except FAULTS as error:
            progress.status, progress.error = "failed", str(error)
            raise

    def _build(self) -> None:
        if self._into is not None:
            self._vm = self._into
            awaited(self._vm, self._passport.disks, self._passport.host)
            self._hold = Hold(self._vm, f"it is on its way here from {self._place}")
        else:
            self._make()
        vm, passport = self._vm, self._passport
        vm.mediator.check(Act(OPERATOR, vm.label, "machine", ("migrate_in",), {"machine": vm.name}))
        if self._console is not None and vm.console.claimed:
            vm.open_console(self._console)
        if self._into is None:
            may_boot(vm, (vm.config.boot or {}).get("table", {}))
        if int(vm.config.machine.memory) != passport.memory or len(vm.vcpus) != passport.cpus:
            there, here = (
                f"{memory} bytes of memory and {cpus} vCPUs"
                for memory, cpus in (
                    (passport.memory, passport.cpus),
                    (int(vm.config.machine.memory), len(vm.vcpus)),
                )
            )
            raise ConfigError(f"the source has {there}, this machine {here}")

    def _make(self) -> None:
        passport, given = self._passport, self._given
        if passport.paused and not self._may_pause:
            raise ConfigError("the machine is paused: let it go on first, or take it in Python (Machine.incoming)")
        if given is None and not (self._trust or is_ours(passport.config, passport.label, passport.seal)):
            raise ConfigError(
                "the machine is not this account's, and its configuration can name any file of this host: trust it "
                "(--trust), or give another configuration (--config)"
            )
        tables = copy.deepcopy(passport.config if given is None else given)
        kept = copy.deepcopy(tables)
        machine, memory = tables.setdefault("machine", {}), tables.setdefault("memory", {})
        if not isinstance(machine, dict) or not isinstance(memory, dict):
            raise ConfigError("expected tables", key="machine, memory")
        machine |= {"name": self._name or passport.machine}
        if self._accel is not None:
            machine["accel"] = [self._accel] if isinstance(self._accel, str) else list(self._accel)
        if given is None and passport.label != passport.machine:
            machine["label"] = passport.label
        if memory.get("type") == "file":  # the source's RAM, on this host
            tables["memory"] = {"type": "memfd"}
        where = "the configuration that came along" if given is None else "the given configuration"
        if passport.postcopy:
            own_ram(tables)
        replaced(tables, passport.disks, passport.host)
        vm = machine_of(self._cls, tables, passport.devices, where, where, self._host)
        self._vm = vm
        original(vm, kept)
        self._hold = Hold(vm, f"it is on its way here from {self._place}")

    def _get_ready(self) -> None:
        """Do before the switch what else is done when a machine starts, and when a guest first runs.

        The jail, above all, which the stream is read in then; a disk that comes has to be opened before.
        """
        vm: Any = self._vm
        if self._into is None and not self._passport.paused and not self._passport.disks:
            vm.host.phases.call("starting", vm)
        if has(vm.vm, GetsReady):
            vm.vm.get_ready()

    def _rehearsed(self) -> int:
        """Nanoseconds that it takes to load a state. What is loaded is the machine's own, from before it ran."""
        for _ in range(2):  # nothing is done for the first time at the switch
            load_state(self._vm, loads(dumps(capture(self._vm))))
        text = dumps(capture(self._vm))
        began = time.monotonic_ns()
        load_state(self._vm, loads(text))
        return time.monotonic_ns() - began

    def _receive(self) -> bytes:
        """RAM, and then the state."""
        channel, block = self._channel, self._vm.memory.ranges[0].block
        state = bytearray()
        while True:
            expected = [Kind.STATE, Kind.END] if state else [Kind.PING, Kind.STATE]
            if self._paging is not None and not state:
                expected.append(Kind.MISSING)
            if not state and (self._paging is None or not self._paging.expected):
                expected.append(Kind.PAGES)
            frame = channel.receive(*expected)
            if frame.kind is Kind.PAGES:
                put(block, frame)
            elif frame.kind is Kind.MISSING:
                assert self._paging is not None
                self._paging.expect(bare_runs(frame, block.size))
            elif frame.kind is Kind.PING:
                channel.send(Kind.PONG)
            elif frame.kind is Kind.STATE:
                state += frame.body
                if len(state) > STATE_MOST or not frame.body:
                    raise BrokenStream(f"a state of more than {STATE_MOST} bytes")
            else:
                return bytes(state)

    def _await_commit(self) -> list[Stamp]:
        """Say that all is here, and hear the source's last word. LinkLost has the machine, which stands still."""
        vm, channel = self._vm, self._channel
        try:
            if not channel.one_way:
                channel.send(Kind.READY)
            body = bytes(channel.receive(Kind.COMMIT).body)
        except (LinkLost, BrokenStream) as error:
            if channel.one_way:  # a stream that was cut short; there is another copy
                raise
            self._hold.drop()
            self._hold = Hold(vm, 'its source may run: "cardcage migrate recover" goes on with it here')
            recoverable(vm, Ways(self._recover))
            self._progress.error = str(error)
            lost = Incomplete(
                f"{error}: {vm.name} is here and complete, but stands still: its source may go on with it. If it does "
                'not, "cardcage migrate recover" (migrate_recover) goes on here; else end this one'
            )
            lost.machine = vm
            raise lost from error
        found: list[Stamp] = structured(body, list[Stamp])
        return found

    def await_recovery(self) -> bool:
        """Wait until a copy that stands still goes on; False when it was ended instead."""
        while self._vm.state is State.BUILT and not self._goes_on.wait(0.2):
            pass
        return self._goes_on.wait(AGENT) and self._vm.state is not State.STOPPED

    def _recover(self) -> None:
        with self._going_on:
            if self._vm.state is not State.BUILT:
                raise UsageError(f"{self._vm.name} was recovered already")
            if self._paging is not None and self._paging.cut_off:
                raise StateError(
                    f"{self._vm.name}: memory of it is missing, and its source does not send it: recover that first, "
                    "with the URI of this one"
                )
            self._go_on([])
        recoverable(self._vm, None)
        if not self._started_there():
            self._progress.status = "completed"
        self._goes_on.set()
        self._vm.log.warning("recovered: it goes on here", migration=str(self._place))
        if self._into is None:
            self.settle()

    def _go_on(self, stamps: list[Stamp]) -> None:
        """Take the disks, and run."""
        arrivals(self._vm, stamps)
        self._hold.drop()
        if not self._passport.paused and self._into is None:
            self._vm.start(boot=False)

    def settle(self) -> None:
        """Tell the network where it is, and the guest what time it is. It runs, or was paused at its source."""
        vm: Any = self._vm
        if self._passport.paused and self._into is None:
            return
        announce(vm)
        if self._paging is not None and self._paging.expected:
            self._paging.afterwards(self._tell_time)  # till then its answer may be among what is missing
        else:
            self._tell_time()

    def _tell_time(self) -> None:
        vm: Any = self._vm
        if self._passport.agent and vm.services.get("agent") is not None:
            try:
                vm.agent.wait(AGENT)
                vm.agent.set_time(timeout=AGENT)
                return
            except (CardcageError, TimeoutError, OSError) as error:
                vm.log.warning("the guest's clock is behind by as long as it stood still", why=str(error))
        else:
            vm.log.info("the guest's clock is behind by as long as it stood still: no agent runs in it")


class Incomplete(LinkLost):
    """The link broke after all had come, and before the source gave the machine up, as far as is known here.

    Attributes:
        machine: it stands still; ``migrate_recover`` goes on with it, ``close`` throws it away.
    """

    machine: Any
