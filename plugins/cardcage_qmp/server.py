"""Device ``qmp``: a socket, and a thread for each peer. No peer can hold up the machine, or another."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, Protocol

from attrs import field
from cardcage.errors import FAULTS, in_words
from cardcage.pairs import parse_repeated, typed_pairs
from cardcage.security import Needs
from cardcage.values import frozen
from cardcage.waiting import Event

from cardcage_qmp.hmp import Prompt
from cardcage_qmp.session import Session
from cardcage_qmp.sockets import Endpoint
from cardcage_qmp.wire import Splitter, TooMuch, dump

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.device import Slot

    from cardcage_qmp.control import Control

__all__ = ["Peer", "Qmp", "QmpOptions", "parse_qmp"]

PEERS = 8
"""Peers of a socket at once; more wait."""
EVENTS = 1024
"""Events that a peer may leave unread; with more it is hung up on, since one that was lost would not be missed."""
BACKLOG = 1 << 18
"""Bytes of answers that a peer may leave unread before it is no longer listened to."""
PATIENCE = 1.0
"""Seconds that a peer has at the end to take its last answers and events."""
PIECE = 1 << 14


@frozen
class QmpOptions:
    """Options of ``qmp``.

    Attributes:
        socket: ``unix:PATH``, ``tcp:HOST:PORT``, ``fd:N`` (a socket that is open already) or ``stdio``.
        server: listen, else connect. wait: the machine does not start before the first peer.
        mode: ``control`` for QMP, ``readline`` for lines of QEMU's human monitor.
        pretty: answers for people to read.
        names: what QMP calls a device's block node or character device, by the device's id.
    """

    socket: str
    server: bool = True
    wait: bool = False
    mode: Literal["control", "readline"] = "control"
    pretty: bool = False
    names: dict[str, str] = field(factory=dict)


def parse_qmp(text: str) -> dict[str, Any]:
    """``--qmp unix:PATH[,server=on][,wait=off]``, as QEMU's ``-qmp``. Raises :exc:`ValueError`."""
    words = {"server": ("server", "on"), "nowait": ("wait", "off"), "wait": ("wait", "on")}
    head, *rest = text.split(",")
    rest = ["=".join(words[one]) if one in words else one for one in rest]
    pairs = parse_repeated(",".join([head, *rest]), first="socket")
    if not pairs or not pairs[0][1]:
        raise ValueError("expected unix:PATH, tcp:HOST:PORT, fd:N or stdio")
    return {"device": [{"type": "qmp", **typed_pairs(pairs, QmpOptions)}]}


class Channel(Protocol):
    """Bytes to and from a peer."""

    def read_from(self) -> int:
        """The descriptor that is readable when something came."""

    def write_to(self) -> int:
        """The descriptor that is writable when something can go."""

    def receive(self) -> tuple[bytes, list[int]]:
        """Bytes that came, with descriptors; empty at the end. Raises OSError."""

    def send(self, data: bytes, /) -> int:
        """Send some of *data*; returns how much. Raises OSError."""

    def close(self) -> None: ...


