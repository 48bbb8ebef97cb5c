"""Images made to harm: met with one clear error, no crash, no endless loop and no write outside the guest's data."""

from __future__ import annotations

import random
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from block_model import VolatileFile
from cardcage.errors import CardcageError, ConfigError
from cardcage_block.chain import find_below
from cardcage_block.check import check
from cardcage_block.drive import Drive, open_image
from cardcage_block.header import Header
from cardcage_block.make import Qcow2Shape, create_qcow2
from cardcage_block.qcow2 import Qcow2Image
from cardcage_block.tables import read_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 1 << 20


def image_bytes(folder: Path, shape: Qcow2Shape) -> bytes:
    path = folder / "seed.qcow2"
    create_qcow2(str(path), SIZE, shape, force=True)
    image = open_image(Drive(str(path)), warn=print)
    for at in range(0, SIZE, SIZE // 16):
        image.writev(at, [memoryview(random.Random(at).randbytes(3072))])
    image.close()
    return path.read_bytes()


def use(data: bytes) -> None:
    """What a guest and the tools do with an image; CardcageError and OSError are the only ways to fail."""
    file = VolatileFile(data)
    try:
        header = Header.parse(lambda at, size: read_bytes(file, at, size), file.path)
        if header.size > 1 << 40:
            return
        check(VolatileFile(data), Header.parse(lambda at, size: read_bytes(file, at, size), file.path), fix="all")
    except (CardcageError, OSError):
        pass
    said: list[str] = []
    try:
        image = Qcow2Image(file, Header.parse(lambda at, size: read_bytes(file, at, size), file.path), warn=said.append)
    except (CardcageError, OSError):
        return
    room = memoryview(bytearray(65536))
    for number in range(16):
        at = number * (SIZE // 16)
        if at + 65536 > image.info.size:
            break
        for act in (
            lambda at=at: image.readv(at, [room]),
            lambda at=at: image.writev(at, [room[:4096]]),
            lambda at=at: image.write_zeroes(at + 8192, 16384, unmap=True),
            lambda at=at: image.discard(at, 65536),
            image.flush,
        ):
            with suppress(OSError):
                act()
    image.close()


@pytest.mark.once
@pytest.mark.parametrize("shape", [Qcow2Shape(512), Qcow2Shape(4096), Qcow2Shape(65536, version=2)], ids=str)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(
        st.tuples(
            st.one_of(st.integers(0, 111), st.integers(0, 1 << 18)),
            st.sampled_from([1, 2, 4, 8]),
            st.one_of(st.integers(0, (1 << 64) - 1), st.sampled_from([0, 1, 0xFF, 1 << 32, (1 << 63) | 512, 1 << 62])),
        ),
        min_size=1,
        max_size=6,
    ),
    cut=st.one_of(st.none(), st.integers(0, 1 << 18)),
)
def test_damaged_anywhere(
    tmp_path: Path, shape: Qcow2Shape, changes: list[tuple[int, int, int]], cut: int | None
) -> None:
    """An image with arbitrary bytes in its header or tables, or cut short, only ever raises this project's errors."""
    data = bytearray(image_bytes(tmp_path, shape))
    for where, width, value in changes:
        where = min(where, len(data) - 8)
        data[where : where + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, "big")
    use(bytes(data[:cut]))


FIELDS = {
    "version": (4, ">I", 4, "only 2 and 3"),
    "cluster bits": (20, ">I", 40, "cluster size"),
    "huge size": (24, ">Q", 1 << 62, "L1 table"),
    "encrypted": (32, ">I", 1, r"encryption \(AES\): not supported"),
    "huge l1": (36, ">I", 0xFFFFFFFF, "larger than 32 MiB"),
    "l1 unaligned": (40, ">Q", 12345, "cluster's start"),
    "l1 far": (40, ">Q", 1 << 50, "past the end"),
    "refcount table far": (48, ">Q", 1 << 50, "past the end"),
    "refcount table none": (56, ">I", 0, "refcount table"),
    "refcount table huge": (56, ">I", 1 << 20, "refcount table"),
    "snapshots": (60, ">I", 1 << 20, "snapshots"),
    "incompatible": (72, ">Q", 1 << 40, r"unknown feature \(bit 40\)"),
    "data file": (72, ">Q", 4, "external data file"),
    "extended l2": (72, ">Q", 16, "extended L2"),
    "corrupt": (72, ">Q", 2, "marked as corrupt"),
    "refcount order": (96, ">I", 7, "refcount width"),
    "header length": (100, ">I", 1 << 30, "header length"),
    "compression": (104, ">B", 3, "compression type"),
    "backing far": (8, ">Q", 1 << 40, "outside the header"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_header_field(tmp_path: Path, name: str) -> None:
    """A header field out of its range is refused with one line that names the file and the field."""
    where, layout, value, words = FIELDS[name]
    path = tmp_path / "a.qcow2"
    create_qcow2(str(path), SIZE)
    data = bytearray(path.read_bytes())
    struct.pack_into(layout, data, where, value)
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=words) as caught:
        open_image(Drive(str(path)), warn=print)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def corrupted(folder: Path, entry: int) -> tuple[VolatileFile, Any, list[str]]:
    """An image whose first L2 entry is *entry*."""
    path = folder / "a.qcow2"
    create_qcow2(str(path), SIZE, Qcow2Shape(4096))
    image = open_image(Drive(str(path)), warn=print)
    image.writev(0, [memoryview(b"x" * 8192)])
    image.close()
    data = bytearray(path.read_bytes())
    l1 = struct.unpack_from(">Q", data, 40)[0]
    l2 = struct.unpack_from(">Q", data, l1)[0] & ((1 << 56) - 1)
    struct.pack_into(">Q", data, l2, entry)
    file, said = VolatileFile(bytes(data)), []
    return file, Qcow2Image(file, Header.parse(lambda a, n: read_bytes(file, a, n), "a"), warn=said.append), said


@pytest.mark.parametrize("where", ["header", "L1", "far"])
def test_guest_cannot_write_metadata(tmp_path: Path, where: str) -> None:
    """An entry that names a table or a place past the end does not let the guest write there; the image is marked."""
    plain = corrupted(tmp_path, 0)[0]
    place = {"header": 0, "L1": struct.unpack_from(">Q", plain.now, 40)[0], "far": 1 << 40}[where]
    (tmp_path / "a.qcow2").unlink()
    file, image, said = corrupted(tmp_path, 1 << 63 | place)
    before = bytes(file.now)
    if where != "header":  # a copied entry without an offset is an unallocated cluster
        with pytest.raises(OSError, match="corrupt"):
            image.writev(0, [memoryview(b"y" * 512)])
        assert file.now[79] & 2
        assert file.now[80:] == before[80:]
        assert len(said) == 1
        with pytest.raises(OSError, match="corrupt"):
            image.writev(8192, [memoryview(b"y" * 512)])
    image.close()


def test_backing_loop(tmp_path: Path) -> None:
    """A chain that comes back to itself, through a symbolic link as well, is named as a loop."""
    for name, below in (("a", "b"), ("b", "link")):
        shape = Qcow2Shape(backing_file=below, backing_format="qcow2")
        create_qcow2(str(tmp_path / name), SIZE, shape)
    (tmp_path / "link").symlink_to("a")
    with pytest.raises(ConfigError, match="loops"):
        open_image(Drive(str(tmp_path / "a"), readonly=True), warn=print)


@pytest.mark.once
def test_backing_chain_too_long(tmp_path: Path) -> None:
    """A chain of more than a thousand images is refused instead of using up descriptors."""
    for number in range(1030):
        shape = Qcow2Shape(512, backing_file=f"{number + 1}", backing_format="qcow2")
        create_qcow2(str(tmp_path / str(number)), 512, shape)
    with pytest.raises(ConfigError, match="longer than"):
        open_image(Drive(str(tmp_path / "0"), readonly=True), warn=print)


@pytest.mark.parametrize("name", ["nbd://10.0.0.1/x", "json:{}", "ssh:a", "http://a/b"])
def test_backing_is_a_file(name: str) -> None:
    """A backing file that is no file is refused, so that an image cannot make the host reach out."""
    with pytest.raises(ConfigError, match="only files"):
        find_below("/tmp/a.qcow2", name)


def test_backing_missing(tmp_path: Path) -> None:
    """A missing backing file is named together with the image that wants it."""
    create_qcow2(str(tmp_path / "a"), SIZE, Qcow2Shape(backing_file="gone", backing_format="raw"))
    with pytest.raises(ConfigError, match=r"its backing file: .*gone"):
        open_image(Drive(str(tmp_path / "a")), warn=print)


@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "nothing"])
def test_not_a_disk(tmp_path: Path, kind: str) -> None:
    """What is neither a file nor a block device is refused at once."""
    import os

    path = tmp_path / "it"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path = path.parent / "null"
        path.symlink_to("/dev/null")
    with pytest.raises(ConfigError):
        open_image(Drive(str(path), readonly=True), warn=print)


def test_guessed_raw_stays_raw(tmp_path: Path) -> None:
    """A guest whose disk was guessed to be raw cannot turn it into a qcow2 image that names the host's files."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    said: list[str] = []
    image = open_image(Drive(str(path)), warn=said.append)
    assert "format=raw" in said[0]
    with pytest.raises(OSError, match="format=raw"):
        image.writev(0, [memoryview(b"QF"), memoryview(b"I\xfb" + bytes(508))])
    image.writev(0, [memoryview(b"MBR" + bytes(509))])
    image.writev(512, [memoryview(b"QFI\xfb" + bytes(508))])
    image.close()
    image = open_image(Drive(str(path), format="raw"), warn=said.append)
    image.writev(0, [memoryview(b"QFI\xfb" + bytes(508))])
    image.close()
    assert len(said) == 1


def test_damaged_compressed_cluster(tmp_path: Path) -> None:
    """A compressed cluster that does not unpack to a cluster is an I/O error, whatever it claims to hold."""
    _, image, _ = corrupted(tmp_path, 1 << 62 | 3 << 58 | 12345)
    with pytest.raises(OSError, match="compressed"):
        image.readv(0, [memoryview(bytearray(512))])
    image.readv(4096, [memoryview(bytearray(512))])
    image.close()
