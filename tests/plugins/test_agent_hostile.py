"""The host's side of the agent against a guest that sends anything: bounded, never raised, told in one line."""

from __future__ import annotations

import itertools
import struct
import threading
from collections.abc import Callable
from subprocess import TimeoutExpired
from typing import Any

import pytest
from agent_kit import CREDIT, DATA, EXITED, GREETING, RESULT, STARTED, AgentMachine, Guest
from cardcage.errors import CardcageError, Denied, StateError
from cardcage.security import Act, Mediator
from cardcage_agent.errors import AgentError, AgentTimeout, NoAgent, ProtocolError
from cardcage_agent.frames import BUFFER, LINK, PAYLOAD_MAX, WINDOW, Frame, Kind, Parser, Verb, frame
from hypothesis import given
from hypothesis import strategies as st

KINDS = st.one_of(st.sampled_from(list(Kind)), st.integers(0, 65535))
NUMBERS = st.integers(0, 0xFFFFFFFF).map(lambda one: one.to_bytes(4, "little"))
PAYLOADS = st.one_of(NUMBERS, st.binary(max_size=40), st.just(GREETING), st.just(bytes(PAYLOAD_MAX)))
FRAMES = st.tuples(st.integers(0, 4), KINDS, st.integers(0, 3), PAYLOADS)


def packed(one: tuple[Any, ...]) -> bytes:
    call, kind, stream, payload = one
    return frame(call, kind, stream, payload)


def greeted() -> Guest:
    guest = Guest()
    guest.link.write(frame(0, Kind.HELLO, 0, GREETING))
    return guest


@given(st.lists(FRAMES, max_size=8), st.lists(st.integers(0, 300), max_size=8))
def test_frames_come_apart_however_the_stream_is_cut(frames: list[Any], cuts: list[int]) -> None:
    """Frames come out unchanged and in their order, for any cutting."""
    stream = b"".join(packed(one) for one in frames)
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    parser = Parser()
    found = [one for low, high in itertools.pairwise(edges) for one in parser.feed(stream[low:high])]
    assert found == [Frame(*one) for one in frames]


@given(st.lists(st.binary(max_size=60), max_size=6))
def test_no_bytes_make_the_parser_keep_more_than_a_frame(pieces: list[bytes]) -> None:
    """Any bytes are frames, or a ProtocolError; what is kept is less than a frame."""
    parser = Parser()
    try:
        for piece in pieces:
            parser.feed(piece)
    except ProtocolError:
        return
    assert len(parser._kept) < PAYLOAD_MAX + 12


@given(st.booleans(), st.lists(st.one_of(FRAMES.map(packed), st.binary(max_size=40)), max_size=12))
def test_no_guest_makes_the_link_raise_or_grow(greets: bool, pieces: list[bytes]) -> None:
    """Whatever comes while calls are under way, write raises nothing, and each call has at most its windows."""
    guest = greeted() if greets else Guest()
    calls = [guest.link.call(verb, b"", streams) for verb, streams in ((Verb.RUN, (1, 2)), (Verb.READ, (1,)))]
    for piece in pieces:
        guest.link.write(piece)
        assert len(guest.link._calls) <= len(calls)
        assert guest.link._queued <= LINK
        assert guest.link._flying <= LINK
        for call in calls:
            assert all(len(one.kept) <= WINDOW for one in call.inboxes)
            assert 0 <= call.credit <= BUFFER


RUN = (frame(1, STARTED, 0, b"\7\0\0\0"),)  # type: ignore[arg-type]  # a kind's number


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ((0, CREDIT, 0, b"\1\0\0\0"), "call 0"),
        ((2, DATA, 1, b"x"), "call 2, which nobody made"),
        ((1, CREDIT, 0, b"\1\0\0\0"), "more credit"),
        ((1, CREDIT, 0, b"\1"), "a number of 1 bytes"),
        ((1, DATA, 0, b"x"), "kind 8, stream 0"),
        ((1, DATA, 1, b""), "more output"),
        ((1, STARTED, 0, b"\1\0\0\0"), "kind 18"),
        ((1, EXITED, 0, b"\1\0\1\0"), "status 65537"),
        ((1, RESULT, 0, b"\0\0\1\0"), "error number 65536"),
        ((0, Kind.TAKEN, 0, b"\xff\xff\xff\0"), "bytes taken"),
        ((0, Kind.HELLO, 0, b"cardcage\2\0\0\0" + bytes(8)), "not version 1"),
    ],
)
def test_what_no_agent_sends_ends_the_link(wrong: tuple[Any, ...], why: str) -> None:
    """A breach ends each call with ProtocolError, is logged once, and nothing is read any more."""
    guest = greeted()
    call = guest.link.call(Verb.RUN, b"", (1, 2))
    guest.link.write(RUN[0] + packed(wrong))
    assert why in str(call.failure)
    guest.link.write(packed(wrong))
    assert len(guest.slot.log.entries) == 1
    with pytest.raises(ProtocolError):
        guest.vm.run("x")


