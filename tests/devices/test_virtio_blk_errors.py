"""Block requests that the host fails: reported, ignored, or the machine pauses and they are tried again."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from cardcage import Machine
from cardcage.errors import ConfigError, HostError
from cardcage_block.drive import Drive, open_image
from cardcage_block.make import create_qcow2, create_raw
from cardcage_snapshot import capture
from cardcage_virtio.devices import blk_errors
from cardcage_virtio.devices.blk import Blk, BlkOptions
from cardcage_virtio.testing import Bench
from test_virtio_blk import MIB, MemoryDisk, head, make

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NO_ROOM = OSError(errno.ENOSPC, "No space left on device")
BROKEN = OSError(errno.EIO, "Input/output error")


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries are made a hundred times a second."""
    monkeypatch.setattr(blk_errors, "EVERY", 0.01)


def waits(bench: Bench) -> None:
    """Wait until the device asked for a pause, and pause it as its machine does."""
    bench.until(lambda: any(one[0] == "pause" for one in bench.slot.power.requests))
    bench.virtio.pause()


def go_on(bench: Bench) -> None:
    bench.slot.power.requests.clear()
    with bench.slot.loop.lock:
        bench.virtio.resume()


REQUESTS: dict[str, tuple[list[bytes], list[int]]] = {
    "read": ([head(0)], [512, 1]),
    "write": ([head(1), b"x" * 512], [1]),
    "flush": ([head(4)], [1]),
    "discard": ([head(11), struct.pack("<QII", 0, 8, 0)], [1]),
    "zeroes": ([head(13), struct.pack("<QII", 0, 8, 0)], [1]),
}


@pytest.mark.parametrize("kind", REQUESTS)
@pytest.mark.parametrize("error", [NO_ROOM, OSError(errno.EDQUOT, "Disk quota exceeded"), BROKEN], ids=str)
@pytest.mark.parametrize("policy", [None, "report", "ignore", "stop", "enospc"])
def test_what_becomes_of_a_failed_request(kind: str, error: OSError, policy: str | None) -> None:
    """`werror` and `rerror` say what becomes of each kind of request and error; by default want of room stops."""
    read = kind == "read"
    if read and policy == "enospc":
        with pytest.raises(ConfigError, match="rerror"):
            Machine(accel="tcg", memory="16M", devices=[{"type": "virtio-blk", "drive": "x", "rerror": policy}])
        return
    bench, disk = make(**({} if policy is None else {"rerror" if read else "werror": policy}))
    disk.fail = error
    token = bench.driver().add(*REQUESTS[kind])
    bench.kick()
    effective = policy or ("report" if read else "enospc")
    if effective == "stop" or (effective == "enospc" and error.errno != errno.EIO):
        waits(bench)
        assert bench.driver().used() == []
        disk.fail = None
        go_on(bench)
        assert bench.wait(0)[token][-1] == 0
    else:
        assert bench.wait(0)[token][-1] == (0 if effective == "ignore" else 1)
        assert bench.slot.power.requests == []
    bench.close()


@pytest.mark.parametrize("form", [{}, {"packed": True}, {"indirect": True}, {"queues": 2, "threads": 4}], ids=str)
def test_requests_wait_and_are_served_once(form: dict[str, Any]) -> None:
    """Requests that find no room wait, none is lost or answered twice, and each is in its place afterwards."""
    bench, disk = make(**form)
    tokens: dict[int, set[int]] = {}
    disk.fail = NO_ROOM
    for queue in bench.drivers:
        tokens[queue] = {
            bench.driver(queue).add([head(1, queue * 64 + at), bytes([at + 1]) * 512], [1]) for at in range(40)
        }
        bench.kick(queue)
    waits(bench)
    go_on(bench)  # the operator, too early
    waits(bench)
    assert all(bench.driver(queue).used() == [] for queue in tokens)
    disk.fail = None
    bench.until(lambda: ("resume",) in bench.slot.power.requests)
    go_on(bench)
    for queue, expected in tokens.items():
        answers = bench.wait(queue, 40)
        assert set(answers) == expected
        assert set(answers.values()) == {b"\0"}
        for at in range(40):
            start = (queue * 64 + at) * 512
            assert disk.data[start : start + 512] == bytes([at + 1]) * 512
    assert bench.call([head(0)], [512, 1])[:1] == b"\1"
    bench.close()


