"""``cardcage image`` and the ways to write a drive."""

from __future__ import annotations

import argparse
import json
import random
import resource
import signal
import struct
from typing import TYPE_CHECKING, Any

import cardcage_block
import pytest
from cardcage._config.structure import structure
from cardcage.errors import ConfigError, HostError
from cardcage.host import Host
from cardcage.pairs import parse_pairs
from cardcage.registry import Registry
from cardcage_block import tool
from cardcage_block.drive import Drive, open_image, parse_drive_flag, parse_file
from cardcage_block.make import Qcow2Shape, create_qcow2

if TYPE_CHECKING:
    from pathlib import Path


def image(*words: object) -> int:
    parser = argparse.ArgumentParser()
    tool.configure(parser)
    return tool.run(Host(installed=False), parser.parse_args([str(word) for word in words]))


def content(path: object) -> bytes:
    opened = open_image(Drive(str(path), readonly=True), warn=print)
    data = bytearray(opened.info.size)
    opened.readv(0, [memoryview(data)])
    opened.close()
    return bytes(data)


def test_create_and_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """create makes what its options say, and info tells it."""
    path = tmp_path / "a.qcow2"
    image("create", path, "20M", "-o", "cluster_size=4k,lazy_refcounts=on,refcount_bits=32")
    assert image("info", "--json", path) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["virtual-size"] == 20 << 20
    assert told["cluster-size"] == 4096
    assert told["refcount-bits"] == 32
    assert told["lazy-refcounts"] is True
    image("create", tmp_path / "b.qcow2", "-b", "a.qcow2", "-F", "qcow2")
    image("info", "--backing-chain", tmp_path / "b.qcow2")
    told = capsys.readouterr().out
    assert "20 MiB" in told
    assert told.count("virtual-size:") == 2
    image("create", "-f", "raw", tmp_path / "c", "1M")
    assert (tmp_path / "c").stat().st_size == 1 << 20


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("create", "exists", "1M"), "--force"),
        (("create", "a", "1M", "-o", "cluster_size=3000"), "power of two"),
        (("create", "a", "1M", "-o", "cluster_sise=4k"), 'Did you mean "cluster_size"'),
        (("create", "a", "1M", "-o", "refcount_bits=3"), "refcount_bits"),
        (("create", "a"), "expected a size"),
        (("create", "a", "lots"), "expected a size"),
        (("create", "a", "8E"), "expected a size"),
        (("create", "a", "200T", "-o", "cluster_size=512"), "larger"),
        (("create", "a", "-b", "gone"), "gone"),
        (("check", "exists"), "nothing to check"),
        (("info", "gone"), "No such file"),
        (("resize", "gone", "1M"), "No such file"),
        (("convert", "gone", "a"), "No such file"),
        (("convert", "exists", "exists"), "--force"),
    ],
)
def test_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], problem: str) -> None:
    """What cannot be done is said in one line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exists").write_bytes(bytes(4096))
    with pytest.raises(ConfigError, match=problem) as caught:
        image(*words)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "a").exists()


def test_convert_both_ways(tmp_path: Path) -> None:
    """convert carries a disk from raw to qcow2 and back, leaving holes where there are zeros."""
    choose = random.Random(1)
    data = bytearray(8 << 20)
    for _ in range(9):
        at = choose.randrange(len(data) // 512) * 512
        data[at : at + 5000] = choose.randbytes(5000)
    data = data[: 8 << 20]
    (tmp_path / "a").write_bytes(data)
    image("convert", "-f", "raw", tmp_path / "a", tmp_path / "b", "-o", "cluster_size=4096")
    assert content(tmp_path / "b") == data
    assert (tmp_path / "b").stat().st_size < 3 << 20
    image("convert", "-O", "raw", tmp_path / "b", tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == data
    assert (tmp_path / "c").stat().st_blocks * 512 < 3 << 20


def test_a_new_image_is_what_its_name_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A new image is raw when its name ends in .raw or .img, qcow2 otherwise, and -f and -O overrule the name."""
    image("create", tmp_path / "a.img", "1M")
    image("create", tmp_path / "b.img", "1M", "-f", "qcow2")
    image("convert", tmp_path / "b.img", tmp_path / "c.RAW")
    image("convert", tmp_path / "a.img", tmp_path / "disk")
    image("create", tmp_path / "over.img", "-b", "b.img")
    found = {path.name: tool.describe(str(path))["format"] for path in tmp_path.iterdir()}
    assert found == {"a.img": "raw", "b.img": "qcow2", "c.RAW": "raw", "disk": "qcow2", "over.img": "qcow2"}
    with pytest.raises(ConfigError, match=r"d.img: a raw image takes no -o options"):
        image("create", tmp_path / "d.img", "1M", "-o", "cluster_size=4k")
    assert not (tmp_path / "d.img").exists()


def test_a_copy_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When convert cannot finish, the target is not there."""
    image("create", tmp_path / "a.qcow2", "1M")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tool, "convert", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        image("convert", tmp_path / "a.qcow2", tmp_path / "b.raw")
    assert not (tmp_path / "b.raw").exists()


@pytest.mark.parametrize("name", ["a.raw", "a.qcow2"])
def test_a_disk_that_does_not_fit_leaves_nothing(tmp_path: Path, name: str) -> None:
    """create says in one line that the host has no room for the image, and leaves no file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(ConfigError, match="File too large"):
            image("create", tmp_path / name, "1G")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not (tmp_path / name).exists()