def test_output_beyond_its_credit_ends_the_link() -> None:
    """A guest that sends a byte more than its window breaks the protocol; one that sends the window does not."""
    guest = greeted()
    call = guest.link.call(Verb.RUN, b"", (1,))
    for _ in range(WINDOW // 32):
        guest.link.write(frame(1, Kind.DATA, 1, bytes(32)))
    assert (call.failure, len(call.inboxes[0].kept)) == (None, WINDOW)
    guest.link.write(frame(1, Kind.DATA, 1, b"x"))
    assert "more output than it has credit for" in str(call.failure)


def test_a_frame_that_was_on_its_way_is_passed_over() -> None:
    """What comes for a call that was given up breaks nothing."""
    guest = greeted()
    call = guest.link.call(Verb.RUN, b"", (1, 2))
    guest.link.cancel(call)
    guest.link.write(RUN[0] + frame(1, Kind.DATA, 1, b"late"))
    assert isinstance(call.failure, AgentError)
    assert not guest.slot.log.entries


def test_a_guest_that_never_answers_meets_the_callers_timeout() -> None:
    """TimeoutExpired for a process, AgentTimeout for a file, NoAgent where no agent ever greeted: no call is left."""
    guest = greeted()
    with pytest.raises(TimeoutExpired):
        guest.vm.run("x", timeout=0.01)
    with pytest.raises(AgentTimeout, match=r"vm: the agent has not answered within 0\.01 s"):
        guest.vm.files.stat("/", timeout=0.01)
    with pytest.raises(AgentTimeout, match="silent"):
        guest.vm.files.read("/x", timeout=0.01)
    with pytest.raises(AgentTimeout, match="silent"):
        guest.vm.files.write("/x", bytes(1 << 20), timeout=0.01)
    assert not guest.link._calls
    with pytest.raises(NoAgent, match=r"vm: no agent has answered within 0\.01 s: the guest has none, or hangs"):
        Guest().vm.run("x", timeout=0.01)


def test_a_machine_without_a_port_says_so_in_one_line() -> None:
    """StateError names the port and Machine.debian()."""
    with pytest.raises(StateError, match=r"vm: no port for an agent: Machine\.debian\(\) makes a machine that has one"):
        AgentMachine(None).run("x")


def test_security_is_asked_for_each_verb() -> None:
    """A checker that refuses management reach refuses all of them, before anything is sent."""

    class Refuses:
        def check(self, act: Act) -> None:
            if (act.tclass, act.permissions, act.target) == ("management", ("reach",), "vm"):
                raise Denied(f"no {act.facts['command']}")

    guest = greeted()
    guest.sent.clear()
    guest.vm.mediator = Mediator((Refuses(),))
    vm: Any = guest.vm
    for command, verb in (
        ("run", lambda: vm.run("x")),
        ("popen", lambda: vm.popen("x")),
        ("files", lambda: vm.files),
        ("get", lambda: vm.get("/x", "/tmp/x")),
        ("put", lambda: vm.put(__file__, "/x")),
        ("ping", lambda: vm.agent.ping()),
        ("reseed", lambda: vm.agent.reseed()),
        ("set_time", lambda: vm.agent.set_time()),
    ):
        with pytest.raises(Denied, match=f"no {command}"):
            verb()
    assert not guest.sent


def test_a_link_that_ends_ends_what_waits_on_it() -> None:
    """The error of the end is what each waiting call raises."""
    guest = greeted()
    call = guest.link.call(Verb.RUN, b"", (1, 2))
    guest.link.fail(AgentError("the machine ended"))
    with pytest.raises(AgentError, match="the machine ended"):
        guest.link.wait(call, lambda: False, None)
    with pytest.raises(CardcageError, match="the machine ended"):
        guest.vm.files.stat("/")


def test_an_agent_that_begins_anew_is_served_anew() -> None:
    """A second greeting ends the calls of the first, and the new agent gets its own nonce before anything else."""
    guest = greeted()
    call = guest.link.call(Verb.RUN, b"", (1, 2))
    guest.sent.clear()
    guest.link.write(frame(0, Kind.HELLO, 0, GREETING[:-8] + b"another."))
    assert "began anew" in str(call.failure)
    assert Parser().feed(bytes(guest.sent)) == [Frame(0, Kind.WELCOME, 0, b"another.")]


def test_requests_wait_for_room_on_the_port() -> None:
    """No more than the port keeps is on its way to a guest that takes nothing; the rest goes as it takes."""
    guest = greeted()
    guest.sent.clear()
    for _ in range(3):
        call = guest.link.call(Verb.WRITE, b"")
        data = memoryview(bytes(BUFFER))
        while sent := guest.link.send(call, data):
            data = data[sent:]
        assert not data
    assert LINK - 2 * PAYLOAD_MAX < len(guest.sent) <= LINK
    while guest.link._flying:
        guest.link.write(frame(0, Kind.TAKEN, 0, guest.link._flying.to_bytes(4, "little")))
    assert sum(len(one.payload) for one in Parser().feed(bytes(guest.sent)) if one.kind == Kind.DATA) == 3 * BUFFER


def test_names_of_a_list_are_names() -> None:
    """A guest whose directory holds a path, or ends inside an entry, gives an AgentError."""
    for name in (b"../x", b"..", b"", b"a\0b"):
        guest = greeted()
        record = bytes(40) + len(name).to_bytes(2, "little") + name
        answer = frame(1, Kind.DATA, 1, record) + frame(1, Kind.RESULT, 0, bytes(5))
        guest.link.start(lambda data, guest=guest, answer=answer: guest.link.write(answer))
        with pytest.raises(AgentError, match="which is no name"):
            guest.vm.files.list("/")
    guest = greeted()
    answer = frame(1, Kind.DATA, 1, bytes(30)) + frame(1, Kind.RESULT, 0, bytes(5))
    guest.link.start(lambda data: guest.link.write(answer))
    with pytest.raises(AgentError, match="ends inside an entry"):
        guest.vm.files.list("/")


def test_a_watch_ends_with_its_machine_by_the_reason() -> None:
    """What ended the machine, or its agent, is raised, also when nobody waited then; the kernel's own end is None."""
    ended = AgentError("vm: the machine ended")
    kernels = struct.pack("<iIII", 1, 0x2000, 0, 0) + struct.pack("<iIII", 1, 0x8000, 0, 0)
    for event, after in ((b"", ended), (kernels, None)):
        guest = greeted()
        sent = frame(2, Kind.RESULT, 0, bytes(5)) + (frame(1, Kind.DATA, 1, event) if event else b"")
        guest.link.start(lambda data, guest=guest, sent=sent: guest.link.write(sent) if b"\x0b\0" in data else None)
        watch = guest.vm.files.watch("/")
        if after is not None:
            guest.link.fail(after)
            with pytest.raises(AgentError, match="the machine ended"):
                watch.get()
        else:
            assert [change.kind for change in watch] == ["unmount", "ignored"]
            assert watch.get() is None


def test_events_are_those_of_inotify() -> None:
    """A guest whose event is about a path, is none, or has a name without end, loses its watch, by an AgentError."""
    for event in (
        struct.pack("<iIII", 1, 0x100, 0, 16) + b"../x".ljust(16, b"\0"),
        struct.pack("<iIII", 1, 0x10000000, 0, 0),
        struct.pack("<iIII", 1, 0x100, 0, 0xFFFFFFFF),
    ):
        guest = greeted()
        sent = frame(2, Kind.RESULT, 0, bytes(5)) + frame(1, Kind.DATA, 1, event)
        guest.link.start(lambda data, guest=guest, sent=sent: guest.link.write(sent) if b"\x0b\0" in data else None)
        watch = guest.vm.files.watch("/")
        with pytest.raises(AgentError, match=r"none of inotify's|expected 256 at most"):
            watch.get(timeout=60)
        assert not guest.link._calls


class Entered(threading.Condition):
    """Something happens right before it is entered for the first time."""

    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__()
        self._acts = [act]

    def __enter__(self) -> bool:
        while self._acts:
            self._acts.pop()()
        return super().__enter__()


def test_an_agent_that_greets_meanwhile_is_not_asked_to_greet() -> None:
    """An agent's greeting comes as somebody begins to wait for one: it is welcomed, and not made to begin anew."""
    guest = Guest()
    guest.link.changed = Entered(lambda: guest.link.write(frame(0, Kind.HELLO, 0, GREETING)))
    guest.vm.agent.wait(10)
    assert bytes(guest.sent) == frame(0, Kind.WELCOME, 0, GREETING[-8:])
