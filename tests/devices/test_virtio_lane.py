"""Requests of a disk that native code serves: the same answers as Python's walk, from any ring at all."""

from __future__ import annotations

import os
import struct
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cardcage._host.log import Log, LogSink
from cardcage._machine.granted import BackendGate, MemoryGate
from cardcage.memory import GuestMemoryError, PhysicalMemory, RamBlock, RamRange
from cardcage_block.check import check
from cardcage_block.drive import Drive, open_image
from cardcage_block.header import Header
from cardcage_block.hostfile import CALM, WAITED, HostFile
from cardcage_block.make import Qcow2Shape, create_qcow2
from cardcage_block.raw import RawImage
from cardcage_block.tables import read_bytes
from cardcage_virtio.devices.blk import Blk, BlkOptions
from cardcage_virtio.native import build
from cardcage_virtio.queue import lane as lanes
from cardcage_virtio.queue.lane import EMPTY, MORE, OTHER
from cardcage_virtio.queue.request import RingError
from cardcage_virtio.testing import INDIRECT, NEXT, WRITE, Bench
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

DISK, RAM = 64 << 10, 64 << 10
CONTENT = bytes(at * 7 + (at >> 8) & 0xFF for at in range(DISK))
TABLE, BUFFERS = 0x8000, 0x9000
"""Where an indirect table and buffers are, behind the ring of 16 entries at 0x1000."""
LOAD: Any = lanes._load
TRAPS = ("-fsanitize=undefined,bounds-strict", "-fno-sanitize=alignment", "-fsanitize-undefined-trap-on-error")


