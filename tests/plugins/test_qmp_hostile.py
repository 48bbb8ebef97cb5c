"""QEMU's monitor protocol: what no peer can do, whatever bytes it sends."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from cardcage.hookspecs import hookimpl
from cardcage.registry import Registry
from cardcage_qmp import QmpCommand, Session
from cardcage_qmp.wire import DEEPEST, MOST, JsonError, Splitter, TooMuch, load
from hypothesis import given, settings
from hypothesis import strategies as st
from qmp_kit import Client, machines


class Echo:
    """Offers a command."""

    @hookimpl
    def cardcage_register(self, registry: Registry) -> None:
        registry.add(QmpCommand("echo", echo))


def echo(session: Session, text: str, times: int = 1) -> list[str]:
    return [text] * times


texts = st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=5)
values = texts | st.none() | st.integers() | st.lists(texts, max_size=3) | st.dictionaries(texts, texts, max_size=3)
objects = st.dictionaries(texts, values, max_size=3)


@settings(max_examples=50)
@given(
    st.lists(objects, max_size=4),
    st.sampled_from(["", "\n", " \r\n"]),
    st.booleans(),
    st.lists(st.integers(1, 30), min_size=1),
)
def test_objects_are_cut_wherever_they_are_split(
    given: list[dict[str, Any]], gap: str, ascii: bool, sizes: list[int]
) -> None:
    """Objects come out as they were, however the bytes arrive, with and without space between them."""
    stream = gap.join(json.dumps(one, ensure_ascii=ascii) for one in given).encode()
    found, splitter, size = [], Splitter(), cycle(sizes)
    while stream:
        at = next(size)
        found += splitter.feed(stream[:at])
        stream = stream[at:]
    assert [load(one) for one in found] == given


@given(
    st.lists(
        st.binary(max_size=40) | st.sampled_from([b"{", b"}", b"'", b'"', b"\\", b"\n", b"[[", b'{"a":']), max_size=30
    )
)
def test_bytes_of_any_kind(pieces: list[bytes]) -> None:
    """Whatever arrives is cut into pieces that parse or do not, and what is held is bounded."""
    splitter = Splitter()
    for one in pieces:
        try:
            for text in splitter.feed(one):
                with suppress(JsonError):
                    load(text)
        except TooMuch:
            return


def test_bounds_of_the_wire() -> None:
    """A value that is too long or too deep is refused while it arrives."""
    with pytest.raises(TooMuch, match="depth"):
        Splitter().feed(b'{"a":' * (DEEPEST + 1))
    splitter = Splitter()
    assert splitter.feed(b'{"a": "' + b"x" * (MOST - 7)) == []
    with pytest.raises(TooMuch, match="size"):
        splitter.feed(b"x")
    with pytest.raises(TooMuch, match="size"):
        Splitter().feed(b"x" * (MOST + 1))
    with pytest.raises(JsonError):
        load(b'{"a": ' + b"9" * 100_000 + b"}")


@pytest.mark.parametrize("text", [b"{" + b"\\'" * (MOST // 2 - 1) + b"}", b"'" + b'\\"' * (MOST // 2 - 1)])
def test_quotes_without_an_end(text: bytes) -> None:
    """A value full of quotes that are never closed is refused as soon as any other of its length, which is short of
    hours."""
    with pytest.raises(JsonError):
        load(text)


@settings(max_examples=20)
@given(
    st.lists(
        st.binary(max_size=60)
        | st.sampled_from([b'{"execute":', b"}", b'"query-name"', b"\n", b'{"execute":"echo","arguments":{"text":"']),
        max_size=20,
    )
)
def test_a_hostile_peer(pieces: list[bytes]) -> None:
    """Whatever a peer sends, it has answers in JSON, and the next peer is served."""
    session = HOSTILE.get()
    with Client(session, ready=False) as peer:
        peer.send(b'{"execute": "qmp_capabilities"}' + b"".join(pieces))
        peer.socket.shutdown(socket.SHUT_WR)
        for line in iter(peer.file.readline, b""):
            assert isinstance(json.loads(line), dict)
    with Client(session) as peer:
        assert peer.ask("query-name")["return"]


class _Hostile:
    """One machine for all examples."""

    path: Path | None = None

    def get(self) -> Path:
        assert self.path is not None
        return self.path


HOSTILE = _Hostile()


@pytest.fixture(scope="module", autouse=True)
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("hostile")
    for make in machines(folder, Echo()):
        make()
        HOSTILE.path = folder / "qmp"
        yield
