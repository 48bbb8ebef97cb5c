"""Device ``gdb``: a socket, and the one gdb that is there. No guest sees it.

All is done on the machine's loop thread, between the transitions that it carries out: a step is two changes of threads.
What gdb asks for may pause the machine, so it is carried out without the machine's lock.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from errno import EWOULDBLOCK
from typing import TYPE_CHECKING, Any

from cardcage.errors import FAULTS, CardcageError, ConfigError, StateError, in_words
from cardcage.pairs import parse_repeated, typed_pairs
from cardcage.security import Needs
from cardcage.values import frozen
from cardcage.waiting import Event
from cardcage_qmp import control_of
from cardcage_qmp.sockets import Endpoint

from cardcage_gdb.points import guest_debug
from cardcage_gdb.stub import Stub
from cardcage_gdb.wire import Splitter, TooMuch, frame

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.device import Slot
    from cardcage.machine import Machine
    from cardcage_qmp import Control

__all__ = ["Gdb", "GdbOptions", "Peer", "parse_gdb", "place"]

PIECE = 1 << 14
PATIENCE = 10.0
"""Seconds that the end of a machine waits for its loop thread to hang up."""


@frozen
class GdbOptions:
    """Options of ``gdb``.

    Attributes:
        socket: ``tcp:HOST:PORT``, ``unix:PATH`` or ``fd:N`` (a socket that listens already); a port alone is one of
            127.0.0.1, and so is ``tcp::PORT``.
        wait: the machine does not start before gdb says ``continue``.
    """

    socket: str
    wait: bool = False


def parse_gdb(text: str) -> dict[str, Any]:
    """``--gdb PORT|tcp:HOST:PORT|unix:PATH[,wait=on]``. Raises :exc:`ValueError`."""
    head, *rest = text.split(",")
    rest = ["wait=on" if one == "wait" else one for one in rest]
    pairs = parse_repeated(",".join([head, *rest]), first="socket")
    if not pairs or not pairs[0][1]:
        raise ValueError("expected a port, tcp:HOST:PORT or unix:PATH")
    return {"device": [{"type": "gdb", **typed_pairs(pairs, GdbOptions)}]}


def place(text: str) -> str:
    """A socket's place in full: nothing but this host reaches a port that is given alone."""
    port = text.removeprefix("tcp::")
    return f"tcp:127.0.0.1:{port}" if port.isascii() and port.isdigit() else text


class Peer:
    """A gdb. All is called on the machine's loop thread, without its lock."""

    def __init__(
        self,
        control: Control,
        link: socket.socket,
        post: Callable[[Callable[[], None]], None],
        go: Callable[[], None],
        gone: Callable[[], None],
    ) -> None:
        self._control, self._link, self._post, self._gone = control, link, post, gone
        self._splitter = Splitter()
        self._last = b""
        self._there = True
        self.stub = Stub(control, go)

    def attach(self) -> None:
        """It has come."""
        self._guarded(self.stub.attach)

    def hear(self, data: bytes) -> None:
        """Bytes of it; none at its end."""
        self._guarded(lambda: self._hear(data))

    def tell(self) -> None:
        """Something happened to the machine."""
        self._guarded(self._tell)

    def hang_up(self) -> None:
        """Let it go, and all that it set with it. Idempotent."""
        if self._there:
            self._there = False
            if not self.stub.ended:
                with suppress(StateError):  # the machine is gone
                    self.stub.leave(resume=False)
            self._gone()
            self._link.close()

    def _guarded(self, act: Callable[[], None]) -> None:
        if not self._there:
            return
        log = self._control.log
        try:
            act()
            if not self.stub.ended:
                return
        except OSError as error:  # it went away, or would have the loop wait for it
            if error.errno == EWOULDBLOCK:
                log.warning("gdb left its answers unread, and was hung up on")
        except (CardcageError, TooMuch) as error:
            log.warning("gdb was hung up on", error=str(error))
        except FAULTS as error:  # whatever a peer did, it ends no machine
            log.error("gdb was hung up on", error=in_words(error))
        self.hang_up()

    def _hear(self, data: bytes) -> None:
        if not data:
            self.hang_up()
            return
        for packet, sign in self._splitter.feed(data):
            if sign == b"-":
                self._send(self._last)
            elif sign == b"!":
                self._send(b"-")
            else:
                self._answer(packet, sign)

    def _answer(self, packet: bytes, sign: bytes) -> None:
        answer = None if self.stub.ended else self.stub.answer(packet)
        if self.stub.quiet:
            self._splitter.acknowledges = False
        if answer is not None:
            self._last = frame(answer)
            self._send(sign + self._last)
        elif sign:
            self._send(sign)
        self._tell()

    def _tell(self) -> None:
        if self.stub.slipped():  # it is about to run: it cannot be paused now
            self._post(lambda: self._guarded(self.stub.catch))
        if (news := self.stub.news()) is not None:
            self._last = frame(news)
            self._send(self._last)

    def _send(self, data: bytes) -> None:
        if data and self._link.send(data) < len(data):
            raise BlockingIOError(EWOULDBLOCK, "unread")


