"""The host's end of the agent's port: calls under way, and who may send how much.

A guest is hostile: what it sends is held to what it was asked and given credit for; anything else ends the link, and
each call with it, by :exc:`~cardcage_agent.errors.ProtocolError`. A call costs at most two windows and one answer of a
frame in memory, whatever its guest sends. A call that was given up is forgotten here at once; what still comes for it
is passed over.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any

from cardcage.errors import CardcageError, StateError
from cardcage.waiting import Condition

from cardcage_agent.errors import AgentError, AgentTimeout, NoAgent, ProtocolError
from cardcage_agent.frames import (
    BUFFER,
    LINK,
    MORE,
    PAYLOAD_MAX,
    REQUEST_MAX,
    VERSION,
    WINDOW,
    Frame,
    Kind,
    Parser,
    Verb,
    frame,
    number,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.device import Slot

__all__ = ["Call", "Inbox", "Link", "nobody", "open_link"]

QUEUE = 1 << 18
"""Bytes that wait for their turn to the guest before who has more to say waits too."""
GREETING = b"cardcage"
PIECE = PAYLOAD_MAX
"""Bytes of stream 0 in one frame, so that several are on their way at once."""
ERRNO_MAX = 4095


def nobody(*_: object) -> None:
    """Nobody listens."""


class Inbox:
    """A stream from the guest: what came and was not taken yet."""

    def __init__(self) -> None:
        self.kept = bytearray()
        self.allowed = WINDOW
        self.owed = 0
        self.ended = False

    def take(self, most: int) -> bytes:
        """The first bytes, up to *most*; empty when nothing is there."""
        data = bytes(self.kept[:most])
        del self.kept[:most]
        self.owed += len(data)
        return data


class Call:
    """One request under way. Its link's lock guards it.

    Attributes:
        inboxes: streams 1 and 2. credit: bytes of stream 0 that may be sent.
        deaf: nobody in the guest reads stream 0 any more.
        pid: of the process, once it has started. status: 0 to 255, or 256 + signal, once it has ended.
        result: errno (0 for success) and what came with it, once the call is over.
        failure: why nothing more will come.
    """

    def __init__(self, id: int, verb: Verb, streams: tuple[int, ...]) -> None:
        self.id, self.verb = id, verb
        self.inboxes = (Inbox(), Inbox())
        for stream in {1, 2}.difference(streams):
            self.inboxes[stream - 1].ended = True
        self.credit = BUFFER
        self.deaf = False
        self.pid: int | None = None
        self.status: int | None = None
        self.result: tuple[int, bytes] | None = None
        self.failure: CardcageError | None = None

    @property
    def over(self) -> bool:
        """The agent has forgotten it."""
        ended = self.status is not None and all(one.ended for one in self.inboxes)
        return self.result is not None or ended or self.failure is not None

    def take(self, one: Frame) -> None:
        """A frame of this call from the guest. Raises ProtocolError."""
        match one.kind:
            case Kind.DATA if one.stream in (1, 2):
                inbox = self.inboxes[one.stream - 1]
                inbox.allowed -= len(one.payload)
                if inbox.allowed < 0 or inbox.ended or not one.payload:
                    raise ProtocolError("more output than it has credit for")
                inbox.kept += one.payload
            case Kind.END if one.stream in (1, 2):
                self.inboxes[one.stream - 1].ended = True
            case Kind.END if one.stream == 0:
                self.deaf = True
            case Kind.CREDIT if one.stream == 0:
                more = number(one.payload)
                if self.credit + more > BUFFER:
                    raise ProtocolError("more credit than its buffer has room")
                self.credit += more
            case Kind.STARTED if self.verb is Verb.RUN and self.pid is None:
                self.pid = number(one.payload)
            case Kind.EXITED if self.pid is not None and self.status is None:
                self.status = number(one.payload)
                if self.status > 256 + 64:
                    raise ProtocolError(f"status {self.status}")
            case Kind.RESULT:
                error = number(one.payload[:4])
                if error > ERRNO_MAX:
                    raise ProtocolError(f"error number {error}")
                self.result = error, one.payload[4:]
            case _:
                raise ProtocolError(f"a frame of kind {one.kind}, stream {one.stream}, in a call of {self.verb.name}")


class _InCopies:
    """A link's part in forks of its machine (:class:`cardcage.device.Forkable`)."""

    changed: Condition
    _calls: dict[int, Call]
    cancel: Callable[[Call], None]

    def may_fork(self) -> str:
        """A copy of the machine has a link of its own (:class:`cardcage.device.Forkable`)."""
        return ""

    def forked(self) -> None:
        """The calls under way are the parent's: what they began in this guest is ended."""
        self.changed = Condition()  # a thread that is not here may have had it
        for call in list(self._calls.values()):
            self.cancel(call)


