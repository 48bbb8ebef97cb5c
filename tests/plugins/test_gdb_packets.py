"""gdb's packets: whatever arrives is cut, refused or answered."""

from __future__ import annotations

import pytest
from cardcage.machine import State
from cardcage_gdb.stub import Stub
from cardcage_gdb.wire import INTERRUPT, MOST, Splitter, TooMuch, frame, hexadecimal, unescape
from cardcage_qmp import control_of
from gdb_kit import machine
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.once


@given(st.lists(st.binary(max_size=200), max_size=20))
def test_whatever_arrives_is_cut_or_refused(pieces: list[bytes]) -> None:
    """Any bytes, cut anywhere, are packets, noise or too much; what is held back is no more than a packet."""
    splitter = Splitter()
    for one in pieces:
        splitter.feed(one)
        assert len(splitter._held) <= MOST + 4


@given(st.lists(st.binary(max_size=60), max_size=5), st.integers(1, 7))
def test_packets_arrive_as_they_were_framed(contents: list[bytes], size: int) -> None:
    """What is framed, with any bytes in it, is found again whatever pieces it comes in."""
    data, splitter = b"".join(frame(one) for one in contents), Splitter()
    found = [one for at in range(0, len(data), size) for one in splitter.feed(data[at : at + size])]
    assert [(unescape(body), sign) for body, sign in found] == [(one, b"+") for one in contents]


def test_packets_that_are_wrong() -> None:
    """A wrong checksum asks for the packet again, Ctrl-C stands between packets, and one without an end is refused."""
    splitter = Splitter()
    assert splitter.feed(b"+$g#00\x03$?#3f-") == [(b"", b"!"), (INTERRUPT, b""), (b"?", b"+"), (b"", b"-")]
    splitter.acknowledges = False
    assert splitter.feed(b"$g#00") == [(b"g", b"")]
    with pytest.raises(TooMuch):
        splitter.feed(b"$" + b"m" * (MOST + 2))
    assert (hexadecimal(b"-1"), hexadecimal(b""), hexadecimal(b"1" * 17), hexadecimal(b"fF")) == (None, None, None, 255)


LETTERS = st.sampled_from(
    [b"?", b"g", b"G", b"p", b"P", b"m", b"M", b"X", b"Z", b"z", b"H", b"T", b"v", b"q", b"Q", b"!"]
)
WORDS = st.sampled_from(
    b"Supported:multiprocess+ fThreadInfo ThreadExtraInfo,1 Xfer:features:read:target.xml:0,fff Rcmd,68656c70 Cont;s:1 "
    b"0,1000,1 2,2000,2 4,fffffffffffffffd,2 1000,8 ffffffffffffffff,1 0,ffffffffffffffff 10=11 Cont? 1000,2:4141 "
    b"qemu.PhyMemMode:1 Rcmd,7068797320 g1 p1.1 0 ffff c:p1.-1".split()
)


def test_whatever_gdb_says_is_answered() -> None:
    """Any packet, well formed or not, has an answer of bounded length or none, and the guest and its machine go on."""
    with machine("tcg", cpus=2, start=False) as vm:
        stub = Stub(control_of(vm), lambda: None)

        @settings(max_examples=150)
        @given(st.lists(st.tuples(LETTERS, st.lists(st.one_of(WORDS, st.binary(max_size=12)), max_size=3)), max_size=6))
        def talk(packets: list[tuple[bytes, list[bytes]]]) -> None:
            for letter, parts in packets:
                answer = stub.answer(letter + b"".join(parts))
                assert answer is None or len(answer) <= MOST + 64
                stub.running = False

        talk()
        assert vm.state is State.BUILT
