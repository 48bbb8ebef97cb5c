"""Both ends of migrations for tests, and links that break at a moment of the test's choice."""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from cardcage.host import Host
from cardcage.machine import Machine
from cardcage_migrate.incoming import Arrival, Incomplete
from cardcage_migrate.outgoing import Limits, Outgoing
from cardcage_migrate.progress import Progress
from cardcage_migrate.wire import HEAD, Kind

HEADER = HEAD.size + 4


class Cut:
    """A connection that does something once the first frame of a *kind* is sent on it, or right before that."""

    def __init__(self, peer: socket.socket, kind: Kind, after: bool, then: Callable[[socket.socket], object]) -> None:
        self._peer, self._kind, self._after, self._then = peer, kind, after, then
        self._due = False

    def sendall(self, data: Any, /) -> None:
        """Look for the beginning of a frame."""
        size = memoryview(data).nbytes
        if size == HEADER and data[0] == self._kind:
            if not self._after:
                self._then(self._peer)
            self._due = bool(HEAD.unpack_from(data)[1])
            self._peer.sendall(data)
            if self._after and not self._due:
                self._then(self._peer)
            return
        self._peer.sendall(data)
        if self._due:
            self._due = False
            self._then(self._peer)

    def recv_into(self, buffer: memoryview, /) -> int:
        """The other's."""
        return self._peer.recv_into(buffer)

    def settimeout(self, seconds: float | None, /) -> None:
        """The other's."""
        self._peer.settimeout(seconds)

    def close(self) -> None:
        """The other's."""
        self._peer.close()


def dead(peer: socket.socket) -> None:
    """The link breaks, in both directions."""
    peer.shutdown(socket.SHUT_RDWR)


class Coming:
    """``Machine.incoming`` on a thread of its own, at one end of a pair of sockets.

    Attributes:
        machine: it, once it is there or stands still. error: why it is not.
    """

    def __init__(self, host: Host, cut: Callable[[socket.socket], Any] | None = None, **keys: Any) -> None:
        self.machine: Any = None
        self.error: BaseException | None = None
        ours, self.link = socket.socketpair()
        self._arrival = Arrival(keys.pop("cls", Machine), f"fd:{ours.fileno()}", host=host, **keys)
        self._ours, self._cut = ours, cut
        self._thread = threading.Thread(target=self._take)
        self._thread.start()

    def _take(self) -> None:
        try:
            with self._ours:
                self._arrival.wait()
            if self._cut is not None:
                channel = self._arrival._channel
                peer: Any = channel.peer
                channel.peer = self._cut(peer)
            self.machine = self._arrival.machine()
        except Incomplete as error:
            self.machine, self.error = error.machine, error
        except BaseException as error:
            self.error = error

    def done(self) -> Coming:
        """Wait until it is there, or is not."""
        self._thread.join()
        return self

    def close(self) -> None:
        """Throw it away."""
        self.link.close()
        self._thread.join()
        if self.machine is not None:
            self.machine.dismantle()

    def __enter__(self) -> Coming:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def over(
    vm: Machine, link: Any, limits: Limits | None = None, tell: Callable[[Progress], object] | None = None
) -> Progress:
    """Migrate over a connection."""
    return Outgoing(vm, "the other end", limits or Limits(downtime=5), tell).over(lambda: (link, False))


def certificates(folder: Path) -> Path:
    """Certificates by QEMU's names in *folder*, the destination's for machines.test, and of another authority in its
    folder ``other``."""
    for where in (folder, folder / "other"):
        where.mkdir(exist_ok=True)
        run = partial(subprocess.run, cwd=where, check=True, capture_output=True)
        new = "openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
        run(f"{new} -x509 -keyout ca-key.pem -out ca-cert.pem -subj /CN=authority".split())
        for side in ("server", "client"):
            name = "machines.test" if side == "server" else "source.test"
            run(f"{new} -keyout {side}-key.pem -out {side}.csr -subj /CN={name}".split())
            (where / "ext").write_text(f"subjectAltName=DNS:{name}\n")
            sign = f"openssl x509 -req -in {side}.csr -CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial -extfile ext"
            run(f"{sign} -out {side}-cert.pem".split())
    return folder