class Link(_InCopies):
    """Char back end ``agent``, and the service of that name: the calls of one machine.

    All methods but :meth:`start`, :meth:`write` and :meth:`close` are for any thread that does not hold the machine's
    lock.

    Attributes:
        on_run: called with the arguments of each ``run`` and what came of it, its result or an exception.
    """

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self.changed = Condition()
        self._parser = Parser()
        self._calls: dict[int, Call] = {}
        self._last = 0
        self._outgoing: deque[bytes] = deque()
        self._queued = self._flying = 0
        self._ready = self._asked = False
        self._latest = 0  # the call whose request is the last that was sent to the guest
        self._rests = False  # it was answered: nothing is on its way to the guest
        self._checkpoint: int | None = None
        self._failure: CardcageError | None = None
        self._received: Callable[[bytes], None] | None = None
        self.on_run: Callable[[Any, Any], object] = nobody

    @property
    def machine(self) -> str:
        """The machine's name, for errors."""
        return self._slot.machine

    # towards the device

    def start(self, received: Callable[[bytes], None], /) -> None:
        """Begin; see CharBackend."""
        self._received = received

    def write(self, data: bytes, /) -> None:
        """Bytes from the guest."""
        if isinstance(self._failure, ProtocolError):
            return
        try:
            frames = self._parser.feed(data)
            with self.changed:
                for one in frames:
                    self._take(one)
                self.changed.notify_all()
        except ProtocolError as error:
            self._slot.log.warning("the guest's agent broke the protocol", why=str(error))
            self.fail(error)
        if self._outgoing:
            self._slot.loop.call_soon(self._pump)

    def close(self) -> None:
        """The device is gone."""
        self.fail(StateError("the machine was closed"))

    def checkpointed(self) -> None:
        """The guest may be put back to here (cardcage_fork)."""
        with self.changed:
            quiet = self._ready and self._rests and not self._calls and not self._outgoing and self._parser.is_empty
            self._checkpoint = self._flying if quiet else None

    def reverted(self) -> None:
        """The guest is at an earlier time (cardcage_fork): its agent is asked to greet anew. Where the link was at rest
        then, the agent goes on from there, and so does this end."""
        with self.changed:
            self._drop(AgentError("the guest was put back to a checkpoint"))
            self._parser = Parser()
            self._ready, self._flying = self._checkpoint is not None, self._checkpoint or 0
            self._asked = False
            self._latest, self._rests = 0, self._ready
            self.changed.notify_all()

    def fail(self, error: CardcageError) -> None:
        """End all calls with *error*, and those to come. The first counts."""
        with self.changed:
            self._failure = self._failure or error
            self._drop(self._failure)
            self.changed.notify_all()

    def _drop(self, error: CardcageError) -> None:
        for call in self._calls.values():
            if not call.over:
                call.failure = error
        self._calls.clear()
        self._outgoing.clear()
        self._queued = 0

    def _take(self, one: Frame) -> None:
        if one.kind == Kind.HELLO:
            return self._greeted(one)
        if not self._ready:  # for the link before, of a guest that was continued from a snapshot
            return None
        if one.kind == Kind.TAKEN:
            taken = number(one.payload)
            if taken > self._flying:
                raise ProtocolError(f"{taken} bytes taken, of {self._flying} on their way")
            self._flying -= taken
            return None
        call = self._calls.get(one.call)
        if call is None:
            if not 0 < one.call <= self._last:
                raise ProtocolError(f"call {one.call}, which nobody made")
            return None  # given up, while this was on its way
        call.take(one)
        if call.over:
            del self._calls[call.id]
            self._rests = call.result is not None and call.id == self._latest and not self._outgoing
        return None

    def _greeted(self, one: Frame) -> None:
        greeting, version, nonce = one.payload[:8], one.payload[8:12], one.payload[12:]
        if greeting != GREETING or number(version) != VERSION or len(nonce) != 8:
            raise ProtocolError(f"a greeting that is not version {VERSION} of cardcage's agent")
        self._drop(AgentError("the guest's agent began anew: the guest was reset, or it was ended"))
        self._flying, self._ready = 0, True
        self._queue(frame(0, Kind.WELCOME, 0, nonce))

    # towards the guest

    def _queue(self, data: bytes) -> None:
        self._outgoing.append(data)
        self._queued += len(data)
        self._latest, self._rests = 0, False

    def _pump(self) -> None:
        """Hand on what fits; on the loop thread, under the machine's lock."""
        while self._received is not None:
            with self.changed:
                batch = []
                while self._outgoing and self._flying + len(self._outgoing[0]) <= LINK:
                    batch.append(self._outgoing.popleft())
                    self._flying += len(batch[-1])
                    self._queued -= len(batch[-1])
                self.changed.notify_all()
            if not batch:
                return
            self._received(b"".join(batch))

    def _send(self, *frames: bytes) -> None:
        with self.changed:
            for one in frames:
                self._queue(one)
        self._slot.loop.call_soon(self._pump)

    # towards callers

    def wait(self, call: Call | None, what: Callable[[], bool], deadline: float | None) -> bool:
        """Wait until *what* holds, with the lock held, or *call* is over. False after *deadline* (monotonic seconds).

        Raises what ended the link, or the call.
        """
        __tracebackhide__ = True
        with self.changed:
            while not what():
                failure = self._failure if call is None else call.failure
                if failure is not None:
                    raise failure
                if call is not None and call.over:
                    return True
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return False
                self.changed.wait(left)
            return True

    def await_agent(self, timeout: float | None) -> None:
        """Wait until the agent has greeted. Raises NoAgent after *timeout* seconds, or what ended the link."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self.changed:  # as a greeting is taken: an agent that was welcomed would begin anew
            if not self._ready and not self._asked:
                # an agent that is about to greet passes this over; one in a guest that was continued from a snapshot
                # has greeted another link than this
                self._asked = True
                self._queue(frame(0, Kind.GREET))
        self._slot.loop.call_soon(self._pump)
        if not self.wait(None, lambda: self._ready, deadline):
            raise NoAgent(
                f"{self._slot.machine}: no agent has answered within {timeout:g} s: the guest has none, or hangs"
            )
        if self._failure is not None:
            raise self._failure

    def call(self, verb: Verb, request: bytes, streams: tuple[int, ...] = ()) -> Call:
        """Make a request, which is answered in *streams*, 1 and 2; the agent has greeted.

        Raises AgentError for one that is too long, or what ended the link.
        """
        if len(request) > REQUEST_MAX:
            raise AgentError(f"a request of {len(request)} bytes: expected {REQUEST_MAX} at most")
        pieces = [request[at : at + PAYLOAD_MAX] for at in range(0, max(len(request), 1), PAYLOAD_MAX)]
        with self.changed:
            if self._failure is not None:
                raise self._failure
            self._last += 1
            call = self._calls[self._last] = Call(self._last, verb, streams)
            for at, piece in enumerate(pieces):
                more = MORE if at < len(pieces) - 1 else 0
                kind, first = (Kind.CONTINUE, 0) if at else (Kind.REQUEST, int(verb))
                self._queue(frame(call.id, kind, first | more, piece))
            self._latest = call.id
        self._slot.loop.call_soon(self._pump)
        return call

    def answer(self, verb: Verb, request: bytes, timeout: float | None) -> tuple[int, bytes]:
        """Make a request that is answered at once: errno (0 for success) and what came with it. Raises AgentTimeout."""
        call = self.call(verb, request)
        if not self.wait(
            call, lambda: call.result is not None, None if timeout is None else time.monotonic() + timeout
        ):
            self.cancel(call)
            raise AgentTimeout(f"{self._slot.machine}: the agent has not answered within {timeout:g} s")
        if call.result is None:
            raise call.failure or AgentError("no answer")
        return call.result

    def cancel(self, call: Call) -> None:
        """Forget *call*: its process is killed, with its session; its streams are closed."""
        with self.changed:
            if self._calls.pop(call.id, None) is None:
                return
            call.failure = call.failure or AgentError("the call was given up")
            self._queue(frame(call.id, Kind.CANCEL))
            self.changed.notify_all()
        self._slot.loop.call_soon(self._pump)

    def tell(self, call: Call, kind: Kind, payload: bytes) -> None:
        """Send SIGNAL or RESIZE; nothing once the call is over."""
        if not call.over:
            self._send(frame(call.id, kind, 0, payload))

    def sendable(self, call: Call) -> int:
        """Bytes of stream 0 that can be sent now; the lock is held."""
        return 0 if self._queued > QUEUE else min(call.credit, PIECE)

    def send(self, call: Call, data: memoryview) -> int:
        """Send the beginning of *data* in stream 0, as much as goes now; bytes that went."""
        with self.changed:
            size = min(self.sendable(call), len(data))
            if size == 0 or call.over or call.deaf:
                return 0
            call.credit -= size
            self._queue(frame(call.id, Kind.DATA, 0, data[:size]))
        self._slot.loop.call_soon(self._pump)
        return size

    def end(self, call: Call) -> None:
        """The end of stream 0."""
        if not call.over and not call.deaf:
            self._send(frame(call.id, Kind.END, 0))

    def receive(self, call: Call, stream: int, most: int) -> bytes:
        """Take what is there of stream 1 or 2, up to *most* bytes; empty when nothing is."""
        with self.changed:
            inbox = call.inboxes[stream - 1]
            data = inbox.take(most)
            if inbox.owed < WINDOW // 2 or call.over or inbox.ended:
                return data
            inbox.allowed += inbox.owed
            grant, inbox.owed = inbox.owed, 0
        self._send(frame(call.id, Kind.CREDIT, stream, grant.to_bytes(4, "little")))
        return data


def open_link(slot: Slot) -> Link:
    """Open the back end ``agent``; it is the machine's service of that name. Raises ConfigError for a second one."""
    link = Link(slot)
    slot.host.provide("agent", link)
    return link
