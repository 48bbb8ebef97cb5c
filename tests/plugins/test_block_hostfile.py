"""Writes that must not wait, and transfers of many parts."""

from __future__ import annotations

import errno
import os
import subprocess
from typing import TYPE_CHECKING

import pytest
from cardcage.segments import Segments
from cardcage_block import hostfile
from cardcage_block.drive import Drive, open_image
from cardcage_block.hostfile import CALM, HostFile
from cardcage_block.make import Qcow2Shape, create_qcow2

if TYPE_CHECKING:
    from pathlib import Path

PAGE = 4096


def file(folder: Path, **options: bool) -> HostFile:
    path = folder / "disk"
    path.write_bytes(bytes(64 * PAGE))
    found = HostFile(str(path), writable=True, **options)
    found._nowait_writes = False  # as on a file system that cannot tell
    return found


def calm(disk: HostFile, times: int = CALM[0]) -> None:
    for _ in range(times):
        disk.write(0, [memoryview(bytes(PAGE))], PAGE)


def test_writes_are_tried_once_others_did_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system cannot tell, a write is tried only after many that did not wait, and after one that did
    only after more of them."""
    monkeypatch.setattr(hostfile, "WAITED", 3600)
    disk, page = file(tmp_path), [memoryview(b"x" * PAGE)]
    assert not disk.try_write(PAGE, page, PAGE)
    calm(disk)
    assert disk.try_write(PAGE, page, PAGE)
    assert disk.try_write(2 * PAGE, page, PAGE)
    monkeypatch.setattr(hostfile, "WAITED", -3600)
    assert disk.try_write(3 * PAGE, page, PAGE)
    monkeypatch.setattr(hostfile, "WAITED", 3600)
    calm(disk)
    assert not disk.try_write(PAGE, page, PAGE)
    calm(disk)
    assert disk.try_write(PAGE, page, PAGE)
    monkeypatch.setattr(hostfile, "WAITED", -3600)
    calm(disk, 1)  # on a worker's thread: that waited too
    monkeypatch.setattr(hostfile, "WAITED", 3600)
    assert not disk.try_write(PAGE, page, PAGE)
    disk.close()
    assert (tmp_path / "disk").read_bytes()[PAGE : 4 * PAGE] == b"x" * 3 * PAGE


def test_parts_of_pages_are_not_tried(tmp_path: Path) -> None:
    """What covers a page in part may have to read it first, and direct I/O waits for the device: neither is tried."""
    disk = file(tmp_path)
    disk._doubt = 0
    assert not disk.try_write(512, [memoryview(bytes(PAGE))], PAGE)
    assert not disk.try_write(0, [memoryview(bytes(512))], 512)
    disk.close()
    direct = file(tmp_path, direct=True)
    direct._doubt = 0
    assert not direct.try_write(0, [memoryview(bytes(PAGE))], PAGE)
    direct.close()


def test_a_file_system_that_can_tell_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With RWF_NOWAIT a write is tried from the first, and one that would wait is not done."""
    disk = file(tmp_path)
    disk._nowait_writes = True
    asked: list[int] = []

    def pwritev(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        asked.append(flags)
        if len(asked) == 2:
            raise BlockingIOError(errno.EAGAIN, "busy")
        return os.pwritev(fd, buffers, offset)

    monkeypatch.setattr(hostfile, "pwritev", pwritev)  # this host's file systems cannot
    assert disk.try_write(0, [memoryview(b"y" * PAGE)], PAGE)
    assert not disk.try_write(0, [memoryview(b"z" * PAGE)], PAGE)
    assert asked == [os.RWF_NOWAIT] * 2
    disk.close()
    assert (tmp_path / "disk").read_bytes()[:PAGE] == b"y" * PAGE


@pytest.mark.parametrize("count", [3, 1500])
@pytest.mark.parametrize("cache", ["writeback", "none"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_segments_are_transferred_as_views_are(tmp_path: Path, format: str, cache: str, count: int) -> None:
    """A transfer whose parts are segments reads and writes what a list of views does, also past the kernel's limit."""
    path, size = tmp_path / "disk", 4 << 20
    if format == "raw":
        path.write_bytes(bytes(size))
    else:
        create_qcow2(str(path), size, Qcow2Shape(65536))
    image = open_image(Drive(str(path), format=format, cache=cache), warn=print)  # type: ignore[arg-type]  # str for Literal
    ram = memoryview(bytearray(os.urandom(1 << 20)))
    starts = [(at * 7919) % ((1 << 20) - 1024) for at in range(count)]
    lengths = [512 + at % 2 * 512 for at in range(count)]
    parts = Segments(ram, starts, lengths)
    total = parts.size
    for offset in (0, 65536 * 3 + 512):
        image.writev(offset, parts)
        whole = b"".join(parts)
        back = memoryview(bytearray(total))
        image.readv(offset, [back])
        assert back == whole
        room = memoryview(bytearray(2 << 20))
        into = Segments(room, [sum(lengths[:at]) for at in range(count)], lengths)
        image.readv(offset, into)
        assert room[:total] == whole
        image.try_writev(offset, parts)  # type: ignore[attr-defined]  # both kinds have it
        room[:total] = bytes(total)
        if image.try_readv(offset, into):  # type: ignore[attr-defined]  # as above
            assert room[:total] == whole
    image.close()


def test_a_readonly_image_is_not_written(tmp_path: Path) -> None:
    """A write that is only tried is refused by an image that is opened readonly, or that is guarded."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    page = [memoryview(b"QFI\xfb" + bytes(PAGE - 4))]
    for drive in (Drive(str(path), readonly=True), Drive(str(path))):
        image = open_image(drive, warn=lambda text: None)
        image._file._doubt = 0  # type: ignore[attr-defined]  # a raw image
        assert not image.try_writev(0, page)  # type: ignore[attr-defined]  # as above
        image.close()
    assert path.read_bytes() == bytes(1 << 20)


def test_a_failed_flush_stays_failed(tmp_path: Path) -> None:
    """After the host lost data that it could not write, no later flush of a raw disk says that all is well."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "small", small], capture_output=True).returncode:
        pytest.skip("needs permission to mount a tmpfs (root)")
    try:
        (small / "thin").touch()
        os.truncate(small / "thin", 8 << 20)
        loop = subprocess.run(["losetup", "-f", "--show", small / "thin"], capture_output=True, text=True)
        if loop.returncode:
            pytest.skip("needs loop devices")
        try:
            image = open_image(Drive(loop.stdout.strip(), format="raw"), warn=print)
            image.writev(0, [memoryview(bytes(4 << 20))])
            for _ in range(3):
                with pytest.raises(OSError, match="could not make data stable") as caught:
                    image.flush()
                assert caught.value.errno == errno.EIO
            image.close()
        finally:
            subprocess.run(["losetup", "-d", loop.stdout.strip()], check=True)
    finally:
        subprocess.run(["umount", "-l", small], check=True)
