"""Files that are neither raw nor qcow2: told by name, and never written as if they were raw."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import shutil
import struct
import subprocess
import tarfile
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
from block_model import VolatileFile
from cardcage import Machine
from cardcage.errors import ConfigError
from cardcage.host import Host
from cardcage_block.drive import Drive, open_image, parse_drive_flag
from cardcage_block.formats import probe
from cardcage_block.make import create_qcow2, create_raw
from cardcage_block.raw import RawImage
from test_block_tool import image as tool

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SIZE = 1 << 20
QEMU = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img")

MADE = {
    "vmdk": ("vmdk", ""),
    "vmdk stream": ("vmdk", "subformat=streamOptimized"),
    "vmdk descriptor": ("vmdk", "subformat=monolithicFlat"),
    "vmdk split": ("vmdk", "subformat=twoGbMaxExtentSparse"),
    "vdi": ("vdi", ""),
    "vhdx": ("vhdx", ""),
    "vpc": ("vpc", ""),
    "vpc fixed": ("vpc", "subformat=fixed"),
    "qed": ("qed", ""),
    "parallels": ("parallels", ""),
    "qcow": ("qcow", ""),
}


def make(path: Path, form: str, options: str) -> None:
    words = ["qemu-img", "create", "-q", "-f", form, *(["-o", options] if options else [])]
    subprocess.run([*words, str(path), str(SIZE)], check=True)


def ova() -> bytes:
    room = io.BytesIO()
    with tarfile.open(fileobj=room, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("machine.ovf"))
    return room.getvalue()


def zipped() -> bytes:
    room = io.BytesIO()
    with zipfile.ZipFile(room, "w") as archive:
        archive.writestr("disk.img", bytes(SIZE))
    return room.getvalue()


WRITTEN: dict[str, Callable[[], bytes]] = {
    "gzip": lambda: gzip.compress(bytes(SIZE)),
    "bzip2": lambda: bz2.compress(bytes(SIZE)),
    "xz": lambda: lzma.compress(bytes(SIZE)),
    "lzma": lambda: lzma.compress(bytes(SIZE), lzma.FORMAT_ALONE),
    "zip": zipped,
    "ova": ova,
    # qemu-img makes version 1 only, and where time is measured badly not even that.
    "luks": lambda: b"LUKS\xba\xbe\0\x02".ljust(SIZE, b"\0"),
    "luks 1": lambda: b"LUKS\xba\xbe\0\x01".ljust(SIZE, b"\0"),
    "dmg": lambda: bytes(SIZE) + b"koly".ljust(512, b"\0"),
    "bochs": lambda: b"Bochs Virtual HD Image".ljust(SIZE, b"\0"),
    "vmdk": lambda: b"# a comment\n  \n# another\nversion=1\r\nCID=fffffffe\n",
}


def refused_everywhere(path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = path.read_bytes()
    folder = path.parent
    acts: list[Callable[[], Any]] = [
        lambda: open_image(Drive(str(path)), warn=print),
        lambda: open_image(Drive(str(path), readonly=True), warn=print),
        lambda: tool("convert", path, folder / "copy.raw"),
        lambda: tool("resize", path, "+1M"),
        lambda: tool("check", path),
        lambda: tool("check", path, "--repair", "all"),
        lambda: tool("create", folder / "over.qcow2", "-b", path),
        lambda: Machine(accel="tcg", memory="16M", devices=parse_drive_flag(str(path), Host())["device"]),
        lambda: Machine(accel="tcg", memory="16M", devices=[{"type": "virtio-blk", "drive": f"drive:{path}"}]),
    ]
    names = {"vpc": "VHD", "bzip2": "compressed with bzip2", "luks": "LUKS", "android-sparse": "Android"}
    for act in acts:
        with pytest.raises(ConfigError, match=f"(?i){names.get(form, form)}.*(only raw and qcow2|nothing to check)"):
            act()
    for gone in ("copy.raw", "over.qcow2"):
        assert not (folder / gone).exists()
    capsys.readouterr()
    assert tool("info", "--json", path) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["format"] == form
    assert told["unsupported"]
    tool("convert", "-f", "raw", path, folder / "bytes.raw")
    assert (folder / "bytes.raw").read_bytes().rstrip(b"\0") == before.rstrip(b"\0")
    raw = Machine(
        accel="tcg", memory="16M", devices=[{"type": "virtio-blk", "drive": {"file": str(path), "format": "raw"}}]
    )
    raw.close()
    assert path.read_bytes() == before


@QEMU
@pytest.mark.parametrize("case", MADE)
def test_what_qemu_img_makes_is_refused_by_name(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An image of each of qemu-img's other formats is refused by name by drives and tools, unless raw is said."""
    form, options = MADE[case]
    path = tmp_path / "disk"
    make(path, form, options)
    refused_everywhere(path, form, capsys)


