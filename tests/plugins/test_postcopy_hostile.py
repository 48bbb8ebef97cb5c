"""Pages that come, and words that ask for them, are anybody's: what breaks the form ends the connection, and no page
comes twice or elsewhere."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from cardcage.errors import CardcageError
from cardcage.ram import PAGE, RamBlock
from cardcage_jail import listen_at
from cardcage_migrate.faults import open_faults
from cardcage_migrate.missing import Missing
from cardcage_migrate.pager import Orders, Pager
from cardcage_migrate.reach import Waiting, connect, parse
from cardcage_migrate.serving import Serving
from cardcage_migrate.wire import (
    ASKED,
    LARGEST,
    LONGEST,
    MOST,
    OFFSET,
    RUN,
    BrokenStream,
    Channel,
    Frame,
    Kind,
    LinkLost,
    bare_runs,
    pages_asked,
    tables_of_runs,
)
from cardcage_snapshot.faults import Faults
from cardcage_snapshot.pages import touched
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from postcopy_kit import possible

PAGES = 64
SIZE = PAGES * PAGE
SECRET = bytes(range(32))
RUNS = st.lists(st.tuples(st.integers(0, PAGES - 1), st.integers(1, 8)), max_size=5)


@given(
    st.lists(st.tuples(st.integers(0, 1 << 63), st.integers(0, 1 << 31)), max_size=3), st.integers(0, 5), st.binary()
)
def test_runs_without_bytes(runs: list[tuple[int, int]], number: int, more: bytes) -> None:
    """Runs that do not lie in RAM, page by page and in order, are refused."""
    body = b"".join(RUN.pack(*one) for one in runs) + more
    with suppress(BrokenStream):
        found = bare_runs(Frame(Kind.MISSING, number, memoryview(body)), SIZE)
        assert len(found) == number
        end = 0
        for offset, size in found:
            assert end <= offset < offset + size <= SIZE
            assert (offset % PAGE, size % PAGE) == (0, 0)
            end = offset + size


@given(st.lists(st.integers(0, (1 << 64) - 1), max_size=3), st.binary(max_size=9))
def test_pages_that_are_asked_for(offsets: list[int], more: bytes) -> None:
    """Offsets that are of no page of RAM are refused."""
    body = b"".join(map(OFFSET.pack, offsets)) + more
    with suppress(BrokenStream):
        found = pages_asked(Frame(Kind.REQUEST, 0, memoryview(body)), SIZE)
        assert all(offset % PAGE == 0 and offset < SIZE for offset in found)
    assert LARGEST[Kind.REQUEST] == ASKED * OFFSET.size


@given(st.lists(st.tuples(st.booleans(), st.integers(0, PAGES - 1), st.integers(1, 9)), max_size=20))
def test_what_is_missing(words: list[tuple[bool, int, int]]) -> None:
    """Runs that are added and taken away leave what a set of pages has; frames tell of just these, each of them not too
    large."""
    known, model = Missing(SIZE), set[int]()
    for adds, first, length in words:
        pages = range(first, min(first + length, PAGES))
        offset, size = first * PAGE, len(pages) * PAGE
        if adds:
            known.add([(offset, size)])
            model |= set(pages)
        elif known.has_all(offset, size):
            known.remove(offset, size)
            model -= set(pages)
        run = known.next_run(offset, 4 * PAGE)
        assert (run is None) == (not model)
        if run is not None:
            assert {at // PAGE for at in range(run[0], sum(run), PAGE)} <= model
    assert known.count == len(model)
    assert {at // PAGE for run in known.runs() for at in range(run[0], sum(run), PAGE)} == model
    told = [Frame(Kind.MISSING, len(one) // RUN.size, memoryview(one)) for one in tables_of_runs(known.runs())]
    assert [run for one in told for run in bare_runs(one, SIZE)] == list(known.runs())
    huge = list(tables_of_runs([(0, 3 * LONGEST), *((at * PAGE * 2, PAGE) for at in range(MOST))]))
    assert max(map(len, huge)) <= LARGEST[Kind.MISSING]


@contextmanager
def paging(folder: Path, missing: Missing) -> Iterator[tuple[RamBlock, str]]:
    """A pager on threads of this process, RAM of which some is *missing*, and the pager's door."""
    block, uri = RamBlock(SIZE), f"unix:{folder}/door"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ExitStack() as end:
        end.callback(block.close)
        end.enter_context(ours)
        door = end.enter_context(closing(Waiting(parse(uri), listening=listen_at(f"{folder}/door"))))
        pager = Pager(theirs, Orders(uri, SECRET.hex(), patience=20), door)
        thread = threading.Thread(target=pager.run)
        thread.start()
        end.callback(thread.join)
        end.callback(lambda: ours.send(b'{"do": "end"}'))
        faults = end.enter_context(closing(Faults(open_faults(), block.host_address, SIZE)))
        faults.register()
        table = os.memfd_create("missing")
        os.pwrite(table, missing.table, 0)
        told = json.dumps({"do": "begin", "base": block.host_address, "size": SIZE}).encode()
        socket.send_fds(ours, [told], [os.dup(faults.fd), table])
        os.close(table)
        yield block, uri


