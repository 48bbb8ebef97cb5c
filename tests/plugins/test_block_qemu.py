"""Images against QEMU's own tools: what one writes the other reads, checks and respects."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import threading
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from cardcage.errors import ConfigError, HostError
from cardcage_block.drive import Drive, open_image
from cardcage_block.make import Qcow2Shape, create_qcow2, create_raw, resize

if TYPE_CHECKING:
    from pathlib import Path

    from cardcage_block.hostfile import Image

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-utils is not installed")

SIZE = 8 << 20


def qemu(*words: object, status: int = 0) -> str:
    answer = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert answer.returncode == status, answer.stdout + answer.stderr
    return answer.stdout + answer.stderr


def sound(path: object) -> None:
    report = json.loads(qemu("qemu-img", "check", "--output=json", path))
    assert not report.get("leaks")
    assert not report.get("corruptions")
    assert not report["check-errors"]


def opened(path: object, **options: Any) -> Image:
    return open_image(Drive(str(path), **options), warn=lambda text: None)


def read(image: Image, offset: int = 0, length: int | None = None) -> bytes:
    data = bytearray(image.info.size - offset if length is None else length)
    image.readv(offset, [memoryview(data)])
    return bytes(data)


def scribble(image: Image, now: bytearray, choose: random.Random, times: int) -> None:
    """Random acts of a guest on *image*, of which *now* keeps the outcome."""
    size = len(now)
    for _ in range(times):
        act = choose.random()
        offset = choose.randrange(size // 512) * 512
        length = min(choose.choice((512, 4096, 65536)) * choose.randint(1, 6), size - offset)
        if act < 0.6:
            data = choose.randbytes(length)
            cuts = sorted({0, length, *(choose.randrange(length // 512) * 512 for _ in range(choose.randint(0, 3)))})
            image.writev(offset, [memoryview(data[a:b]) for a, b in pairwise(cuts)])
            now[offset : offset + length] = data
        elif act < 0.75:
            image.write_zeroes(offset, length, unmap=choose.random() < 0.5)
            now[offset : offset + length] = bytes(length)
        elif act < 0.9:
            assert read(image, offset, length) == now[offset : offset + length]
        elif act < 0.95:
            image.discard(offset, length)
            found = read(image)
            for at in range(offset, offset + length, 512):
                if found[at : at + 512] != now[at : at + 512]:
                    assert found[at : at + 512] == bytes(512)
                    now[at : at + 512] = bytes(512)
            assert found == now
        else:
            image.flush()


@pytest.mark.parametrize("cluster", [512, 4096, 65536, 2 << 20])
@pytest.mark.parametrize(
    "options", ["compat=0.10", "compat=1.1", "lazy_refcounts=on", "refcount_bits=1", "refcount_bits=64"]
)
def test_random_use_of_qemus_image(tmp_path: Path, cluster: int, options: str) -> None:
    """After random use of an image that qemu-img made, qemu-img finds it sound and the same as the model."""
    path, choose = tmp_path / "a.qcow2", random.Random(f"{cluster}{options}")
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster},{options}", path, SIZE)
    now = bytearray(SIZE)
    for _ in range(3):
        image = opened(path)
        assert read(image) == now
        scribble(image, now, choose, 40)
        image.close()
        sound(path)
    (tmp_path / "model").write_bytes(now)
    qemu("qemu-img", "compare", "-f", "qcow2", "-F", "raw", path, tmp_path / "model")


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("below", ["raw", "qcow2"])
def test_backing_chain(tmp_path: Path, version: int, below: str) -> None:
    """A chain of three, named by relative paths from another folder, reads and copies on write as QEMU reads it."""
    (tmp_path / "deep").mkdir()
    choose = random.Random(version)
    base, now = choose.randbytes(SIZE // 2), bytearray(SIZE)
    now[: len(base)] = base
    (tmp_path / "deep" / "base.raw").write_bytes(base)
    if below == "qcow2":
        qemu("qemu-img", "convert", "-O", "qcow2", tmp_path / "deep/base.raw", tmp_path / "deep/base.qcow2")
    shape = Qcow2Shape(4096, version, backing_file=f"base.{below}", backing_format=below)
    create_qcow2(str(tmp_path / "deep" / "middle.qcow2"), SIZE, shape)
    image = opened(tmp_path / "deep" / "middle.qcow2")
    scribble(image, now, choose, 30)
    image.close()
    shape = Qcow2Shape(65536, version, backing_file="deep/middle.qcow2", backing_format="qcow2")
    create_qcow2(str(tmp_path / "top.qcow2"), SIZE, shape)
    image = opened(tmp_path / "top.qcow2", backing=str(tmp_path / "deep"))
    assert read(image) == now
    before = (tmp_path / "deep" / "middle.qcow2").read_bytes()
    scribble(image, now, choose, 60)
    image.close()
    assert (tmp_path / "deep" / "middle.qcow2").read_bytes() == before
    sound(tmp_path / "top.qcow2")
    (tmp_path / "model").write_bytes(now)
    qemu("qemu-img", "compare", "-F", "raw", tmp_path / "top.qcow2", tmp_path / "model")


@pytest.mark.parametrize("method", ["zlib", "zstd"])
def test_compressed(tmp_path: Path, method: str) -> None:
    """Compressed clusters are read, and replaced on write without touching their neighbours."""
    choose = random.Random(1)
    now = bytearray(b"".join(choose.randbytes(64) * 64 for _ in range(SIZE // 4096)))
    (tmp_path / "plain").write_bytes(now)
    path = tmp_path / "packed.qcow2"
    qemu("qemu-img", "convert", "-c", "-O", "qcow2", "-o", f"compression_type={method}", tmp_path / "plain", path)
    image = opened(path)
    assert read(image) == now
    scribble(image, now, choose, 50)
    assert read(image) == now
    image.close()
    sound(path)
    (tmp_path / "plain").write_bytes(now)
    qemu("qemu-img", "compare", path, tmp_path / "plain")


def test_internal_snapshots_survive(tmp_path: Path) -> None:
    """Writing an image with internal snapshots leaves what the snapshots hold."""
    path, choose, now = tmp_path / "a.qcow2", random.Random(2), bytearray(SIZE)
    create_qcow2(str(path), SIZE, Qcow2Shape(8192))
    kept = []
    for name in ("one", "two"):
        image = opened(path)
        scribble(image, now, choose, 40)
        image.close()
        qemu("qemu-img", "snapshot", "-c", name, path)
        kept.append((name, bytes(now)))
    image = opened(path)
    scribble(image, now, choose, 80)
    assert read(image) == now
    image.close()
    sound(path)
    for name, content in kept:
        (tmp_path / "model").write_bytes(content)
        qemu("qemu-img", "convert", "-l", name, "-O", "raw", path, tmp_path / "shot")
        assert (tmp_path / "shot").read_bytes() == content
    qemu("qemu-img", "snapshot", "-d", "one", path)
    sound(path)
    image = opened(path)
    assert read(image) == now
    image.close()


def test_lock_against_qemu(tmp_path: Path) -> None:
    """An image that we write cannot be opened by qemu, and the other way round; readers go together."""
    path = tmp_path / "a.qcow2"
    create_qcow2(str(path), SIZE)
    image = opened(path)
    assert "lock" in qemu("qemu-io", "-c", "write 0 512", path, status=1)
    assert "lock" in qemu("qemu-io", "-r", "-c", "read 0 512", path, status=1)
    with pytest.raises(HostError, match="writing this image"):
        opened(path)
    with pytest.raises(HostError, match="writing this image"):
        opened(path, readonly=True)
    image.close()
    image = opened(path, readonly=True)
    second = opened(path, readonly=True)
    qemu("qemu-io", "-r", "-c", "read 0 512", path)
    assert "lock" in qemu("qemu-io", "-c", "write 0 512", path, status=1)
    with pytest.raises(HostError, match="in use"):
        opened(path)
    image.close()
    second.close()
    holder = subprocess.Popen(
        ["qemu-io", str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    holder.stdin.write("write 0 512\n")
    holder.stdin.flush()
    while "wrote" not in holder.stdout.readline():
        pass
    with pytest.raises(HostError, match="writing this image"):
        opened(path, readonly=True)
    holder.communicate("quit\n")
    opened(path).close()


def test_overlay_locks_its_base(tmp_path: Path) -> None:
    """A base image cannot be written while an overlay uses it, and two overlays share one base."""
    create_raw(str(tmp_path / "base"), SIZE)
    for name in ("a", "b"):
        create_qcow2(str(tmp_path / name), SIZE, Qcow2Shape(backing_file="base", backing_format="raw"))
    images = [opened(tmp_path / "a"), opened(tmp_path / "b")]
    with pytest.raises(HostError):
        opened(tmp_path / "base", format="raw")
    for image in images:
        image.close()
    image = opened(tmp_path / "base", format="raw")
    with pytest.raises(HostError):
        opened(tmp_path / "a")
    image.close()


def test_resize(tmp_path: Path) -> None:
    """Growing adds zeros, also where a larger backing file would show, and shrinking forgets what was behind."""
    (tmp_path / "base").write_bytes(b"b" * SIZE)
    path = tmp_path / "a.qcow2"
    create_qcow2(str(path), 1 << 20, Qcow2Shape(512, backing_file="base", backing_format="raw"))
    drive = Drive(str(path))
    resize(drive, SIZE * 5, warn=print)
    sound(path)
    image = opened(path)
    assert image.info.size == SIZE * 5
    data = read(image)
    assert data[: 1 << 20] == b"b" * (1 << 20)
    assert not data[1 << 20 :].strip(b"\0")
    image.writev(SIZE * 4, [memoryview(b"x" * 4096)])
    image.close()
    with pytest.raises(ConfigError, match="--shrink"):
        resize(drive, SIZE, warn=print)
    resize(drive, SIZE + 512, shrink=True, warn=print)
    resize(drive, SIZE * 5, warn=print)
    sound(path)
    image = opened(path)
    assert read(image) == data
    image.close()


@pytest.mark.once
def test_large_sparse_image(tmp_path: Path) -> None:
    """Writes far apart in a large disk, which need new refcount blocks and a larger refcount table, are sound."""
    path = tmp_path / "big.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512,refcount_bits=64", path, "20G")
    image = opened(path)
    blob = memoryview(random.Random(4).randbytes(1 << 20))
    places = [number * (1 << 30) + number * 512 for number in range(20)]
    for place in places:
        image.writev(place, [blob])
    image.close()
    sound(path)
    image = opened(path)
    for place in places:
        assert read(image, place, 1 << 20) == blob
    image.close()


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_many_threads(tmp_path: Path, cache: str) -> None:
    """Threads that write, discard, read and flush their own parts of one disk at once do not disturb each other."""
    path = tmp_path / "a.qcow2"
    create_qcow2(str(path), SIZE, Qcow2Shape(8192))
    image = opened(path, cache=cache)
    models, failures = [bytearray(SIZE // 4) for _ in range(4)], []

    def work(number: int) -> None:
        choose, now = random.Random(number), models[number]
        # Parts are interleaved by 4 KiB, so that threads meet inside clusters.
        try:
            for _ in range(300):
                page = choose.randrange(SIZE // 4 // 4096)
                where = (page * 4 + number) * 4096
                act = choose.random()
                if act < 0.7:
                    data = choose.randbytes(4096)
                    image.writev(where, [memoryview(data)])
                    now[page * 4096 : page * 4096 + 4096] = data
                elif act < 0.8:
                    image.write_zeroes(where, 4096, unmap=True)
                    now[page * 4096 : page * 4096 + 4096] = bytes(4096)
                elif act < 0.82:
                    image.flush()
                else:
                    assert read(image, where, 4096) == now[page * 4096 : page * 4096 + 4096]
        except BaseException as error:  # told to the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    content = read(image)
    for number, model in enumerate(models):
        for page in range(SIZE // 4 // 4096):
            where = (page * 4 + number) * 4096
            assert content[where : where + 4096] == model[page * 4096 : page * 4096 + 4096]
    image.close()
    sound(path)


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_direct_io(tmp_path: Path, format: str) -> None:
    """Direct I/O gives the same bytes whatever the alignment of the buffers in memory."""
    path, choose, now = tmp_path / "a", random.Random(6), bytearray(SIZE)
    if format == "raw":
        create_raw(str(path), SIZE)
    else:
        create_qcow2(str(path), SIZE, Qcow2Shape(4096))
    image = opened(path, format=format, cache="none")
    scribble(image, now, choose, 60)
    odd = memoryview(bytearray(8192 + 3))[3:]
    image.readv(512, [odd[:100], odd[100:8192]])
    assert odd == now[512 : 512 + 8192]
    image.writev(1024, [memoryview(b"y" * 512)[:5], memoryview(b"y" * 507)])
    now[1024:1536] = b"y" * 512
    image.flush()
    image.close()
    (tmp_path / "model").write_bytes(now)
    qemu("qemu-img", "compare", "-f", format, "-F", "raw", path, tmp_path / "model")


def test_more_buffers_than_the_kernel_takes(tmp_path: Path) -> None:
    """A request in thousands of pieces is carried out whole."""
    for cache in ("writeback", "none"):
        path = tmp_path / cache
        create_raw(str(path), SIZE)
        image = opened(path, format="raw", cache=cache)
        data = random.Random(8).randbytes(3000 * 512)
        image.writev(512, [memoryview(data)[at : at + 512] for at in range(0, len(data), 512)])
        found = bytearray(len(data))
        image.readv(512, [memoryview(found)[at : at + 512] for at in range(0, len(found), 512)])
        assert found == data
        image.close()