@pytest.fixture(scope="module", params=["as built", "with traps"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The library that is installed; or one that ends the process by what C leaves undefined, so that no index is
    ever out of its array."""
    if request.param == "as built":
        assert lanes.why_not() == ""
        yield
        return
    if not build.compiler().endswith("gcc"):
        pytest.skip("needs gcc, whose traps these are")
    made = tmp_path_factory.mktemp("native") / build.LIBRARY
    build.build(made, more=TRAPS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes, "_load", lambda: (lanes._functions(str(made)), ""))
        yield


def disk(folder: Path, name: str = "disk", **more: Any) -> Any:
    path = folder / name
    path.write_bytes(CONTENT)
    return RawImage(HostFile(str(path), writable=True), **more)


def calm(image: Any) -> None:
    """Take the page cache to be as quick with writes as it mostly is, whatever this host is busy with."""
    image._file._nowait_writes, image._file._doubt, image._file.took = False, 0, lambda seconds, size: None


def make(image: Any, memory: int = 1 << 20, **more: Any) -> tuple[Any, Any]:
    device = Blk(BlkOptions(drive="x", **{name: more.pop(name) for name in ("readonly",) if name in more}))
    return Bench(device, backends={"block": image}, memory=memory, **more), device


def head(kind: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


def refuse(*values: Any) -> Any:
    raise AssertionError("this is Python's")


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("event_index", [False, True])
def test_plain_requests_are_served_natively(library: None, tmp_path: Path, indirect: bool, event_index: bool) -> None:
    """Reads and writes of whole pages, any number of parts and around the ring, are served before the notification
    returns, with one interrupt for a batch, and no request is walked in Python."""
    image = disk(tmp_path)
    calm(image)
    bench, device = make(image, indirect=indirect, event_index=event_index, size=16)
    bench.virtio.rings[0].pop = refuse
    for turn in range(40):
        at = turn % 7
        wanted = bench.driver().add([head(0, 8 * at)], [512, 1024, 2560, 1])
        written = bench.driver().add([head(1, 64), b"%4d" % turn * 512, b"%4d" % turn * 512], [1])
        bench.kick()
        found = dict(bench.driver().used())
        assert found == {wanted: CONTENT[4096 * at : 4096 * at + 4096] + b"\0", written: b"\0"}
        assert (tmp_path / "disk").read_bytes()[64 * 512 : 64 * 512 + 4096] == b"%4d" % turn * 1024
        assert bench.interrupts == [0] * (turn + 1)
    assert (device.counts.reads, device.counts.read_bytes) == (40, 40 * 4096)
    assert (device.counts.writes, device.counts.written_bytes) == (40, 40 * 4096)
    bench.close()


def test_what_is_uncommon_is_left_to_python(library: None, tmp_path: Path) -> None:
    """Flushes, serial numbers, parts of pages, requests outside the disk: each is answered as ever."""
    bench, _ = make(disk(tmp_path))
    assert bench.call([head(4)], [1]) == b"\0"
    assert bench.call([head(8)], [20, 1])[-1] == 0
    assert bench.call([head(1, 1), b"x" * 512], [1]) == b"\0"
    assert bench.call([head(0, 1)], [512, 1]) == b"x" * 512 + b"\0"
    assert bench.call([head(0, DISK // 512)], [512, 1])[-1] == 1
    assert bench.call([head(0, DISK // 512 - 1)], [1024, 1])[-1] == 1
    assert bench.call([head(0, 1 << 60)], [512, 1])[-1] == 1
    assert bench.call([head(0)], [100, 1])[-1] == 1
    assert bench.call([head(99)], [1]) == b"\2"
    bench.close()


def test_a_readonly_disk_is_not_written_natively(library: None, tmp_path: Path) -> None:
    """Neither one whose device is, nor one whose image is."""
    for image, more in ((disk(tmp_path), {"readonly": True}), (disk(tmp_path, readonly=True), {})):
        bench, _ = make(image, **more)
        assert bench.call([head(1), bytes(4096)], [1]) == b"\1"
        assert (tmp_path / "disk").read_bytes() == CONTENT
        bench.close()


def test_an_image_that_is_guessed_to_be_raw_stays_so(library: None, tmp_path: Path) -> None:
    """Native code writes neither its first nor its last sector."""
    image = disk(tmp_path, guessed=True)
    calm(image)
    bench, _ = make(image)
    assert bench.call([head(1), b"QFI\xfb" + bytes(4092)], [1]) == b"\1"
    assert bench.call([head(1, 16), b"QFI\xfb" + bytes(4092)], [1]) == b"\0"
    low, high = image.plain()[3:]
    assert 512 <= low < high <= DISK - 512
    bench.close()


def test_a_file_that_waits_is_not_written_natively(tmp_path: Path) -> None:
    """Once writes took long, where the file system cannot tell beforehand, workers write until many did not."""
    image = disk(tmp_path)
    file: Any = image._file
    file._nowait_writes, file._doubt = False, 0
    assert file.at_hand()[2] == 0
    image.took(WAITED / 2, 4096)
    image.took(2 * WAITED, 4 << 20)
    assert file.at_hand()[2] == 0
    image.took(2 * WAITED, 4096)
    assert file.at_hand()[2] == -1
    assert file._doubt == 2 * CALM[0]
    image.close()
    (tmp_path / "direct").write_bytes(CONTENT)
    direct: Any = open_image(Drive(str(tmp_path / "direct"), format="raw", cache="none"), warn=print)
    assert direct.plain()[1:3] == (-1, -1)
    direct.close()


def test_what_is_not_in_the_page_cache_is_read_by_a_worker(library: None, tmp_path: Path) -> None:
    """A page that the host has to fetch is right all the same."""
    image = disk(tmp_path)
    fd = image._file.fd
    os.fsync(fd)
    bench, _ = make(image)
    for at in range(8):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert bench.call([head(0, 8 * at)], [4096, 1]) == CONTENT[4096 * at : 4096 * at + 4096] + b"\0"
    bench.close()


def test_a_revoked_file_is_not_read(library: None, tmp_path: Path) -> None:
    """While the back end is shut each request is an I/O error; after it they go on."""
    gate = BackendGate("block")
    bench, _ = make(gate.before(disk(tmp_path)))
    read = [head(0)], [4096, 1]
    assert bench.call(*read)[:4096] == CONTENT[:4096]
    gate.shut("image")()
    assert bench.call(*read)[-1] == 1
    gate.open("image")()
    assert bench.call(*read)[:4096] == CONTENT[:4096]
    bench.close()


def test_revoked_memory_is_not_reached(library: None, tmp_path: Path) -> None:
    """Once DMA is revoked nothing of RAM that native code knew is written; the walk in Python says why."""
    bench, device = make(disk(tmp_path), start=False)
    gate = MemoryGate(bench.memory, Log(LogSink(level="error")))
    bench.slot.memory = gate.memory  # as a machine with a policy has it
    bench.start()
    assert bench.call([head(0)], [4096, 1])[:4096] == CONTENT[:4096]
    gate.switch("writes", False)()
    bench.driver().add([head(0)], [4096, 1])
    before = bench.memory.read(0, 1 << 20)
    ring: Any = bench.virtio.rings[0]
    assert device._bulk(ring) == OTHER
    assert bench.memory.read(0, 1 << 20) == before
    gate.switch("writes", True)()
    bench.kick()
    assert bench.wait(0, 1)
    bench.close()


def test_many_stretches_of_ram(library: None, tmp_path: Path) -> None:
    """Buffers in more ranges of RAM than native code keeps are found all the same."""
    memory = PhysicalMemory()
    memory.add(RamRange(0, 1 << 20, RamBlock(1 << 20)))
    memory.add(*(RamRange((2 + 2 * at) << 20, 4096, RamBlock(4096)) for at in range(20)))
    bench, _ = make(disk(tmp_path), event_index=False, start=False)
    bench.memory.close()
    bench.slot.memory = bench.memory = memory
    bench.start()
    for at in range(20):
        where = (2 + 2 * at) << 20
        memory.write(0x90000, head(0, 8 * (at % 8)))
        bench.driver().add_raw([(0x90000, 16, 0), (where, 4096, WRITE), (0x90010, 1, WRITE)])
        bench.virtio.rings[0].pop = refuse
        bench.kick()
        assert len(bench.driver().collect()) == 1
        assert memory.read(where, 4096) == CONTENT[4096 * (at % 8) : 4096 * (at % 8) + 4096]
    bench.close()


def test_a_driver_that_adds_meanwhile_waits_its_turn(library: None, tmp_path: Path) -> None:
    """No call serves more requests than the ring has entries, or more bytes than are meant to be served at once."""
    bench, device = make(disk(tmp_path), size=4, event_index=False)
    ring: Any = bench.virtio.rings[0]
    bench.memory.write(BUFFERS, head(0))
    driver = bench.driver()
    for at, row in enumerate(((BUFFERS, 16, NEXT, 1), (BUFFERS + 4096, 4096, WRITE | NEXT, 2), (BUFFERS, 1, WRITE, 0))):
        struct.pack_into("<QIHH", driver._table, 16 * at, *row)
    taken: list[int] = []
    lane = device._lanes[0]
    assert lane is not None
    for _ in range(100):
        driver._driver16[1] = ring.position + 4 & 0xFFFF
        assert device._bulk(ring) in (MORE, EMPTY)
        taken.append(lane.lane.served)
    assert set(taken) == {4}
    bench.close()


# any ring at all


sizes = st.one_of(st.sampled_from([0, 1, 15, 16, 17, 512, 1024, 4096, 8192, 0xFFFFFFFF]), st.integers(0, 9000))
places = st.one_of(
    st.integers(BUFFERS, BUFFERS + 0x2000),
    st.sampled_from([BUFFERS, TABLE, 0, 0x1000, RAM - 4096, RAM - 1, RAM, (1 << 64) - 16, 1 << 63]),
)
flags = st.one_of(st.sampled_from([0, NEXT, WRITE, NEXT | WRITE, INDIRECT]), st.integers(0, 15))
rows = st.tuples(places, sizes, flags, st.integers(0, 17))
good = st.builds(
    lambda out, sector, size, status: (out, sector, size, status),
    st.booleans(),
    st.integers(0, 130),
    st.sampled_from([512, 4096, 8192, 1000]),
    st.sampled_from([1, 1, 1, 2]),
)


def lay(bench: Any, requests: list[Any], indirect: bool, loose: dict[int, Any], header: bytes) -> None:
    """Requests of the usual form, in a table of their own each or not; then *loose* descriptors over them."""
    driver, at = bench.driver(), 0
    bench.memory.write(BUFFERS, (CONTENT * 2)[: RAM - BUFFERS])
    for number, (out, sector, size, status) in enumerate(requests):
        place = BUFFERS + 0x400 * number
        bench.memory.write(place, head(out, sector))
        parts = [(place, 16, 0), (place + 64, size // 2, 0 if out else WRITE)]
        parts += [(place + 64 + size // 2, size - size // 2, 0 if out else WRITE), (place + 32, status, WRITE)]
        base = TABLE + 64 * number if indirect else 16 * at
        first = 0 if indirect else at
        table = b"".join(
            struct.pack("<QIHH", *part[:2], part[2] | (NEXT if index < 3 else 0), first + index + 1)
            for index, part in enumerate(parts)
        )
        if indirect:
            bench.memory.write(base, table)
            struct.pack_into("<QIHH", driver._table, 16 * number, base, 64, INDIRECT, 0)
            driver._driver16[2 + number] = number
        else:
            driver._table[base : base + 64] = table
            driver._driver16[2 + number] = at
            at += 4
    for index, row in loose.items():
        if index < 16:
            struct.pack_into("<QIHH", driver._table, 16 * index, *row)
        else:
            bench.memory.write(TABLE + 16 * (index - 16), struct.pack("<QIHH", *row))
    if header:
        bench.memory.write(BUFFERS, header)
    driver._driver16[1] = len(requests)


def serve(bench: Any, device: Any, natively: bool) -> bool:
    """Serve what is in the ring, here and now; tell if it was broken."""
    ring: Any = bench.virtio.rings[0]
    try:
        while True:
            if natively and device._bulk(ring) == EMPTY:
                return False
            request = ring.pop()
            if request is None:
                if not ring.rearm():
                    return False
                continue
            ring.push_many([(request, device._process(request))])
    except (RingError, GuestMemoryError):
        return True


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
@given(
    requests=st.lists(good, min_size=1, max_size=4),
    indirect=st.booleans(),
    loose=st.dictionaries(st.integers(0, 32), rows, max_size=3),
    header=st.one_of(st.just(b""), st.binary(min_size=16, max_size=16)),
    jump=st.one_of(st.just(0), st.integers(0, 40)),
    event_index=st.booleans(),
)
@example([(False, 0, 4096, 1)], True, {}, b"", 0, True)
@example([(True, 8, 4096, 1)], False, {}, b"", 0, False)
def test_any_ring_gives_what_python_gives(
    library: None,
    tmp_path: Path,
    requests: Any,
    indirect: bool,
    loose: Any,
    header: bytes,
    jump: int,
    event_index: bool,
) -> None:
    """Guest memory, disk, what is reported as written, counts, and whether the driver broke a rule are the same by
    either way, whatever the ring holds."""
    seen = []
    for natively in (False, True):
        image = disk(tmp_path)
        calm(image)
        bench, device = make(image, memory=RAM, size=16, event_index=event_index)
        written: set[int] = set()
        lay(bench, requests, indirect, loose, header)
        if jump:
            bench.driver()._driver16[1] = jump

        def told(ranges: Any, written: set[int] = written) -> None:
            for address, size in ranges:
                written.update(range(address, address + size))

        bench.memory.on_written_many, bench.memory.on_written = told, None
        broken = serve(bench, device, natively)
        ring: Any = bench.virtio.rings[0]
        after = bench.memory.read(0, RAM), (tmp_path / "disk").read_bytes(), ring.save()
        seen.append((broken, *after, written, device.counts))
        bench.memory.on_written_many = None
        bench.close()
    assert seen[0] == seen[1]


def test_a_driver_that_scribbles_meanwhile(library: None, tmp_path: Path) -> None:
    """Another processor changes descriptors, tables and indices while requests are served: the process lives, and the
    disk works again after a reset."""
    bench, device = make(disk(tmp_path), memory=RAM, size=16)
    over = threading.Event()

    def scribble() -> None:
        state, view = 1, bench.memory.view(0x1000, 0x8800)
        while not over.is_set():
            for _ in range(100):
                state = state * 6364136223846793005 + 1442695040888963407 & (1 << 64) - 1
                view[(state >> 33) % len(view)] = state >> 20 & 0xFF

    thread = threading.Thread(target=scribble)
    thread.start()
    try:
        for turn in range(400):
            lay(bench, [(False, 8, 4096, 1), (True, 16, 4096, 1)] * 2, bool(turn & 1), {}, b"")
            serve(bench, device, natively=True)
            bench.virtio.rings[0].position = 0
    finally:
        over.set()
        thread.join()
    bench.start()
    assert bench.call([head(0)], [4096, 1])[-1] == 0
    bench.close()


# qcow2


def test_a_qcow2_disk_is_served_natively(library: Any, tmp_path: Path) -> None:
    """Reads and overwrites of clusters that it has, in whatever order they lie, go past Python; those of others do not,
    and are right as well."""
    (tmp_path / "below").write_bytes(CONTENT)
    create_qcow2(str(tmp_path / "disk.qcow2"), DISK, Qcow2Shape(4096, backing_file="below", backing_format="raw"))
    image: Any = open_image(Drive(str(tmp_path / "disk.qcow2")), warn=print)
    calm(image)
    bench, _ = make(image)
    expected = bytearray(CONTENT)
    for at in (3, 1, 2, 9, 8):
        assert bench.call([head(1, 8 * at), bytes([at]) * 4096], [1]) == b"\0"
        expected[4096 * at : 4096 * at + 4096] = bytes([at]) * 4096
    ring = bench.virtio.rings[0]
    pop, ring.pop = ring.pop, refuse
    for at in (1, 2, 3, 8, 9):
        tokens = (
            bench.driver().add([head(1, 8 * at), b"%d" % at * 4096], [1]),
            bench.driver().add([head(0, 8 * at)], [4096, 1]),
        )
        bench.kick()
        found = dict(bench.driver().used())
        expected[4096 * at : 4096 * at + 4096] = b"%d" % at * 4096
        assert found == {tokens[0]: b"\0", tokens[1]: b"%d" % at * 4096 + b"\0"}
    ring.pop = pop
    assert not image._inflight
    for at in range(16):
        assert bench.call([head(0, 8 * at)], [4096, 1]) == expected[4096 * at : 4096 * at + 4096] + b"\0"
    assert bench.call([head(0)], [DISK, 1]) == expected + b"\0"
    assert bench.call([head(11), struct.pack("<QII", 8, 8, 0)], [1]) == b"\0"
    assert bench.call([head(0, 8)], [4096, 1]) == bytes(4097)
    bench.close()
    image.close()
    file = HostFile(str(tmp_path / "disk.qcow2"), writable=False)
    report = check(file, Header.parse(partial(read_bytes, file), "disk.qcow2"))
    assert not report.corruptions
    assert not report.leaks
    file.close()


def test_an_image_that_is_read_only_has_no_place_to_write(tmp_path: Path) -> None:
    """Nor has a cluster that is not its own, compressed, or zeros."""
    create_qcow2(str(tmp_path / "disk.qcow2"), DISK)
    image: Any = open_image(Drive(str(tmp_path / "disk.qcow2")), warn=print)
    image.writev(0, [memoryview(b"x" * 65536)])
    with image.places([(0, 4096, False), (4096, 4096, True), (0, DISK, False)]) as found:
        assert None not in found
        assert image._inflight
    image.write_zeroes(0, 65536, unmap=False)
    with image.places([(0, 4096, False), (0, 4096, True)]) as found:
        assert found == [None, None]
    image.close()
    image = open_image(Drive(str(tmp_path / "disk.qcow2"), readonly=True), warn=print)
    assert image.plain()[2] == -1
    with image.places([(0, 4096, True)]) as found:
        assert found == [None]
    image.close()


# the library


def test_without_the_library_python_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line of the log says why, and what to do."""
    monkeypatch.setattr(lanes, "_load", lambda: (None, "it is not there; to build it: ..."))
    bench, _ = make(disk(tmp_path))
    assert bench.call([head(0)], [4096, 1]) == CONTENT[:4096] + b"\0"
    assert [entry[1:] for entry in bench.slot.log.entries] == [
        ("requests are served by Python alone", {"why": "it is not there; to build it: ..."})
    ]
    bench.close()


def test_a_library_of_other_sources_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one that is missing; the reason names the command that builds it."""
    load = LOAD.__wrapped__
    monkeypatch.setattr(lanes, "digest", lambda: "0" * 64)
    function, why = load()
    assert function is None
    assert "was built from other sources; to build it: python -m cardcage_virtio.native.build" in why
    monkeypatch.setattr(lanes, "__file__", str(tmp_path / "queue" / "lane.py"))
    function, why = load()
    assert function is None
    assert "No such file or directory; to build it" in why


def test_it_builds_without_a_warning_and_the_same_twice(tmp_path: Path) -> None:
    """A compiler that fails leaves what was there."""
    for name in ("one", "two"):
        build.build(tmp_path / name, more=("-Werror",))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with pytest.raises(build.BuildError, match="C compiler false: ended with status 1"):
        build.build(tmp_path / "one", "false")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