def there(block: RamBlock) -> set[int]:
    """The numbers of the pages that are there, and not the page of zeros."""
    return {at // PAGE for run in touched(block, own=False) for at in range(run[0], sum(run), PAGE)}


def joined(uri: str, secret: bytes = SECRET, left: Missing | None = None) -> Channel:
    """A connection as a source has it, when it has heard what is missing: that is *left*."""
    channel = Channel(connect(parse(uri))[0], patience=20)
    channel.begin()
    channel.send(Kind.JOIN, secret)
    assert channel.receive(Kind.JOINED).argument & 1
    while (frame := channel.receive(Kind.MISSING, Kind.END)).kind is Kind.MISSING:
        if left is not None:
            left.add(bare_runs(frame, SIZE))
    return channel


@possible
@settings(max_examples=25, phases=(Phase.generate,))  # it does not shrink: each example takes time
@given(
    RUNS,
    st.lists(
        st.tuples(st.sampled_from([Kind.PAGES, Kind.ZEROS, Kind.DONE, Kind.REQUEST]), RUNS, st.integers(-1, 1)),
        min_size=1,
        max_size=4,
    ),
)
def test_pages_of_a_hostile_source(
    tmp_path_factory: pytest.TempPathFactory,
    missing: list[tuple[int, int]],
    frames: list[tuple[Kind, list[tuple[int, int]], int]],
) -> None:
    """Frames of any runs, twice, of pages that are there, or with another number: what breaks the form ends the
    connection, only pages that are missing ever come, and who has the secret can go on and send the rest."""
    wanted = Missing(SIZE)
    wanted.add((first * PAGE, min(length, PAGES - first) * PAGE) for first, length in missing)
    before = set(pages_of(wanted))
    with paging(tmp_path_factory.mktemp("pager"), wanted) as (block, uri):
        channel = joined(uri)
        with suppress(LinkLost):
            for kind, runs, off in frames:
                table = b"".join(RUN.pack(first * PAGE, length * PAGE) for first, length in runs)
                data = b"x" * (PAGE * sum(length for _, length in runs)) if kind is Kind.PAGES else b""
                channel.send(kind, table, data, argument=max(len(runs) + off, 0))
        channel.close()
        left = Missing(SIZE)
        try:
            second = joined(uri, left=left)
        except CardcageError:  # all came, and it was told that it had
            assert all(kind is not Kind.DONE for kind, _, _ in frames) is False
            assert there(block) <= before
            return
        assert there(block) | set(pages_of(left)) <= before
        assert not there(block) & set(pages_of(left))
        for run in list(left.runs()):
            second.send(Kind.PAGES, RUN.pack(*run), b"y" * run[1], argument=1)
        while second.receive(Kind.DONE, Kind.REQUEST).kind is not Kind.DONE:
            pass
        second.send(Kind.DONE)
        second.close()
        for page in pages_of(left):
            assert block.view[page * PAGE] == ord("y")


def pages_of(missing: Missing) -> list[int]:
    """Numbers."""
    return [at // PAGE for run in missing.runs() for at in range(run[0], sum(run), PAGE)]


def _each(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(at, PAGE) for offset, size in runs for at in range(offset, offset + size, PAGE)]


@possible
def test_nobody_comes_without_the_secret(tmp_path: Path) -> None:
    """Who has another secret, or says something else, is hung up on; and who has it is heard after them."""
    missing = Missing(SIZE)
    missing.add([(0, PAGE)])
    with paging(tmp_path, missing) as (_, uri):
        for secret in (bytes(32), b"", SECRET[:-1]):
            with pytest.raises(LinkLost):
                joined(uri, secret)
        with closing(connect(parse(uri))[0]) as peer:
            peer.sendall(bytes(100))
            with pytest.raises((LinkLost, BrokenStream)):
                Channel(peer, patience=20).receive(Kind.JOINED)
        joined(uri).close()


@settings(max_examples=25, phases=(Phase.generate,))  # it does not shrink: each example takes time
@given(
    st.lists(
        st.tuples(
            st.sampled_from([Kind.REQUEST, Kind.STARTED, Kind.DONE, Kind.PING, Kind.JOINED]),
            st.lists(st.integers(0, PAGES + 1) | st.integers(0, (1 << 52) - 1), max_size=8),
            st.integers(0, 3),
        ),
        max_size=6,
    )
)
def test_words_of_a_hostile_destination(words: list[tuple[Kind, list[int], int]]) -> None:
    """Whatever a destination asks for and says, each page goes over once at most, and one of the project's errors says
    what is wrong."""
    block = RamBlock(SIZE)
    ours, theirs = socket.socketpair()
    with closing(block), closing(theirs):
        block.view[:] = b"z" * SIZE
        serving = Serving(block, SECRET, None, 20)
        answer = Channel(theirs, patience=20)
        heard: list[tuple[int, int]] = []

        def answering() -> None:
            with suppress(CardcageError):
                answer.meet()
                answer.receive(Kind.JOIN)
                answer.send(Kind.JOINED)
                answer.send(Kind.JOINED, argument=1)
                for kind, pages, argument in words:
                    body = b"".join(OFFSET.pack(one * PAGE) for one in pages) if kind is Kind.REQUEST else b""
                    answer.send(kind, body, argument=argument)
                while True:
                    frame = answer.receive(Kind.PAGES, Kind.DONE)
                    if frame.kind is Kind.DONE:
                        return
                    heard.extend(RUN.iter_unpack(frame.body[: frame.argument * RUN.size]))
                    if sum(size for _, size in heard) == SIZE:
                        answer.send(Kind.DONE)

        thread = threading.Thread(target=answering)
        thread.start()
        try:
            serving.join(ours)
            serving.mark([(0, SIZE)])
            serving.begin()
            with suppress(CardcageError):
                serving.wait(lambda: None)
        finally:
            serving.close()
            thread.join()
        pages = [one for one, _ in _each(heard)]
        assert len(pages) == len(set(pages)) <= PAGES


def test_two_that_close_it_at_once() -> None:
    """A migration that is over and a machine that ends may both end the serving of pages, at one moment."""
    block, failed = RamBlock(PAGE), []

    def close(serving: Serving, both: threading.Barrier) -> None:
        both.wait()
        try:
            serving.close()
        except OSError as error:
            failed.append(error)

    with closing(block):
        for _ in range(200):
            serving, both = Serving(block, SECRET, None, 20), threading.Barrier(2)
            threads = [threading.Thread(target=close, args=(serving, both)) for _ in range(2)]
            for one in threads:
                one.start()
            for one in threads:
                one.join()
    assert not failed


@possible
def test_a_page_that_never_comes(tmp_path: Path) -> None:
    """Who waits for a page that is lost has an error, in the kernel too, and pages that are there stay."""
    block: Any = RamBlock(SIZE)
    with closing(block), closing(Faults(open_faults(), block.host_address, SIZE)) as faults:
        block.view[PAGE] = 7
        faults.register()
        fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
        found: list[int] = []

        def write() -> None:
            try:
                os.pwrite(fd, block.view[4 * PAGE : 5 * PAGE], 0)
            except OSError as error:
                found.append(error.errno or 0)

        thread = threading.Thread(target=write)
        thread.start()
        while faults.waited() != [4 * PAGE]:
            pass
        faults.poison(0, SIZE)
        thread.join()
        os.close(fd)
        assert found == [14]
        assert block.view[PAGE] == 7
