"""Disks that become larger while they are used."""

from __future__ import annotations

import errno
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cardcage import Machine
from cardcage.errors import HostError, StateError, UsageError
from cardcage_block import growing
from cardcage_block.drive import Drive, open_image
from cardcage_block.make import Qcow2Shape, create_qcow2
from cardcage_block.throttle import Throttle, ThrottleOptions
from cardcage_hotplug.control import grow_drive, resize_device
from installed import PROGRAM
from qmp_kit import Client

KIB = 1024


def checked(path: Path) -> None:
    """qemu-img finds the image sound, without a leak."""
    subprocess.run(["qemu-img", "check", "-q", str(path)], check=True)


def content(image: Any) -> bytes:
    found = bytearray(image.info.size)
    image.readv(0, [memoryview(found)])
    return bytes(found)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Any]:
    def make(size: int, name: str = "disk.qcow2", **shape: Any) -> Any:
        create_qcow2(str(tmp_path / name), size, Qcow2Shape(**shape))
        return open_image(Drive(str(tmp_path / name), format="qcow2"), warn=print)

    return make


@pytest.mark.parametrize("lazy", [False, True])
def test_a_qcow2_image_gets_a_larger_table(make: Callable[..., Any], tmp_path: Path, lazy: bool) -> None:
    """From one table entry to thousands, step by step, while it is written: nothing is lost, what is new is zeros, and
    qemu-img finds the image sound and of the new size."""
    image = make(20 * KIB, cluster_size=512, lazy_refcounts=lazy)
    want = bytearray(image.info.size)
    for step, size in enumerate((32 * KIB, 33 * KIB, 640 * KIB, 4096 * KIB)):
        for at in range(0, len(want), 3 * KIB):
            data = bytes([step + 1]) * 512
            image.writev(at, [memoryview(data)])
            want[at : at + 512] = data
        image.grow(size)
        want.extend(bytes(size - len(want)))
        assert image.info.size == size
        assert content(image) == want
    image.writev(4095 * KIB, [memoryview(b"z" * 512)])
    want[4095 * KIB : 4095 * KIB + 512] = b"z" * 512
    image.close()
    checked(tmp_path / "disk.qcow2")
    again = open_image(Drive(str(tmp_path / "disk.qcow2"), format="qcow2"), warn=print)
    assert content(again) == want
    again.close()


def test_a_larger_image_below_does_not_show(make: Callable[..., Any], tmp_path: Path) -> None:
    """What an image below has behind the old end stays hidden when the disk grows over it."""
    (tmp_path / "below.img").write_bytes(b"b" * (256 * KIB))
    image = make(64 * KIB, backing_file="below.img", backing_format="raw")
    image.grow(512 * KIB)
    assert content(image) == b"b" * (64 * KIB) + bytes(448 * KIB)
    image.close()
    checked(tmp_path / "disk.qcow2")


def test_writes_meanwhile(make: Callable[..., Any], tmp_path: Path) -> None:
    """Another thread writes and flushes while the disk grows by one table after another: each write is there."""
    image = make(512 * KIB, cluster_size=512)
    failed: list[BaseException] = []

    def write() -> None:
        try:
            for at in range(0, 512 * KIB, 512):
                image.writev(at, [memoryview((at // 512).to_bytes(4, "big") * 128)])
                if at % (16 * KIB) == 0:
                    image.flush()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    for size in range(544 * KIB, 2048 * KIB, 32 * KIB):
        image.grow(size)
    thread.join()
    assert failed == []
    assert content(image)[: 512 * KIB] == b"".join(at.to_bytes(4, "big") * 128 for at in range(1024))
    image.close()
    checked(tmp_path / "disk.qcow2")


def test_the_host_fails_it(make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host has no room for the larger table, the disk is as before and goes on."""
    image = make(32 * KIB, cluster_size=512)
    image.writev(0, [memoryview(b"a" * 512)])
    image.flush()
    write = image._write_all

    def full(writes: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(image, "_write_all", full)
    with pytest.raises(OSError, match="No space"):
        image.grow(640 * KIB)
    monkeypatch.setattr(image, "_write_all", write)
    assert image.info.size == 32 * KIB
    image.writev(31 * KIB, [memoryview(b"c" * 512)])
    image.grow(640 * KIB)
    assert content(image)[:512] + content(image)[31 * KIB : 31 * KIB + 512] == b"a" * 512 + b"c" * 512
    monkeypatch.setattr(growing, "L1_MAX", 0)
    with pytest.raises(OSError, match="too much for clusters of 512"):
        image.grow(1024 * KIB)
    image.close()
    checked(tmp_path / "disk.qcow2")


def test_a_machines_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Python, by QMP and by the command line a disk grows, throttled or not; it does not shrink, and what has no
    disk, or one that is only read, says so."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    for name in ("a.img", "b.img"):
        (tmp_path / name).write_bytes(bytes(64 * KIB))
    spec = {"file": str(tmp_path / "a.img"), "format": "raw"}
    devices = [
        {"type": "qmp", "socket": f"unix:{tmp_path}/qmp", "names": {"a": "node"}},
        {"type": "virtio-blk", "id": "a", "drive": {"type": "throttle", "drive": spec, "bps": "1G"}},
        {"type": "virtio-blk", "id": "b", "drive": {"file": str(tmp_path / "b.img"), "readonly": True}},
    ]
    with Machine(
        memory="16M",
        accel="tcg",
        boot={"protocol": "raw", "image": str(tmp_path / "a.img")},
        devices=devices,
        name="grows",
    ) as vm:
        grow_drive(vm, "a", "128K")
        assert vm.devices["a"].device.device.info.size == 128 * KIB
        with Client(tmp_path / "qmp") as peer:
            assert peer.ask("block_resize", node_name="node", size=192 * KIB) == {"return": {}}
            (found,) = [one for one in peer.ask("query-block")["return"] if one["device"] == "a"]
            assert found["inserted"]["image"]["virtual-size"] == 192 * KIB
            assert "only grows" in peer.ask("block_resize", device="a", size=64 * KIB)["error"]["desc"]
            assert "Cannot find" in peer.ask("block_resize", device="c", size=0)["error"]["desc"]
            assert "expected one of" in peer.ask("block_resize", size=0)["error"]["desc"]
            line = peer.ask("human-monitor-command", command_line="block_resize a 256K")
            assert line == {"return": ""}
        done = subprocess.run([*PROGRAM, "device", "resize", "grows", "a", "1M"], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert (tmp_path / "a.img").stat().st_size == 1024 * KIB
        for id, size, error, words in (
            ("b", "1M", HostError, "only read"),
            ("c", "1M", StateError, 'no device "c"'),
            ("pic", "1M", StateError, "no disk that can grow"),
            ("a", 1024 * KIB + 1, UsageError, "multiple of 512"),
            ("a", "much", UsageError, "expected a size"),
            ("a", 1 << 63, UsageError, "less than"),
        ):
            with pytest.raises(error, match=words):
                grow_drive(vm, id, size)
        for arguments in ({"id": "a"}, {"size": 1}, {"id": "a", "size": True}, {"id": "a", "size": 1, "to": 2}):
            with pytest.raises(UsageError, match="device-resize"):
                resize_device(vm, arguments)


def test_a_throttle_over_what_has_one_size() -> None:
    """A throttle grows as what is below it does, and says where that has one size."""
    with pytest.raises(OSError, match="one size"):
        Throttle(object(), ThrottleOptions("")).grow(1)  # type: ignore[arg-type]  # no image