def test_a_reset_forgets_what_waits() -> None:
    """After a reset nothing that waited is served, no try goes on, and the device lets the machine go on."""
    bench, disk = make()
    disk.fail = NO_ROOM
    bench.driver().add([head(1), b"x" * 512], [1])
    bench.kick()
    waits(bench)
    bench.virtio.reset()
    assert bench.slot.power.requests[-1] == ("resume",)
    disk.fail = None
    disk.calls.clear()
    bench.virtio.resume()
    bench.start()
    assert bench.call([head(0)], [512, 1]) == bytes(513)
    assert [call[0] for call in disk.calls] == ["readv"]
    assert disk.data == bytes(MIB)
    bench.close()


@pytest.mark.parametrize("error", [BROKEN, ValueError("a back end's own fault")], ids=repr)
def test_another_failure_ends_the_wait(error: Exception) -> None:
    """A try that fails for another reason lets the machine go on, and the request meets that failure itself."""
    bench, disk = make()
    disk.fail = NO_ROOM
    bench.driver().add([head(1), b"x" * 512], [1])
    bench.kick()
    waits(bench)
    disk.fail = error  # type: ignore[assignment]  # what a back end must not raise
    bench.until(lambda: ("resume",) in bench.slot.power.requests)
    disk.fail = BROKEN
    go_on(bench)
    assert list(bench.wait(0).values()) == [b"\1"]
    bench.close()


def test_what_waits_is_not_saved() -> None:
    """A state that would lack requests that wait is refused with the reason, and can be saved once they are done."""
    bench, disk = make()
    disk.fail = NO_ROOM
    bench.driver().add([head(1), b"x" * 512], [1])
    bench.kick()
    waits(bench)
    with pytest.raises(HostError, match="1 requests wait"):
        bench.virtio.save()
    disk.fail = None
    go_on(bench)
    bench.wait(0)
    bench.virtio.save()
    bench.close()


def test_a_driver_cannot_make_more_wait_than_its_queue_holds() -> None:
    """A driver that offers the same buffers again and again while they wait breaks its device, and not the host."""
    bench, disk = make(queue_size=4)
    disk.fail = NO_ROOM
    driver = bench.driver()
    driver.add([head(1), b"x" * 512], [1])
    for _ in range(8):
        driver._driver16[2 + driver._made % driver.size] = 0
        driver._made = driver._made + 1 & 0xFFFF
        driver._driver16[1] = driver._made
        bench.kick()
        bench.until(lambda: not bench.device._workers.active)
    bench.until(lambda: bool(bench.virtio.status & 64))
    assert bench.device._workers.kept <= 4
    bench.close()


# real files


def mounted(path: Path, size: str) -> None:
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "small", path], capture_output=True)
    if done.returncode:
        pytest.skip("needs permission to mount a tmpfs (root)")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    mounted(tmp_path / "small", "2M")
    yield tmp_path / "small"
    subprocess.run(["umount", "-l", tmp_path / "small"], check=True)


