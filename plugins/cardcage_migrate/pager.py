"""The pager: a process beside the destination, which has the pages that are missing come, as they are waited for.

``python -m cardcage_migrate.pager FD``. The destination's own process could not: whoever waits there for a page may
have Python's lock, or the machine's. What it needs comes on FD, a way of datagrams, whose end is its own end too:

- first :class:`Orders`, with the socket that listens where the machine came in;
- ``begin``, with the userfaultfd that watches the machine's RAM and a table of what is missing (``begun`` is said
  back); ``started``, once the guest runs; ``end``, when the machine has ended.

It says how far it is: ``{"status": ..., "remaining": bytes, "asked": pages, "error": ...}``. The source's connection is
hostile input; it is known by a secret, and may be made anew whenever it broke: the guest's threads wait meanwhile.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import sys
import threading
from contextlib import suppress
from hmac import compare_digest
from typing import Any

from attrs import asdict, frozen
from cardcage.errors import CardcageError, HostError
from cardcage.security import Needs
from cardcage_jail import confine_program
from cardcage_snapshot.faults import Faults

from cardcage_migrate.missing import Missing
from cardcage_migrate.reach import DIAL, Waiting, parse
from cardcage_migrate.relay import relayed
from cardcage_migrate.wire import (
    ASKED,
    OFFSET,
    RUN,
    BrokenStream,
    Channel,
    Kind,
    LinkLost,
    bare_runs,
    runs_in,
    tables_of_runs,
)

__all__ = ["READY", "Orders", "Pager", "main"]

READY = b"ready"
DATAGRAM = 1 << 16
COMERS = 4
"""Who may be at the door at once."""
SWITCH = 0.0005
"""Seconds that a thread may keep Python's lock from the one that hears of faults."""
LAST = 10.0
"""Seconds that the machine's process may take to hear the last word."""
LOOK = 500
"""Milliseconds after which it is looked whether all is over."""
TELL = 0.1
"""Seconds between two words about how far it is, where nothing else is to be said."""


@frozen
class Orders:
    """The first word to a pager.

    Attributes:
        place: the URI. secret: in hexadecimal. tls_dir: directory of the certificates, or None. patience: seconds that
            a source may be silent while pages come.
    """

    place: str
    secret: str
    tls_dir: str | None = None
    patience: float = 30.0

    def written(self) -> bytes:
        """As JSON."""
        return json.dumps(asdict(self)).encode()


