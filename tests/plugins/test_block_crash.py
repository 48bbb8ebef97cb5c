"""Power cuts and kills: no flushed write is lost, and no image is left corrupt."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from block_model import DiskModel, VolatileFile
from cardcage_block.check import check, repair_counts
from cardcage_block.drive import Drive, open_image
from cardcage_block.header import INCOMPAT_DIRTY, Header
from cardcage_block.make import Qcow2Shape, create_qcow2
from cardcage_block.qcow2 import Qcow2Image
from cardcage_block.tables import read_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SIZE = 1 << 20
SHAPES = (
    Qcow2Shape(cluster_size=512),
    Qcow2Shape(cluster_size=4096),
    Qcow2Shape(cluster_size=65536),
    Qcow2Shape(cluster_size=1024, lazy_refcounts=True),
    Qcow2Shape(cluster_size=2048, version=2),
    Qcow2Shape(cluster_size=512, refcount_bits=64),
)

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, SIZE // 512 - 1), st.integers(1, 300)),
        st.tuples(st.just("zero"), st.integers(0, SIZE // 512 - 1), st.integers(1, 300)),
        st.tuples(st.just("unmap"), st.integers(0, SIZE // 512 - 1), st.integers(1, 300)),
        st.tuples(st.just("discard"), st.integers(0, SIZE // 512 - 1), st.integers(1, 300)),
        st.tuples(st.just("flush"), st.just(0), st.just(0)),
        st.tuples(st.just("crash"), st.integers(0, 1 << 30), st.just(0)),
    ),
    min_size=4,
    max_size=60,
)


def fail(text: str) -> None:
    raise AssertionError(text)


def parse(file: VolatileFile) -> Header:
    return Header.parse(lambda at, size: read_bytes(file, at, size), file.path)


def opened(file: VolatileFile, backing: Any = None) -> Qcow2Image:
    header = parse(file)
    if header.incompatible & INCOMPAT_DIRTY:
        repair_counts(file, header)
    return Qcow2Image(file, header, backing=backing, warn=fail)


def content(image: Qcow2Image) -> bytes:
    data = bytearray(image.info.size)
    image.readv(0, [memoryview(data)])
    return bytes(data)


def sound(file: VolatileFile, *, leaks: bool) -> None:
    header = parse(file)
    if header.incompatible & INCOMPAT_DIRTY:
        return  # its counts may be wrong until it is opened for writing
    report = check(file, header)
    assert not report.corruptions, report.problems
    assert leaks or not report.leaks, report.problems


class Below:
    """A backing image of a pattern, smaller than the disk."""

    def __init__(self) -> None:
        from cardcage.backends import BlockInfo

        self.info = BlockInfo(SIZE // 2 + 512, readonly=True)
        self.bytes = random.Random(7).randbytes(self.info.size)

    def readv(self, offset: int, buffers: list[memoryview], /) -> None:
        for buffer in buffers:
            buffer[:] = self.bytes[offset : offset + len(buffer)]
            offset += len(buffer)

    def data(self, offset: int, end: int, /) -> tuple[bool, int]:
        return True, end

    def close(self) -> None:
        pass


def blank(folder: Path, shape: Qcow2Shape) -> bytes:
    path = folder / "blank.qcow2"
    create_qcow2(str(path), SIZE, shape, force=True)
    return path.read_bytes()


def apply(image: Qcow2Image, model: DiskModel, act: str, first: int, count: int, choose: random.Random) -> None:
    offset = first * 512
    length = min(count * 512, SIZE - offset)
    if act == "write":
        data = choose.randbytes(length)
        image.writev(offset, [memoryview(data)])
        model.write(offset, data)
    elif act in ("zero", "unmap"):
        image.write_zeroes(offset, length, unmap=act == "unmap")
        model.write(offset, bytes(length))
    elif act == "discard":
        before = bytes(model.now)
        image.discard(offset, length)
        after = content(image)
        assert after[:offset] == before[:offset]
        assert after[offset + length :] == before[offset + length :]
        for at in range(offset, offset + length, 512):
            sector = after[at : at + 512]
            if sector != before[at : at + 512]:
                assert sector == bytes(512)
                model.write(at, sector)
    elif act == "flush":
        image.flush()
        model.flush()


@pytest.mark.parametrize("backed", [False, True], ids=["alone", "backed"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda one: f"{one.cluster_size}v{one.version}r{one.refcount_bits}")
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=OPERATIONS, seed=st.integers(0, 1 << 32))
@pytest.mark.once
def test_power_cut(
    tmp_path: Path, shape: Qcow2Shape, backed: bool, operations: list[tuple[str, int, int]], seed: int
) -> None:
    """After a power cut at any moment flushed writes are there, others whole sectors or not, and nothing is corrupt."""
    choose = random.Random(seed)
    below = Below() if backed else None
    file = VolatileFile(blank(tmp_path, shape))
    image = opened(file, below)
    model = DiskModel(content(image))
    for act, first, count in [*operations, ("crash", seed, 0)]:
        if act != "crash":
            apply(image, model, act, first, count, choose)
            continue
        file = VolatileFile(file.power_cut(random.Random(first)))
        sound(file, leaks=True)
        image = opened(file, below)
        model.settle(content(image))
        file.sync()
        model.flush()
    assert content(image) == bytes(model.now)
    image.close()
    sound(file, leaks=True)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda one: f"{one.cluster_size}v{one.version}r{one.refcount_bits}")
@pytest.mark.once
def test_cut_between_any_two_writes(tmp_path: Path, shape: Qcow2Shape) -> None:
    """Stopping after each single write of the host, in order or not, leaves an image without corruption."""
    choose = random.Random(shape.cluster_size)
    file = VolatileFile(blank(tmp_path, shape))
    image = opened(file)
    states: list[bytes] = []
    real_write, real_sync = file.write, file.sync

    def write(offset: int, buffers: Any, length: int) -> None:
        real_write(offset, buffers, length)
        if choose.random() < 0.2:
            states.extend([file.power_cut(choose), bytes(file.now)])

    def sync() -> None:
        states.append(file.power_cut(choose))
        real_sync()

    file.write, file.sync = write, sync  # type: ignore[method-assign]  # the power fails in them
    model = DiskModel(bytes(SIZE))
    for number in range(60):
        act = choose.choice(("write", "write", "write", "discard", "unmap", "flush"))
        apply(image, model, act, choose.randrange(SIZE // 512), choose.randint(1, 200), choose)
        if number % 20 == 19:
            image.flush()
    image.close()
    assert len(states) > 20
    for state in choose.sample(states, min(len(states), 60)):
        left = VolatileFile(state)
        sound(left, leaks=True)
        opened(left).close()
        sound(left, leaks=True)


def test_clean_close_leaves_nothing(tmp_path: Path) -> None:
    """An image that was closed has neither leaks nor the dirty bit."""
    for shape in SHAPES:
        file = VolatileFile(blank(tmp_path, shape))
        image, model, choose = opened(file), DiskModel(bytes(SIZE)), random.Random(5)
        for _ in range(80):
            act = choose.choice(("write", "write", "discard", "unmap", "zero", "flush"))
            apply(image, model, act, choose.randrange(SIZE // 512), choose.randint(1, 200), choose)
        image.close()
        assert not parse(file).incompatible
        assert file.now == file.stable
        sound(file, leaks=False)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.once
def test_full_disk(tmp_path: Path, shape: Qcow2Shape) -> None:
    """A host without room fails what needs it, however often it is tried, and once there is room nothing is lost, not
    even a cluster."""
    file = VolatileFile(blank(tmp_path, shape))
    image, model, choose = opened(file), DiskModel(bytes(SIZE)), random.Random(3)
    file.room = len(file.now) + 100
    failures = 0

    def insist(act: Callable[[], None]) -> None:
        nonlocal failures
        assert file.room is not None
        for _ in range(2000):
            try:
                return act()
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                failures += 1
                file.room += 512 * choose.randint(0, 3)
        raise AssertionError("never done")

    for _ in range(60):
        data, offset = choose.randbytes(8192), choose.randrange(SIZE // 4096 - 2) * 4096 + 512
        insist(partial(image.writev, offset, [memoryview(data)]))
        model.write(offset, data)
        if choose.random() < 0.3:
            insist(image.flush)
    assert failures
    assert content(image) == bytes(model.now)
    file.room = None
    image.close()
    sound(file, leaks=False)


def test_the_dirty_bit_is_there_before_anything_changes(tmp_path: Path) -> None:
    """With lazy refcounts, a host that cannot write the dirty bit fails the write, and the next one tries it again."""
    file = VolatileFile(blank(tmp_path, SHAPES[3]))
    image = opened(file)
    file.room = 0
    with pytest.raises(OSError, match="No space"):
        image.writev(0, [memoryview(b"x" * 512)])
    file.room = None
    image.writev(0, [memoryview(b"x" * 512)])
    left = VolatileFile(bytes(file.stable))
    assert parse(left).incompatible & INCOMPAT_DIRTY
    image.close()


def test_failed_sync_is_final(tmp_path: Path) -> None:
    """After the host failed to make data stable no later flush says that it is."""
    file = VolatileFile(blank(tmp_path, SHAPES[1]))
    said: list[str] = []
    image = Qcow2Image(file, parse(file), warn=said.append)
    image.writev(0, [memoryview(b"x" * 4096)])
    file.fail_sync = OSError(5, "Input/output error")
    with pytest.raises(OSError, match="Input/output"):
        image.flush()
    file.fail_sync = None
    with pytest.raises(OSError, match="stable"):
        image.flush()
    with pytest.raises(OSError, match="stable"):
        image.writev(8192, [memoryview(b"x" * 4096)])
    image.close()


WRITER = textwrap.dedent("""
    import random, sys
    from cardcage_block.drive import Drive, open_image
    image = open_image(Drive(sys.argv[1], format="qcow2"), warn=lambda text: None)
    choose = random.Random(int(sys.argv[2]))
    number = 0
    while True:
        for _ in range(choose.randint(1, 20)):
            sector = choose.randrange(image.info.size // 4096)
            number += 1
            image.writev(sector * 4096, [memoryview(number.to_bytes(8, "big") * 512)])
            print("w", sector, number, flush=True)
        image.flush()
        print("f", flush=True)
""")


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.once
def test_killed_writer(tmp_path: Path, lazy: bool) -> None:
    """SIGKILL at random moments loses no flushed write, and qemu-img finds no corruption."""
    path = str(tmp_path / "disk.qcow2")
    create_qcow2(path, 8 << 20, Qcow2Shape(cluster_size=8192, lazy_refcounts=lazy))
    choose = random.Random(11 + lazy)
    durable: dict[int, int] = {}
    for round in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, path, str(round)], stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert process.stdout is not None
        loose: dict[int, set[int]] = {}
        flushed: dict[int, int] = {}
        last: dict[int, int] = {}
        deadline = choose.randint(20, 700)
        newest = 0
        for at, line in enumerate(process.stdout):  # to the end, for what it did before it died
            if at == deadline:
                process.send_signal(signal.SIGKILL)
            kind, *rest = line.split()
            if kind == "w" and len(rest) == 2:
                sector, newest = map(int, rest)
                loose.setdefault(sector, set()).add(newest)
                last[sector] = newest
            elif kind == "f":
                flushed.update(last)
                loose = {}
        process.wait()
        process.stdout.close()
        durable.update(flushed)
        image = open_image(Drive(path, format="qcow2"), warn=lambda text: None)
        data = bytearray(4096)
        for sector, number in durable.items():
            image.readv(sector * 4096, [memoryview(data)])
            found = int.from_bytes(data[:8], "big")
            # The last write may have been cut down before it was told of.
            assert found in {number, newest + 1, *loose.get(sector, ())}, (sector, number, found)
            durable[sector] = found
        image.close()
        if shutil.which("qemu-img"):
            answer = subprocess.run(["qemu-img", "check", path], capture_output=True, text=True)
            assert answer.returncode in (0, 3), answer.stdout + answer.stderr
    assert os.path.getsize(path) < 32 << 20