def test_check_finds_and_repairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """check tells leaks (3) from corruptions (2), and --repair puts right what it names."""
    path = tmp_path / "a.qcow2"
    create_qcow2(str(path), 1 << 20, Qcow2Shape(4096))
    opened = open_image(Drive(str(path)), warn=print)
    opened.writev(0, [memoryview(b"x" * 65536)])
    opened.close()
    assert image("check", path) == 0
    data = bytearray(path.read_bytes())
    block = struct.unpack_from(">Q", data, struct.unpack_from(">Q", data, 48)[0])[0]
    struct.pack_into(">H", data, block + 2 * 700, 1)
    path.write_bytes(data)
    assert image("check", path) == 3
    assert image("check", "--repair", "leaks", path) == 0
    assert image("check", path) == 0
    struct.pack_into(">H", data, block + 2 * 700, 0)
    struct.pack_into(">H", data, block + 2 * 7, 0)
    struct.pack_into(">H", data, block + 2 * 8, 2)
    path.write_bytes(data)
    assert image("check", "--repair", "leaks", path) == 2
    capsys.readouterr()
    assert image("check", "--json", path) == 2
    assert json.loads(capsys.readouterr().out)["corruptions"] >= 2
    assert image("check", "--repair", "all", path) == 0
    assert image("check", path) == 0
    assert content(path)[:65536] == b"x" * 65536


def test_resize_relative(tmp_path: Path) -> None:
    """resize takes an absolute size or one to add."""
    image("create", tmp_path / "a", "1M")
    image("resize", tmp_path / "a", "+1M")
    image("resize", tmp_path / "a", "3M")
    assert len(content(tmp_path / "a")) == 3 << 20


def test_registered_offers_load() -> None:
    """Every offer of the card can be imported, and a text stands for a path."""
    registry = Registry()
    cardcage_block.cardcage_register(registry)
    offers = {offer.name: offer for offer in registry}
    for offer in offers.values():
        assert callable(offer.load())
    assert offers["block:drive"].default
    assert structure(parse_file("a:b.img"), Drive) == Drive("a:b.img")


@pytest.mark.parametrize(
    ("text", "drive", "device"),
    [
        ("root.img", {"file": "root.img"}, {}),
        ("file=a,,b,format=raw,readonly=on", {"file": "a,b", "format": "raw", "readonly": True}, {}),
        ("root.qcow2,if=virtio,id=d0,serial=S1", {"file": "root.qcow2"}, {"id": "d0", "serial": "S1"}),
        ("root.img,queues=4", {"file": "root.img"}, {"queues": 4}),
        ("a,shared=on,backing=/b", {"file": "a", "shared": True, "backing": "/b"}, {}),
        (
            "a,werror=stop,rerror=ignore,logical_block=4096",
            {"file": "a"},
            {"werror": "stop", "rerror": "ignore", "logical_block": 4096},
        ),
        (
            "file=a,cache=none,discard=off,locking=on",
            {"file": "a", "cache": "none", "discard": "ignore", "locking": "on"},
            {},
        ),
    ],
)
def test_drive_flag(text: str, drive: dict[str, Any], device: dict[str, Any]) -> None:
    """--drive writes a virtio-blk table in QEMU's words."""
    assert parse_drive_flag(text, Host()) == {"device": [{"type": "virtio-blk", **device, "drive": drive}]}
    structure(drive, Drive)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("format=raw", "file=PATH"),
        ("file=a,readonly=perhaps", "on or off"),
        ("file=a,fromat=raw", 'Did you mean "format"'),
        ("file=a,if=ide", "only virtio"),
        ("file=a,b", "key=value"),
        ("file=a,file=b", "twice"),
        ("file=a,discard=x", "unmap or ignore"),
        ("file=a,queues=two", 'queues: expected a whole number, got "two"'),
        ("file=a,logical_block=4k", 'logical_block: expected a whole number, got "4k"'),
        ("file=a,shared=maybe", 'shared: expected on or off, got "maybe"'),
    ],
)
def test_bad_drive_flag(text: str, problem: str) -> None:
    """A --drive that does not fit is refused with what was expected."""
    with pytest.raises(ValueError, match=problem):
        parse_drive_flag(text, Host())


def test_pairs_keep_double_commas() -> None:
    """Two commas are one comma of a value, also several in a row."""
    assert parse_pairs("a=1,,2,b=,,,c=3") == {"a": "1,2", "b": ",", "c": "3"}


@pytest.mark.parametrize("below", ["a.qcow2", "b.qcow2"])
def test_an_image_does_not_overwrite_what_it_stands_on(tmp_path: Path, below: str) -> None:
    """`create --force` refuses to make an image in place of one of its own backing chain, and leaves that as it was."""
    image("create", tmp_path / "a.qcow2", "1M")
    image("create", tmp_path / "b.qcow2", "-b", "a.qcow2")
    before = (tmp_path / "a.qcow2").read_bytes()
    with pytest.raises(HostError, match="in use elsewhere"):
        image("create", tmp_path / "a.qcow2", "-b", below, "--force")
    assert (tmp_path / "a.qcow2").read_bytes() == before