class Gdb:
    """The device. It has its socket from the start, and serves once the machine is whole."""

    def __init__(self, options: GdbOptions) -> None:
        self.options = options
        self._endpoint = Endpoint(place(options.socket))
        self._listening: socket.socket | None = None
        self._link: socket.socket | None = None
        self._peer: Peer | None = None
        self._closed = False
        self._control: Control | None = None
        self._post: Callable[[Callable[[], None]], None] = lambda callback: None
        self._go = Event()
        self.address = ""

    def read(self, offset: int, size: int, /) -> int:
        """It has no registers."""
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int, /) -> None:
        """It has no registers."""

    def plug(self, slot: Slot, /) -> None:
        self._slot = slot
        if "guest-debug" not in getattr(slot.interrupts.vm, "capabilities", ()):
            raise ConfigError("this machine's accelerator cannot debug guests: it has no guest-debug")
        slot.host.provide("guest-debug", self)  # points have one owner: another debugger is refused
        made = self._endpoint.open(slot)
        made.setblocking(False)
        self._listening = made
        name = made.getsockname()
        self.address = f"{name[0]}:{name[1]}" if isinstance(name, tuple) else str(name)

    def needs(self) -> Needs:
        """A socket's name is removed at the end."""
        return self._endpoint.needs()

    def may_fork(self) -> str:
        """Two processes cannot have one socket."""
        return "gdb's socket is one process's"

    def forked(self) -> None:
        """It is none."""

    def serve(self, machine: Machine) -> None:
        """Take gdb from now on, until the machine's end."""
        if self._control is not None or self._listening is None:
            return
        guest_debug(machine)
        self._control, self._post = control_of(machine), machine.loop.post
        machine.observers.add("state", lambda _: self._peer.tell() if self._peer is not None else None)
        machine.observers.add("debug", lambda cpu: self._peer.stub.met(cpu) if self._peer is not None else None)
        machine.defer(self.hang_up)
        self._slot.loop.add_reader(self._listening.fileno(), self._accept)

    def await_go(self) -> None:
        """Wait for gdb to say ``continue``, where the options say so, or gdb is there already."""
        if self.options.wait or self._peer is not None:
            self._slot.log.warning("waits for gdb to continue", socket=self.address)
            self._go.wait()

    def _accept(self) -> None:
        if self._listening is None or self._control is None or self._closed:
            return
        with suppress(OSError):  # it went away before we came to it
            link, _ = self._listening.accept()
            link.setblocking(False)
            if link.family != socket.AF_UNIX:
                link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._peer = peer = Peer(self._control, link, self._post, self._go.set, self._gone)
            self._link = link
            self._slot.loop.remove_reader(self._listening.fileno())  # one at a time; others wait
            self._slot.loop.add_reader(link.fileno(), self._readable)
            self._post(peer.attach)

    def _readable(self) -> None:
        """Under the machine's lock, which is let go before anything is carried out."""
        link, peer = self._link, self._peer
        if link is None or peer is None:
            return
        try:
            data = link.recv(PIECE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._slot.loop.remove_reader(link.fileno())
        self._post(lambda: peer.hear(data))

    def _gone(self) -> None:
        link, self._link, self._peer = self._link, None, None
        if not self.options.wait:
            self._go.set()  # who starts the machine waited for this gdb
        if link is not None:
            self._slot.loop.remove_reader(link.fileno())
        if self._listening is not None and not self._closed:
            self._slot.loop.add_reader(self._listening.fileno(), self._accept)

    def hang_up(self) -> None:
        """Take no more, and let who is there go. Not on the machine's loop thread."""
        self._closed = True
        self._go.set()
        done = Event()

        def carry_out() -> None:
            if self._peer is not None:
                self._peer.hang_up()
            done.set()

        self._post(carry_out)
        done.wait(PATIENCE)

    def unplug(self) -> None:
        listening, self._listening = self._listening, None
        if listening is not None:
            self._slot.loop.remove_reader(listening.fileno())
            listening.close()
        self._endpoint.remove_name()