@pytest.mark.parametrize("form", ["raw", "qcow2", "lazy"])
def test_a_full_file_system_is_waited_for(small: Path, form: str) -> None:
    """Writes to an image on a full file system wait, go on by themselves once there is room, and are all there."""
    from cardcage_block.make import Qcow2Shape

    path, ballast = small / "disk", small / "ballast"
    if form == "raw":
        create_raw(str(path), 4 * MIB)
    else:
        create_qcow2(str(path), 4 * MIB, Qcow2Shape(4096, lazy_refcounts=form == "lazy"))
    ballast.write_bytes(bytes(MIB))
    kind: Any = "raw" if form == "raw" else "qcow2"
    image = open_image(Drive(str(path), format=kind), warn=print)
    bench = Bench(Blk(BlkOptions(drive="x")), backends={"block": image})
    expected = {}
    for at in range(24):
        data = bytes([at + 1]) * 65536
        expected[bench.driver().add([head(1, at * 128), data], [1])] = at
    expected[bench.driver().add([head(4)], [1])] = -1
    bench.kick()
    waits(bench)
    bench.driver().used()
    ballast.unlink()
    bench.until(lambda: ("resume",) in bench.slot.power.requests)
    go_on(bench)
    bench.until(lambda: bench.device._workers.kept == 0 and not bench.driver().used() and bench.driver().free >= 250)
    assert bench.call([head(4)], [1]) == b"\0"
    bench.close()
    image.close()
    image = open_image(Drive(str(path), format=kind, readonly=True), warn=print)
    for at in range(24):
        data = memoryview(bytearray(65536))
        image.readv(at * 65536, [data])
        assert data == bytes([at + 1]) * 65536
    image.close()
    if form != "raw":
        subprocess.run(["qemu-img", "check", "-q", path], check=True)


def test_a_machine_that_waits_for_room(tmp_path: Path) -> None:
    """A machine's disk has the default of QEMU, and its words in TOML and --drive are checked."""
    create_raw(str(tmp_path / "d"), MIB)
    drive = {"file": str(tmp_path / "d"), "format": "raw"}
    with Machine(accel="tcg", memory="16M", devices=[{"type": "virtio-blk", "drive": drive}]) as vm:
        options = vm.devices["virtio-blk"].device.device.options
        assert (options.werror, options.rerror) == ("enospc", "report")
        capture(vm)
    with pytest.raises(ConfigError, match=r'werror.*"report"'):
        Machine(accel="tcg", memory="16M", devices=[{"type": "virtio-blk", "drive": drive, "werror": "wait"}])


# logical sectors


def test_logical_sectors_of_4096_bytes() -> None:
    """With `logical_block = 4096` the guest is told so, and a request that is not whole sectors is refused."""
    bench, _ = make(MemoryDisk(MIB, discard=True, write_zeroes=True), logical_block=4096)
    config = bench.device.config()
    assert struct.unpack_from("<Q", config) == (MIB // 512,)
    assert struct.unpack_from("<I", config, 20) == (4096,)
    assert config[24] == 0  # logical blocks in a physical one: 2 to the power of
    assert struct.unpack_from("<I", config, 44) == (8,)  # discard_sector_alignment, in units of 512
    for kind, sector, size, answer in (
        (1, 0, 4096, 0),
        (1, 8, 8192, 0),
        (1, 1, 4096, 1),
        (1, 8, 512, 1),
        (1, 8, 4608, 1),
        (1, 0, 0, 0),
    ):
        assert bench.call([head(kind, sector), bytes(size)], [1]) == bytes([answer])
    assert bench.call([head(0, 8)], [4096, 1])[-1] == 0
    assert bench.call([head(0, 1)], [4096, 1])[-1] == 1
    assert bench.call([head(0, 8)], [512, 1])[-1] == 1
    for first, count, answer in ((0, 8, 0), (1, 8, 1), (8, 7, 1)):
        for kind in (11, 13):
            assert bench.call([head(kind), struct.pack("<QII", first, count, 0)], [1]) == bytes([answer])
    bench.close()


def test_a_drive_has_whole_logical_sectors() -> None:
    """A drive whose size is not whole sectors is refused when they are asked for, and has 512 bytes otherwise."""
    with pytest.raises(ConfigError, match="not a multiple of 4096"):
        make(MemoryDisk(MIB + 512), logical_block=4096)
    bench, _ = make(MemoryDisk(MIB + 512, block_size=4096))
    assert struct.unpack_from("<I", bench.device.config(), 20) == (512,)
    bench.close()
    bench, _ = make(MemoryDisk(MIB, block_size=4096))
    assert struct.unpack_from("<I", bench.device.config(), 20) == (4096,)
    bench.close()
    for wrong in (1000, 8192, 256):
        devices = [{"type": "virtio-blk", "drive": os.devnull, "logical_block": wrong}]
        with pytest.raises(ConfigError, match="logical_block"):
            Machine(accel="tcg", memory="16M", devices=devices)