class Pager:
    """The process's life: the main thread hears of the machine and is at the door; others wait for faults and pages."""

    def __init__(self, way: socket.socket, orders: Orders, door: Waiting) -> None:
        self._way, self._orders, self._door = way, orders, door
        self._lock = threading.Lock()  # of all below
        self._sending, self._joining = threading.Lock(), threading.Lock()
        self._faults: Faults | None = None
        self._missing = Missing(0)
        self._asked: set[int] = set()
        self._link: Channel | None = None
        self._reader: threading.Thread | None = None
        self._coming = 0
        self._started = self._over = False
        self._requests = 0
        self._said: dict[str, Any] = {"status": "waiting", "remaining": 0, "asked": 0, "error": ""}
        self._untold = threading.Event()

    def run(self) -> None:
        """Serve until the machine's process says that it is over, or ends, or the source knows that all has come."""
        teller = threading.Thread(target=self._tell, name="tell", daemon=True)
        teller.start()
        poll = select.poll()
        poll.register(self._way, select.POLLIN)
        poll.register(self._door.fileno(), select.POLLIN)
        while not self._over:
            for fd, _ in poll.poll(LOOK):
                if fd != self._way.fileno():
                    self._come()
                elif not self._heard():
                    self._over = True
        teller.join(LAST)  # its last word is that all is here

    # the machine's process

    def _heard(self) -> bool:
        """Take its word; False for its last."""
        try:
            data, fds, _, _ = socket.recv_fds(self._way, DATAGRAM, 2)
        except OSError:
            data, fds = b"", []
        told: dict[str, Any] = json.loads(data) if data else {"do": "gone"}
        match told["do"]:
            case "begin":
                table = os.pread(fds[1], told["size"] // 4096, 0)
                os.close(fds[1])
                with self._joining:  # who has just joined is the link by then
                    self._begin(Faults(fds[0], told["base"], told["size"]), Missing(told["size"], table))
            case "started":
                with self._lock:
                    self._started = True
                self._answer(Kind.STARTED)
            case "end":
                self._answer(Kind.DONE, argument=1)
                return False
            case _:
                if self._missing.count:
                    self._answer(Kind.FAILED, b"its process has ended there, and the machine is lost")
                return False
        return True

    def _begin(self, faults: Faults, missing: Missing) -> None:
        with self._lock:
            self._faults, self._missing = faults, missing
            if self._link is not None:
                self._link.set_patience(self._orders.patience)
            if self._link is not None or not missing.count:
                self._say("begun")
            else:
                self._say("paused", "the source's connection for pages broke")
        self._answer(Kind.JOINED, argument=1)
        threading.Thread(target=self._watch, args=(faults,), name="faults", daemon=True).start()
        if not missing.count:
            self._all_here()

    def _say(self, status: str, error: str = "") -> None:
        """Have this told; with the lock."""
        self._said |= {"status": status, "error": error}
        self._untold.set()

    def _tell(self) -> None:
        """Tell what is to be told, the last of it if it is more than can be taken; now and then how far it is."""
        before = -1
        over = False
        while not over:
            over = self._over  # before what is told last
            urgent = self._untold.wait(TELL)
            self._untold.clear()
            with self._lock:
                if not urgent and before == self._missing.count:
                    continue
                before = self._missing.count
                told = self._said | {"remaining": before * 4096, "asked": self._requests}
            with suppress(OSError):  # it is gone, and that is heard elsewhere
                self._way.send(json.dumps(told).encode())

    # the source

    def _come(self) -> None:
        """Let who is at the door say who it is."""
        try:
            peer: Any = self._door.accept(DIAL)[0]
        except (HostError, OSError):  # it was nobody, or is gone again
            return
        with self._lock:
            full = self._coming >= COMERS
            self._coming += not full
        if full:
            peer.close()
            return
        threading.Thread(target=self._meet, args=(peer,), name="comer", daemon=True).start()

    def _meet(self, peer: Any) -> None:
        try:
            peer = relayed(peer) if self._orders.tls_dir is not None else peer
            channel = Channel(peer, patience=DIAL)
            try:
                channel.meet()
                secret = bytes(channel.receive(Kind.JOIN).body)
                if not compare_digest(secret, bytes.fromhex(self._orders.secret)):
                    raise BrokenStream("somebody who does not know the machine")
                with self._joining:
                    self._join(channel)
            except CardcageError:
                channel.close()
        finally:
            with self._lock:
                self._coming -= 1

    def _join(self, channel: Channel) -> None:
        """It is the source: in place of the connection that there was."""
        with self._lock:
            before, reader, self._link = self._link, self._reader, None
        if before is not None:
            _hang_up(before)
        if reader is not None:
            reader.join()
        with self._lock:
            begun, started = self._faults is not None, self._started
            runs, asked = list(self._missing.runs()), sorted(self._asked)
        channel.send(Kind.JOINED, argument=begun | started << 1)
        if begun:
            for body in tables_of_runs(runs):
                channel.send(Kind.MISSING, body, argument=len(body) // RUN.size)
            channel.send(Kind.END)
        channel.set_patience(self._orders.patience if begun else None)
        with self._lock:
            self._link = channel
            if begun:
                self._say("begun" if runs else "done")
            self._reader = threading.Thread(target=self._read, args=(channel,), name="pages", daemon=True)
            asked = sorted(self._asked) if begun else asked
        self._reader.start()
        self._ask(asked)
        if begun and not runs:
            self._answer(Kind.DONE)

    def _read(self, channel: Channel) -> None:
        """Take pages until the connection ends."""
        try:
            while True:
                frame = channel.receive(Kind.PAGES, Kind.ZEROS, Kind.DONE)
                if frame.kind is Kind.DONE:
                    with self._lock:
                        over = self._faults is not None and not self._missing.count
                    if not over:
                        raise BrokenStream("the source has ended, and pages are missing")
                    self._over = True
                    return
                self._put(frame.kind, frame)
        except CardcageError as error:
            self._broke(channel, error)
        except OSError as error:  # no page can be put there any more
            with self._lock:
                self._say("failed", f"a page that came could not be put in its place: {error.strerror}")

    def _put(self, kind: Kind, frame: Any) -> None:
        with self._lock:
            faults, missing = self._faults, self._missing
            if faults is None:
                raise BrokenStream("pages before the machine")
            runs = runs_in(frame, missing.size) if kind is Kind.PAGES else bare_runs(frame, missing.size)
            if not all(missing.has_all(*run) for run in runs):
                raise BrokenStream("a page that was there already")
            at = len(runs) * RUN.size
            for offset, length in runs:
                # Twice in a frame, it is not missing any more.
                if not missing.has_all(offset, length):
                    raise BrokenStream("a page that was there already")
                if kind is Kind.PAGES:
                    faults.put(offset, ctypes.addressof(ctypes.c_char.from_buffer(frame.body, at)), length, strict=True)
                    at += length
                else:
                    faults.zero(offset, length, strict=True)
                missing.remove(offset, length)
                if self._asked:
                    self._asked.difference_update(range(offset, offset + length, 4096))
            over = not missing.count
        if over:
            self._all_here()

    def _all_here(self) -> None:
        with self._lock:
            self._say("done")
        self._answer(Kind.DONE)

    def _broke(self, channel: Channel, error: CardcageError) -> None:
        channel.close()
        with self._lock:
            if self._link is channel:
                self._link = None
                if self._faults is not None and self._missing.count:
                    self._say("paused", str(error))

    def _answer(self, kind: Kind, *parts: bytes, argument: int = 0) -> None:
        """Say something to the source, if it listens."""
        with self._lock:
            link = self._link
        if link is not None:
            try:
                with self._sending:
                    link.send(kind, *parts, argument=argument)
            except LinkLost:
                _hang_up(link)  # the reader finds out

    def _ask(self, offsets: list[int]) -> None:
        for at in range(0, len(offsets), ASKED):
            self._answer(Kind.REQUEST, b"".join(map(OFFSET.pack, offsets[at : at + ASKED])))

    # the guest

    def _watch(self, faults: Faults) -> None:
        """Ask for the pages that somebody waits for; who waits for one that was never missing has zeros."""
        poll = select.poll()
        poll.register(faults.fd, select.POLLIN)
        while not self._over:
            if not poll.poll(LOOK):
                continue
            wanted = []
            for offset in faults.waited():
                with self._lock:
                    if not self._missing.has_all(offset, 4096):
                        self._zero(faults, offset)
                    elif offset not in self._asked:
                        self._asked.add(offset)
                        wanted.append(offset)
            self._requests += len(wanted)
            self._ask(wanted)

    def _zero(self, faults: Faults, offset: int) -> None:
        try:
            faults.zero(offset, 4096)
        except OSError as error:  # one that came meanwhile is none
            self._say("failed", f"a page could not be put in its place: {error.strerror}")


def _hang_up(channel: Channel) -> None:
    with suppress(OSError):
        channel.peer.shutdown(socket.SHUT_RDWR)  # type: ignore[attr-defined]  # it is a socket: who comes in has one


def main() -> None:
    """Hear the orders, go into a jail, and serve."""
    way = socket.socket(fileno=int(sys.argv[1]))
    data, fds, _, _ = socket.recv_fds(way, DATAGRAM, 1)
    orders = Orders(**json.loads(data))
    listening = socket.socket(fileno=fds[0])
    door = Waiting(parse(orders.place), orders.tls_dir, listening=listening)
    for one in (signal.SIGINT, signal.SIGHUP):
        signal.signal(one, signal.SIG_IGN)
    with suppress(OSError), open("/proc/self/comm", "w") as file:
        file.write("migrate-pager")
    sys.setswitchinterval(SWITCH)
    confine_program(Needs())
    way.send(READY)
    Pager(way, orders, door).run()
    os._exit(0)  # threads may be in the middle of anything


if __name__ == "__main__":
    main()
