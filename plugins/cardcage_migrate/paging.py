"""The destination's end of post-copy: its pager (:mod:`cardcage_migrate.pager`), and the machine while pages come."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

from cardcage.errors import ConfigError, HostError
from cardcage.machine import State
from cardcage.ram import Anonymous
from cardcage.security import OPERATOR, Act
from cardcage.units import say_size
from cardcage_snapshot.faults import Faults

from cardcage_migrate import DOORS
from cardcage_migrate.faults import open_faults
from cardcage_migrate.hold import Hold
from cardcage_migrate.missing import Missing
from cardcage_migrate.pager import READY, Orders
from cardcage_migrate.wire import LinkLost

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from cardcage.machine import Machine
    from cardcage.ram import RamBlock

    from cardcage_migrate.progress import Progress
    from cardcage_migrate.reach import Waiting

__all__ = ["Pager", "Paging"]

START = 20.0
"""Seconds that the pager may take to be there: a Python that starts on a busy host."""
LOOK = 0.2
"""Seconds after which it is looked whether the machine has ended, while its source cannot be reached."""
COMING = ("save", "load", "fork", "migrate_out")
"""Acts that take all of the memory."""
WORDS = {"active": "postcopy-active", "paused": "postcopy-paused", "done": "completed", "failed": "failed"}
"""The words for it in :class:`~cardcage_migrate.progress.Progress`."""
MIGHT = frozenset({"anonymous", "arriving"})
"""Of them, ``arriving`` is :class:`cardcage_snapshot.arriving.ArrivingRam`: pages that never come end the machine, not
the process."""


def own_ram(tables: dict[str, Any]) -> None:
    """Let the machine of these *tables* have RAM whose pages may come later. Raises ConfigError where it has another
    kind."""
    memory = tables.setdefault("memory", {})
    kind = memory.get("type", "anonymous")
    if kind not in MIGHT:
        raise ConfigError(f'post-copy: memory of type "{kind}" cannot come later: expected "anonymous"')
    memory["type"] = "arriving"


class Pager:
    """The pager's process, with the socket that listens at *door*, which is its own from now on.

    Raises ConfigError, HostError, Denied.
    """

    def __init__(self, machine: Machine, door: Waiting, secret: bytes, tls_dir: str | None, patience: float) -> None:
        if door.only_one:
            raise ConfigError(
                f"post-copy: at {door.place} nobody can come a second time, as its pages do: expected unix: or tcp:"
            )
        kind = machine.memory.ranges[0].block.backend
        if not isinstance(kind, Anonymous):
            raise ConfigError(
                f"post-copy: memory of {type(kind).__name__} cannot come later: expected anonymous memory"
            )
        if door.secure and tls_dir is None:
            raise ConfigError("post-copy: the pager has no certificates: expected a directory of them (tls_dir)")
        if door.place.scheme == "unix":  # it is removed in the jail
            machine.host.share(DOORS, list).append(os.path.dirname(os.path.abspath(door.place.rest)))
        act = Act(OPERATOR, OPERATOR, "program", ("start",), {"machine": machine.name})
        machine.mediator.ask(act, "migrate-pager")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        words = [sys.executable, "-P", "-m", "cardcage_migrate.pager", str(theirs.fileno())]
        try:
            with theirs:
                self.process = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    cwd="/",
                    start_new_session=True,
                )
            place = door.place
            orders = Orders(str(place), secret.hex(), tls_dir and os.path.abspath(tls_dir), patience)
            socket.send_fds(ours, [orders.written()], [door.fileno()])
        except OSError as error:
            ours.close()
            raise HostError(f"post-copy: no pager can be started: {error.strerror}") from error
        self.way, self._door = ours, door

    def ready(self) -> None:
        """Wait until it is in its jail and has the door. Raises HostError."""
        poll = select.poll()
        poll.register(self.way, select.POLLIN)
        said = b""
        with suppress(OSError):
            said = self.way.recv(100) if poll.poll(START * 1000) else b""
        if said != READY:
            self.close()
            raise HostError("post-copy: no pager can be started")

    def say(self, do: str, fds: Iterable[int] = (), **told: int) -> None:
        """Give it a word. Nothing where it has ended: that is heard."""
        with suppress(OSError):
            socket.send_fds(self.way, [json.dumps({"do": do, **told}).encode()], list(fds))

    def close(self) -> None:
        """Let it end, and nobody come any more. Idempotent."""
        self.way.close()
        self._door.close()
        try:
            self.process.wait(START)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Paging:
    """RAM of *machine* that comes while it runs.

    Args:
        pager: who has it come. tell: called with each change of the status, on a thread of its own.

    Attributes:
        status: ``waiting`` before anything is missing, then ``active``, ``paused``, ``done``, ``failed``.
    """

    def __init__(self, machine: Machine, pager: Pager, progress: Progress, tell: Callable[[], object]) -> None:
        self._machine, self._pager, self._progress, self._tell = machine, pager, progress, tell
        self._block: RamBlock = machine.memory.ranges[0].block
        self._faults = Faults(open_faults(), self._block.host_address, self._block.size)
        self._missing: Missing | None = None
        self._hold: Hold | None = None
        self.status: Literal["waiting", "active", "paused", "done", "failed"] = "waiting"
        self._error = ""
        self._keeping, self._kept = threading.Lock(), False
        self._after: Callable[[], object] = lambda: None
        self._known, self._closing = threading.Event(), False
        self._thread: threading.Thread | None = None
        machine.defer(self.close)

    def expect(self, runs: Iterable[tuple[int, int]]) -> None:
        """These pages are out of date. Raises HostError."""
        try:
            if self._missing is None:  # watched before the first is given back: no huge page fills the gap with zeros
                self._missing = Missing(self._block.size)
                self._faults.register()
            runs = list(runs)
            for offset, size in runs:
                if not self._block.discard(offset, size):
                    raise HostError("post-copy: the host takes no memory back")
            self._missing.add(runs)
        except OSError as error:
            raise HostError(f"post-copy: the kernel does not watch the machine's memory: {error.strerror}") from error

    @property
    def expected(self) -> bool:
        """The source has said what is missing."""
        return self._missing is not None

    def begin(self) -> None:
        """From now on pages come, as they are touched and else one after another. Raises LinkLost, HostError."""
        assert self._missing is not None
        table = os.memfd_create("cardcage-missing", os.MFD_CLOEXEC)
        try:
            os.pwrite(table, self._missing.table, 0)
            self._pager.say("begin", [self._faults.fd, table], base=self._block.host_address, size=self._block.size)
        finally:
            os.close(table)
        self._thread = threading.Thread(target=self._hear, name=f"{self._machine.name}-paging", daemon=True)
        self._thread.start()
        self._known.wait()
        if self.status in ("paused", "failed"):
            raise LinkLost(f"the pages of {self._machine.name} cannot come: {self._error}")

    def loaded(self) -> None:
        """The machine has its state: from now on nothing is made of it that takes all of its memory. Raises LinkLost
        where pages cannot come: the source goes on."""
        with self._keeping:
            if self.cut_off:
                raise LinkLost(f"the pages of {self._machine.name} cannot come: {self._error}")
            self._kept = True
        self._hold = Hold(self._machine, "its memory is still coming in", COMING)
        if self.status == "done":  # meanwhile
            self._hold.drop()

    def started(self) -> None:
        """The guest runs: the source may know."""
        self._progress.status = WORDS[self.status]
        self._pager.say("started")

    def afterwards(self, do: Callable[[], object]) -> None:
        """Have that done once all memory is here, which it may be already."""
        with self._keeping:
            if self.status != "done":
                self._after = do
                return
        do()

    @property
    def cut_off(self) -> bool:
        """Pages are missing, and the source cannot be reached."""
        return self.status in ("paused", "failed")

    def _hear(self) -> None:
        """Hear of the pager, until it ends."""
        poll = select.poll()
        poll.register(self._pager.way, select.POLLIN)
        while True:
            if not poll.poll(LOOK * 1000):
                ended = self._machine.outcome is not None or self._machine.state is State.STOPPED
                if self.status == "paused" and ended:
                    self._give_up()
                    return
                continue
            try:
                data = self._pager.way.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                if self.status != "done" and not self._closing:
                    self._lost("its pager has ended")
                self._pager.close()
                return
            told: dict[str, Any] = json.loads(data)
            self._progress.remaining, self._progress.asked = told["remaining"], told["asked"]
            match told["status"]:
                case "begun" if self.status != "active":
                    self._now("active")
                case "paused" if self.status != "paused":
                    self._error = told["error"]
                    with self._keeping:
                        self._now("paused", told["error"])
                        if not self._kept:  # nobody needs what has come; let nobody wait for the rest
                            self._poison()
                case "failed" if self.status != "failed":
                    self._lost(told["error"])
                case "done" if self.status != "done":
                    self._all_here()

    def _now(self, status: Literal["active", "paused", "done", "failed"], error: str = "") -> None:
        before, self.status = self.status, status
        self._progress.status, self._progress.error = WORDS[status], error
        name, left = self._machine.name, say_size(self._progress.remaining)
        if status == "paused":
            self._machine.log.warning(
                f"the source cannot be reached, and {left} of the memory are missing: who needs them waits until "
                f'"cardcage migrate recover" there',
                why=error,
            )
        elif status == "active" and before == "paused":
            self._machine.log.info(f"memory of {name} comes again", left=left)
        self._known.set()
        self._tell()

    def _all_here(self) -> None:
        self._faults.unregister()
        self._faults.close()
        self._drop()
        self._machine.log.info("all memory is here", asked=self._progress.asked)
        with self._keeping:
            self._now("done")
        self._after()

    def _lost(self, why: str) -> None:
        """What is missing never comes."""
        self._error = why
        self._machine.log.error("memory of the machine is lost", why=why)
        self._machine.fail(HostError(f"{self._machine.name}: its memory is lost: {why}"))
        self._poison()
        self._now("failed", why)

    def _give_up(self) -> None:
        """The machine was ended while nothing came: let nobody wait any longer, and nothing go to a disk instead."""
        self._poison()
        self._pager.say("end")

    def _poison(self) -> None:
        """Whoever waits for a page has an error. One page after another: which of them came, only the pager knows."""
        if self._missing is None or self._faults.fd < 0:
            return
        for run in self._missing.runs():
            self._faults.poison(*run)

    def _drop(self) -> None:
        if self._hold is not None:
            self._hold.drop()

    def close(self) -> None:
        """Nothing comes any more: the machine is closed and no vCPU runs, or all was sent before. Idempotent."""
        self._closing = True
        self._pager.say("end")
        if self._thread is not None:
            self._thread.join(START)
        self._pager.close()
        self._faults.close()