@pytest.mark.parametrize("form", WRITTEN)
def test_what_disks_are_shipped_in_is_refused_by_name(
    tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compressed files, archives and containers are refused by name by drives and tools, unless raw is said."""
    path = tmp_path / "disk"
    path.write_bytes(WRITTEN[form]())
    refused_everywhere(path, form.split()[0], capsys)


def test_zstd_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An image compressed with zstd is refused by name by drives and tools, unless raw is said."""
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "disk"
    path.write_bytes(zstandard.compress(bytes(SIZE)))
    refused_everywhere(path, "zstd", capsys)


@QEMU
@pytest.mark.parametrize("case", [*MADE, "raw", "qcow2"])
def test_formats_are_told_as_qemu_img_tells_them(tmp_path: Path, case: str) -> None:
    """A format has the name that qemu-img info gives it; a fixed VHD, which that takes for raw, is told too."""
    form, options = MADE.get(case, (case, ""))
    path = tmp_path / "disk"
    make(path, form, options)
    told = subprocess.run(["qemu-img", "info", "--output=json", path], check=True, capture_output=True)
    data = path.read_bytes()
    assert probe(data[:512], data[-512:]) == form
    assert json.loads(told.stdout)["format"] == (form if case != "vpc fixed" else "raw")


def test_disks_are_raw() -> None:
    """What disks begin with is raw: nothing, boot sectors, file systems, ISO images, a plain tar archive, a script."""
    room = io.BytesIO()
    with tarfile.open(fileobj=room, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("data.txt"))
    heads = [
        b"",
        b"\xeb\x63\x90\x10\x8e\xd0\xbc\0\xb0",
        b"\xfa\x33\xc0\x8e\xd0",
        b"hsqs\x07\0\0\0",
        b"#!/bin/sh\necho version=1\n",
        b"BZh",
        room.getvalue(),
        b"\x5d\0\0",
    ]
    for head in heads:
        assert probe(head[:512].ljust(512, b"\0"), bytes(512)) == "raw"


@pytest.mark.parametrize("form", [*WRITTEN, "vdi", "qcow2"])
def test_a_guessed_disk_stays_raw(tmp_path: Path, form: str) -> None:
    """A guest whose disk was taken for raw cannot make it look like another format, however it cuts its writes."""
    path = tmp_path / "disk"
    create_raw(str(path), SIZE)
    data = {"vdi": bytes(64) + b"\x7f\x10\xda\xbe", "qcow2": b"QFI\xfb\0\0\0\x03"}.get(form) or WRITTEN[form]()
    head, tail = data[:512].ljust(512, b"\0"), data[-512:] if form == "dmg" else b""
    image = open_image(Drive(str(path)), warn=lambda _: None)
    for cut in (1, 3, 64, 512):
        parts = [memoryview(head[at : at + cut]) for at in range(0, 512, cut)]
        if not tail:
            assert not image.try_writev(0, parts)  # type: ignore[attr-defined]  # of ours
            with pytest.raises(OSError, match="format=raw"):
                image.writev(0, [*parts, memoryview(bytes(4096))])
    if tail:
        assert not image.try_writev(SIZE - 512, [memoryview(tail)])  # type: ignore[attr-defined]  # as above
        with pytest.raises(OSError, match="format=raw"):
            image.writev(SIZE - 1024, [memoryview(bytes(512) + tail)])
        with pytest.raises(OSError, match="format=raw"):
            image.writev(0, [memoryview(bytes(SIZE - 512) + tail)])
    assert path.read_bytes() == bytes(SIZE)
    plain = bytes(range(256)) * (SIZE // 256)
    image.writev(0, [memoryview(plain)])
    image.writev(4096, [memoryview(head)])
    image.close()
    assert path.read_bytes() == plain[:4096] + head + plain[4096 + 512 :]
    open_image(Drive(str(path)), warn=lambda _: None).close()


class Racing(VolatileFile):
    """A file whose guest changes its buffer between the look at it and the write."""

    guest = memoryview(b"")

    def write(self, offset: int, buffers: Any, length: int, /) -> None:
        self.guest[:4] = b"QFI\xfb"
        super().write(offset, buffers, length)


def test_a_guest_cannot_change_what_was_looked_at(tmp_path: Path) -> None:
    """A guest that changes its buffer while a write to the first sector is looked at does not get the mark there."""
    file = Racing(bytes(SIZE))
    file.guest = memoryview(bytearray(4096))
    image = RawImage(file, guessed=True)  # type: ignore[arg-type]  # the same calls
    image.writev(0, [file.guest])
    assert file.guest[:4] == b"QFI\xfb"
    assert bytes(file.now[:4]) == bytes(4)


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [(72, 16, "extended L2 entries"), (28, 2, "encryption (LUKS)"), (28, 1, "encryption (AES)")],
)
def test_info_says_what_is_not_supported(
    tmp_path: Path, where: int, value: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """info tells a qcow2 image's shape and what of it is not supported, which opening it is refused for in one line."""
    path = tmp_path / "a.qcow2"
    create_qcow2(str(path), SIZE)
    data = bytearray(path.read_bytes())
    struct.pack_into(">Q", data, where, value | struct.unpack_from(">Q", data, where)[0])
    path.write_bytes(data)
    assert tool("info", "--json", path) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["format"], told["virtual-size"], told["unsupported"]) == ("qcow2", SIZE, [words])
    tool("info", path)
    assert f"unsupported:       {words}" in capsys.readouterr().out
    with pytest.raises(ConfigError) as caught:
        open_image(Drive(str(path)), warn=print)
    assert words in str(caught.value)


def test_names_that_are_not_utf_8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An image whose path is not UTF-8 is made, told of, checked, resized, converted, and a machine's disk."""
    path = str(tmp_path / "disk-\udcff.qcow2")
    over = str(tmp_path / "over-\udcfe.qcow2")
    assert tool("create", path, "1M") == 0
    assert tool("create", over, "-b", "disk-\udcff.qcow2", "-F", "qcow2") == 0
    for words in (["info", "--json", over], ["info", "--backing-chain", over], ["check", path], ["resize", path, "2M"]):
        assert tool(*words) == 0
    assert r"disk-\xff.qcow2" in capsys.readouterr().out
    assert tool("convert", over, tmp_path / "copy.raw") == 0
    checker = {"type": "selinux", "audit": str(tmp_path / "log"), "state": str(tmp_path / "state")}
    for fragments in ([], [{"security": {"checkers": [checker]}}]):
        devices = parse_drive_flag(over, Host())["device"]
        Machine(accel="tcg", memory="16M", devices=devices, fragments=fragments).close()