class SocketChannel:
    """A stream socket."""

    def __init__(self, peer: socket.socket) -> None:
        peer.setblocking(False)
        self._peer = peer
        self._rights = peer.family == socket.AF_UNIX

    def read_from(self) -> int:
        return self._peer.fileno()

    write_to = read_from

    def receive(self) -> tuple[bytes, list[int]]:
        if not self._rights:
            return self._peer.recv(PIECE), []
        data, ancillary, _, _ = self._peer.recvmsg(PIECE, socket.CMSG_SPACE(16 * 4), socket.MSG_CMSG_CLOEXEC)
        fds: list[int] = []
        for level, kind, body in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                whole = body[: len(body) // 4 * 4]
                fds += memoryview(whole).cast("i")
        return data, fds

    def send(self, data: bytes, /) -> int:
        return self._peer.send(data)

    def close(self) -> None:
        self._peer.close()


class StandardChannel:
    """Standard input and output, which others may share: they stay as they are."""

    def read_from(self) -> int:
        return 0

    def write_to(self) -> int:
        return 1

    def receive(self) -> tuple[bytes, list[int]]:
        return os.read(0, PIECE), []

    def send(self, data: bytes, /) -> int:
        return os.write(1, data[: select.PIPE_BUF])

    def close(self) -> None:
        """They stay open."""


class Peer:
    """A peer: its thread reads, carries out, and writes."""

    def __init__(self, control: Control, channel: Channel, options: QmpOptions, gone: Callable[[Peer], None]) -> None:
        self._control, self._channel, self._options, self._gone = control, channel, options, gone
        self.session = Session(control)
        self._prompt = Prompt(self.session) if options.mode == "readline" else None
        self._splitter = Splitter()
        self._events: deque[dict[str, Any]] = deque()
        self._lost = self._ending = self._heard_all = False
        self._out = bytearray()
        self._todo: deque[bytes] = deque()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self.thread = threading.Thread(target=self._serve, name=f"{control.name}-qmp", daemon=True)

    def tell(self, event: dict[str, Any]) -> None:
        """An event. Any thread."""
        if not self.session.ready:
            return
        with self._lock:
            if len(self._events) < EVENTS:
                self._events.append(event)
            else:
                self._lost = True
            self._nudge()

    def end(self) -> None:
        """Let it have its last answers and events, and hang up. Any thread."""
        with self._lock:
            self._ending = True
            self._nudge()

    def _nudge(self) -> None:
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    def _serve(self) -> None:
        try:
            self._talk()
        except OSError:  # it went away
            pass
        except FAULTS as error:  # whatever a peer did, it ends no machine
            self._control.log.error("a QMP peer was hung up on", error=in_words(error))
        finally:
            self._control.leave(self)
            self._channel.close()
            self.session.close()
            with self._lock:
                os.close(self._wake)
                self._wake = -1
            self._gone(self)

    def _talk(self) -> None:
        self._say(self._prompt.greeting() if self._prompt else self._line(self.session.greeting()))
        while not self._lost:
            if self._ending or (self._heard_all and not self._todo):
                self._finish()
                return
            ready = self._wait()
            if self._out and self._channel.write_to() in ready:
                self._send()
            if not self._heard_all and self._channel.read_from() in ready:
                self._listen()
            self._work()
        self._control.log.warning("a QMP peer left its events unread, and was hung up on", events=EVENTS)

    def _wait(self) -> set[int]:
        """Wait until there is something to do; returns the channel's descriptors that are ready."""
        full = len(self._out) >= BACKLOG
        masks: dict[int, int] = {self._wake: select.POLLIN}
        if not (full or self._todo or self._heard_all):
            masks[self._channel.read_from()] = select.POLLIN
        if self._out:
            write = self._channel.write_to()
            masks[write] = masks.get(write, 0) | select.POLLOUT
        poll = select.poll()
        for fd, mask in masks.items():
            poll.register(fd, mask)
        ready = {fd for fd, _ in poll.poll(0 if self._todo and not full else None)}
        if self._wake in ready:
            os.eventfd_read(self._wake)
        return ready

    def _listen(self) -> None:
        """Read, and note where the peer has no more to say."""
        try:
            data, fds = self._channel.receive()
        except BlockingIOError:
            return
        self.session.take(fds)
        self._heard_all = not data
        try:
            self._todo += self._prompt.feed(data) if self._prompt else self._splitter.feed(data)
        except TooMuch as error:
            self._say(self._line({"error": {"class": "GenericError", "desc": str(error)}}))
            self._heard_all = True

    def _work(self) -> None:
        """Carry out what was asked, while its answers are taken; tell of what happened meanwhile."""
        while self._todo and len(self._out) < BACKLOG and not self._lost:
            text = self._todo.popleft()
            answer = self._prompt.answer(text) if self._prompt else self._line(self.session.answer(text))
            self._tell()  # what happened before it was answered
            self._say(answer)
        self._tell()

    def _tell(self) -> None:
        while self._events and len(self._out) < BACKLOG:
            self._say(self._line(self._events.popleft()))

    def _line(self, value: Any) -> bytes:
        return dump(value, pretty=self._options.pretty)

    def _say(self, data: bytes) -> None:
        self._out += data
        with suppress(BlockingIOError):
            self._send()

    def _send(self) -> None:
        """Send what goes at once."""
        poll = select.poll()
        poll.register(self._channel.write_to(), select.POLLOUT)
        while self._out and poll.poll(0):
            del self._out[: self._channel.send(bytes(self._out[:PIECE]))]

    def _finish(self) -> None:
        """Say what is left, for a while."""
        until = time.monotonic() + PATIENCE
        while self._events:
            self._say(self._line(self._events.popleft()))
        poll = select.poll()
        poll.register(self._channel.write_to(), select.POLLOUT)
        while self._out and (left := until - time.monotonic()) > 0:
            if poll.poll(left * 1000):
                del self._out[: self._channel.send(bytes(self._out[:PIECE]))]


class Qmp:
    """The device: no guest sees it. It has its socket from the start, and serves once the machine is whole."""

    def __init__(self, options: QmpOptions) -> None:
        self.options = options
        self._endpoint = None if options.socket == "stdio" else Endpoint(options.socket, server=options.server)
        self._listening: socket.socket | None = None
        self._channel: Channel | None = None
        self._came = Event()
        self._closed = False
        self._peers: dict[Peer, None] = {}
        self._lock = threading.Lock()
        self._control: Control | None = None

    def read(self, offset: int, size: int, /) -> int:
        """It has no registers."""
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int, /) -> None:
        """It has no registers."""

    def plug(self, slot: Slot, /) -> None:
        self._slot = slot
        if self._endpoint is None:
            self._channel = StandardChannel()
            return
        made = self._endpoint.open(slot)
        if self.options.server:
            made.setblocking(False)
            self._listening = made
        else:
            self._channel = SocketChannel(made)

    def needs(self) -> Needs:
        """The socket's name is removed at the end."""
        return self._endpoint.needs() if self._endpoint is not None else Needs()

    def serve(self, control: Control) -> None:
        """Take peers from now on."""
        self._control = control
        if self._channel is not None:
            self._begin(self._channel)
        elif self._listening is not None:
            self._slot.loop.add_reader(self._listening.fileno(), self._accept)

    def await_peer(self) -> None:
        """Wait for the first peer, where the options say so."""
        if self.options.wait and self._listening is not None:
            self._slot.log.warning("waits for a QMP client", socket=self.options.socket)
            self._came.wait()

    def _accept(self) -> None:
        if self._listening is None:
            return
        with suppress(OSError):  # it went away before we came to it
            peer, _ = self._listening.accept()
            self._begin(SocketChannel(peer))

    def _begin(self, channel: Channel) -> None:
        with self._lock:
            if self._control is None or self._closed:
                channel.close()
                return
            peer = Peer(self._control, channel, self.options, self._gone)
            self._peers[peer] = None
            if len(self._peers) >= PEERS and self._listening is not None:
                self._slot.loop.remove_reader(self._listening.fileno())
            self._control.join(peer)  # before its thread, which may leave at once
            peer.thread.start()
        self._came.set()

    def _gone(self, peer: Peer) -> None:
        with self._lock:
            full = len(self._peers) >= PEERS
            self._peers.pop(peer, None)
        if full:
            self._slot.loop.call_soon(self._again)

    def _again(self) -> None:
        if self._listening is not None and not self._closed:
            self._slot.loop.add_reader(self._listening.fileno(), self._accept)

    def hang_up(self) -> None:
        """Take no more peers, and let those that are there go. Not under the machine's lock."""
        with self._lock:
            self._closed = True
            peers = list(self._peers)
        for one in peers:
            one.end()
        for one in peers:
            one.thread.join()

    def unplug(self) -> None:
        listening, self._listening = self._listening, None
        if listening is not None:
            self._slot.loop.remove_reader(listening.fileno())
            listening.close()
        if self._control is None and self._channel is not None:
            self._channel.close()
        if self._endpoint is not None:
            self._endpoint.remove_name()
