"""Drives and networks in a real machine: how a spec is written, who may share an image, and what is given back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from cardcage import Machine
from cardcage.backends import BlockInfo
from cardcage.errors import CardcageError, ConfigError, HostError
from cardcage_block.drive import Drive, open_image
from cardcage_block.make import create_qcow2, create_raw
from cardcage_block.raw import RawImage
from cardcage_testing import check_block_backend

if TYPE_CHECKING:
    from pathlib import Path


def machine(*devices: dict[str, Any]) -> Machine:
    return Machine(accel="tcg", memory="16M", devices=devices)


def opened(vm: Machine) -> Any:
    """The image behind the machine's disk."""
    return vm.devices["virtio-blk"].slot.host.opened[0]


@pytest.mark.parametrize("spec", ["{}", "qcow2:{}", "drive:{}", {"file": "{}"}, {"type": "qcow2", "file": "{}"}])
def test_ways_to_write_a_drive(tmp_path: Path, spec: Any) -> None:
    """A drive is a path, a back end's name and a path, or a table with or without a type."""
    path = tmp_path / "disk with: colon.qcow2"
    create_qcow2(str(path), 1 << 20)
    full = (
        spec.format(path)
        if isinstance(spec, str)
        else {key: value.format(path) if key == "file" else value for key, value in spec.items()}
    )
    with machine({"type": "virtio-blk", "drive": full}) as vm:
        assert opened(vm).info.size == 1 << 20


def test_two_machines_cannot_write_one_image(tmp_path: Path) -> None:
    """A second machine is refused the image while the first has it, and gets it afterwards; readers share."""
    path = str(tmp_path / "disk.qcow2")
    create_qcow2(path, 1 << 20)
    writing = {"type": "virtio-blk", "drive": path}
    reading = {"type": "virtio-blk", "drive": {"file": path, "readonly": True}}
    with machine(writing), pytest.raises(HostError, match="writing this image"):
        machine(writing)
    with machine(writing), pytest.raises(HostError, match="writing this image"):
        machine(reading)
    with machine(reading), machine(reading):
        pass
    with pytest.raises(HostError, match="writing this image"):
        machine({**writing, "id": "a"}, {**writing, "id": "b"})
    machine(writing).close()


@pytest.mark.parametrize(
    ("drive", "words"),
    [
        ("no-such-file", "No such file"),
        ({"file": "no-such-file", "format": "raw"}, "No such file"),
        ({"file": "x", "formt": "raw"}, 'Did you mean "format"'),
        ({"file": "x", "format": "vmdk"}, "expected one of"),
        ({"readonly": True}, "missing"),
        ({"type": "qcow3", "file": "x"}, 'Did you mean "block:qcow2"'),
        ("qcow2:", "expected the path"),
    ],
)
def test_wrong_drives(drive: Any, words: str) -> None:
    """A drive that cannot be is refused with what was expected."""
    with pytest.raises(CardcageError, match=words):
        machine({"type": "virtio-blk", "drive": drive})


def test_wrong_networks() -> None:
    """A network that cannot be is refused with what was expected."""
    for net, words in (
        ("usr", 'Did you mean "net:user"'),
        ({"type": "tap", "ifname": "x" * 20}, "15 bytes"),
        ({"type": "stream"}, "either connect or listen"),
        ("stream:nowhere", "unix:PATH or HOST:PORT"),
        ("user:hostfwd=nonsense", "tcp:127.0.0.1:2222-:22"),
    ):
        with pytest.raises(ConfigError, match=words):
            machine({"type": "virtio-net", "net": net})


def test_machines_of_a_host_share_a_switch(tmp_path: Path) -> None:
    """Switch ports are in one switch where the host is the same, and its socket is gone with the machines."""
    path = tmp_path / "lan"
    first = machine({"type": "virtio-net", "net": {"type": "switch", "name": "lan", "listen": str(path)}})
    second = Machine(accel="tcg", memory="16M", devices=[{"type": "virtio-net", "net": "switch:lan"}], host=first.host)
    switch = first.host.share("net:switch:lan", lambda: None)
    assert len(switch.ports) == 2
    assert path.exists()
    first.close()
    assert path.exists()
    second.close()
    assert not path.exists()
    assert not switch.ports


def test_raw_disk_of_a_machine(tmp_path: Path) -> None:
    """A raw image called raw opens as it is."""
    path = str(tmp_path / "disk")
    create_raw(path, 1 << 20)
    with machine({"type": "virtio-blk", "drive": {"file": path, "format": "raw"}}) as vm:
        assert isinstance(opened(vm), RawImage)


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_our_images_pass_the_public_check(tmp_path: Path, form: str) -> None:
    """Raw and qcow2 keep the contract that a stranger's block back end is held to."""
    path = tmp_path / f"disk.{form}"
    create_raw(str(path), 1 << 20) if form == "raw" else create_qcow2(str(path), 1 << 20)
    check_block_backend(lambda: open_image(Drive(str(path), format="raw" if form == "raw" else "qcow2"), warn=print))
    check_block_backend(lambda: open_image(Drive(str(path), readonly=True), warn=print), requests=20)


class Forgetful:
    """A disk in memory that makes the mistake that it is given."""

    def __init__(self, mistake: str) -> None:
        self.data, self.mistake, self.info = bytearray(1 << 16), mistake, BlockInfo(1 << 16)

    def readv(self, offset: int, buffers: Any, /) -> None:
        for part in buffers:
            part[:] = self.data[offset : offset + len(part)]
            offset += len(part)

    def try_readv(self, offset: int, buffers: Any, /) -> bool:
        self.readv(offset + 512 * (self.mistake == "try"), buffers) if offset < 1 << 14 else None
        return offset < 1 << 14

    def writev(self, offset: int, buffers: Any, /) -> None:
        for part in buffers:
            self.data[offset : offset + len(part)] = part
            offset += 0 if self.mistake == "first" else len(part)

    def flush(self) -> None: ...

    def discard(self, offset: int, length: int, /) -> None:
        if self.mistake == "neighbour":
            self.data[offset + length : offset + length + 1] = b"?"[: offset + length < len(self.data)]

    def write_zeroes(self, offset: int, length: int, /, *, unmap: bool) -> None:
        if self.mistake != "unmap" or not unmap:
            self.data[offset : offset + length] = bytes(length)

    def close(self) -> None: ...


@pytest.mark.parametrize("mistake", ["first", "neighbour", "unmap", "try"])
def test_the_public_check_finds_mistakes(mistake: str) -> None:
    """Buffers written over one another, a discard that goes too far, zeroes forgotten, a quick read that lies."""
    check_block_backend(lambda: Forgetful(""))
    with pytest.raises((AssertionError, ValueError), match=r"other bytes|has changed|assign"):
        check_block_backend(lambda: Forgetful(mistake))
