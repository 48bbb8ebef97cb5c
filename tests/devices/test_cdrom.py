"""The CD-ROM drive: its commands, a hostile driver's requests, and discs that come and go."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Sequence
from pathlib import Path

import cardcage_cdrom
import cardcage_fleet
import cardcage_virtio
import pytest
from cardcage.backends import BlockInfo
from cardcage.errors import UsageError
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage_cdrom.device import CDB, HEAD, SENSE, Cdrom, CdromOptions, OpenFile
from cardcage_cdrom.discs import change, drives
from cardcage_cdrom.drive import CHECK_CONDITION, GOOD, SECTOR, Disc, Drive
from cardcage_cli import main
from hypothesis import given, settings
from hypothesis import strategies as st


class Image:
    """Bytes as a back end."""

    def __init__(self, size: int) -> None:
        self.info = BlockInfo(size, readonly=True)


def drive(size: int = 10 * SECTOR) -> Drive:
    return Drive(Disc(Image(size)))  # type: ignore[arg-type]  # as much of one as is asked


def cdb(*values: int) -> bytes:
    return bytes(values).ljust(16, b"\0")


def test_a_drive_says_what_it_is() -> None:
    """INQUIRY, its pages, capabilities and profile are a CD-ROM drive's."""
    one = drive()
    found = one.execute(cdb(0x12, 0, 0, 0, 36))
    assert (found.status, found.data[0], found.data[1], found.data[8:16]) == (GOOD, 5, 0x80, b"CARDCAGE")
    assert one.execute(cdb(0x12, 1, 0, 0, 255)).data[4:] == b"\x00\x80\x83"
    assert one.execute(cdb(0x12, 1, 0x80, 0, 255)).data[4:] == b"cage-cd"
    assert one.execute(cdb(0x12, 1, 0x99, 0, 255)).status == CHECK_CONDITION
    assert one.execute(cdb(0x5A, 0, 0x2A, 0, 0, 0, 0, 0, 255)).data[8] == 0x2A
    assert one.execute(cdb(0x46, 0, 0, 0, 0, 0, 0, 0, 255)).data[6:8] == b"\x00\x08"
    assert drive(2 << 30).execute(cdb(0x46, 0, 0, 0, 0, 0, 0, 0, 255)).data[6:8] == b"\x00\x10"


def test_sectors_are_found() -> None:
    """READ CAPACITY, READ and the table of contents agree on the disc's size; beyond it nothing is read."""
    one = drive(10 * SECTOR - 512)
    assert one.execute(cdb(0x25)).data == struct.pack(">II", 9, SECTOR)
    assert one.execute(cdb(0x28, 0, 0, 0, 0, 9, 0, 0, 1)).read == (9 * SECTOR, SECTOR)
    assert one.execute(cdb(0xA8, 0, 0, 0, 0, 2, 0, 0, 0, 8)).read == (2 * SECTOR, 8 * SECTOR)
    refused = one.execute(cdb(0x28, 0, 0, 0, 0, 9, 0, 0, 2))
    assert (refused.status, refused.sense[2], refused.sense[12]) == (CHECK_CONDITION, 5, 0x21)
    assert one.execute(cdb(0x43, 0, 0, 0, 0, 0, 0, 0, 255)).data[-4:] == struct.pack(">I", 10)
    assert one.execute(cdb(0x43, 2, 0, 0, 0, 0, 0, 0, 255)).data[8:12] == bytes([0, 0, 2, 0])


def test_discs_come_and_go() -> None:
    """A new disc is told of once; a locked tray stays shut, for guest and host; an empty one is not ready."""
    one = drive()
    assert one.execute(cdb(0x1E, 0, 0, 0, 1)).status == GOOD
    assert one.execute(cdb(0x1B, 0, 0, 0, 2)).sense[12] == 0x53
    with pytest.raises(ValueError, match="locked"):
        one.change(None)
    one.change(Disc(Image(SECTOR)), force=True)  # type: ignore[arg-type]
    changed = one.execute(cdb(0x00))
    assert (changed.sense[2], changed.sense[12]) == (6, 0x28)
    assert one.execute(cdb(0x00)).status == GOOD
    assert one.execute(cdb(0x4A, 1, 0, 0, 0x10, 0, 0, 0, 8)).data[4:6] == b"\x02\x02"
    assert one.execute(cdb(0x1B, 0, 0, 0, 2)).status == GOOD
    for code in (0x00, 0x25, 0x28, 0x43, 0x51):
        told = one.execute(cdb(code))
        assert (told.sense[2], told.sense[12:14]) == (2, b"\x3a\x02"), code


@given(command=st.binary(min_size=16, max_size=32), size=st.integers(0, 1 << 32), empty=st.booleans())
@settings(max_examples=300)
def test_whatever_a_guest_commands_is_answered(command: bytes, size: int, empty: bool) -> None:
    """Any bytes are a command that is carried out or refused, with no more data than it asked for, inside the disc."""
    one = Drive(None) if empty else drive(size // 512 * 512)
    for _ in range(2):
        found = one.execute(command)
        assert (found.status == CHECK_CONDITION) == bool(found.sense)
        assert len(found.data) <= 256
        if found.read is not None:
            assert one.disc is not None
            assert sum(found.read) <= one.disc.sectors * SECTOR


class Ring:
    """Where a request came from."""


class Request:
    """A request with room for an answer."""

    def __init__(self, data: bytes, room: int) -> None:
        self.data, self.room = data, bytearray(room)
        self.readable_size, self.writable_size = len(data), room

    def read(self) -> bytes:
        return self.data

    def write(self, data: bytes, offset: int = 0) -> int:
        took = max(min(len(data), len(self.room) - offset), 0)
        self.room[offset : offset + took] = data[:took]
        return took


def test_a_read_is_carried_out(tmp_path: Path) -> None:
    """A request's answer has a head, sense data and the sectors; other targets and units are not there."""
    (tmp_path / "disc").write_bytes(os.urandom(3 * SECTOR))
    device = Cdrom(CdromOptions())
    device.drive = Drive(Disc(OpenFile(os.open(tmp_path / "disc", os.O_RDONLY))))
    command = cdb(0x28, 0, 0, 0, 0, 1, 0, 0, 2).ljust(CDB, b"\0")
    request = Request(bytes([1, 0, 0x40, 0]).ljust(19, b"\0") + command, HEAD.size + SENSE + 2 * SECTOR + 100)
    assert device._process(request) == HEAD.size + SENSE + 2 * SECTOR  # type: ignore[arg-type]
    assert HEAD.unpack(request.room[: HEAD.size]) == (0, 100, 0, GOOD, 0)
    assert request.room[HEAD.size + SENSE :][: 2 * SECTOR] == (tmp_path / "disc").read_bytes()[SECTOR:]
    for lun in ([1, 1, 0x40, 0], [1, 0, 0x40, 1], [0, 0, 0, 0]):
        request = Request(bytes(lun).ljust(19, b"\0") + command, HEAD.size + SENSE)
        device._process(request)  # type: ignore[arg-type]
        assert request.room[11] == 3


def test_a_disc_stays_while_it_is_read(tmp_path: Path) -> None:
    """A disc is changed between two commands, whatever the guest notifies: its descriptor is not closed in a read."""
    (tmp_path / "disc").write_bytes(bytes(SECTOR))
    reading, go, order = threading.Event(), threading.Event(), []

    class Slow(OpenFile):
        def readv(self, offset: int, buffers: Sequence[memoryview], /) -> None:
            reading.set()
            assert go.wait(60)
            super().readv(offset, buffers)
            order.append("read")

        def close(self) -> None:
            order.append("closed")
            super().close()

    device = Cdrom(CdromOptions())
    device._own = Slow(os.open(tmp_path / "disc", os.O_RDONLY))
    device.drive = Drive(Disc(device._own))
    command = cdb(0x28, 0, 0, 0, 0, 0, 0, 0, 1).ljust(CDB, b"\0")
    request = Request(bytes([1, 0, 0x40, 0]).ljust(19, b"\0") + command, HEAD.size + SENSE + SECTOR)
    acts = [
        threading.Thread(target=device._process, args=(request,)),
        threading.Thread(target=device.change, args=(None,)),
    ]
    acts[0].start()
    assert reading.wait(60)
    acts[1].start()
    assert not device._busy.acquire(timeout=0.05)
    go.set()
    for one in acts:
        one.join()
    assert order == ["read", "closed"]


def test_running_machines_change_discs(runtime: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``cardcage cdrom`` puts a file in and takes it out; what is no drive, file or argument is refused."""
    (tmp_path / "disc.iso").write_bytes(bytes(SECTOR))
    with Machine(accel="tcg", memory="4M", name="vm", devices=[{"type": "virtio-cdrom"}]) as vm:
        (found, _) = drives(vm)["virtio-cdrom"]
        assert found.drive.disc is None
        assert main(["cdrom", "vm", str(tmp_path / "disc.iso")]) == 0, capsys.readouterr().err
        assert found.drive.disc is not None
        assert found.drive.disc.sectors == 1
        found.drive.locked = True
        assert main(["cdrom", "vm"]) == 2
        assert "the guest has locked the tray: unmount the disc there, or use --force" in capsys.readouterr().err
        assert main(["cdrom", "vm", "--force"]) == 0
        assert found.drive.disc is None
        assert main(["cdrom", "vm", "--device", "x"]) == 2
        assert main(["cdrom", "vm", str(tmp_path)]) == 2
        assert main(["cdrom", "vm", str(tmp_path / "none.iso")]) == 2
    assert Host([cardcage_virtio, cardcage_fleet, cardcage_cdrom], installed=False).broken == []
    with Machine(accel="tcg", memory="4M") as vm:  # noqa: SIM117
        with pytest.raises(UsageError, match="no CD-ROM drive"):
            change(vm, {}, None)  # type: ignore[arg-type]  # it comes to no session


def test_the_policy_that_ships_lets_it_read_its_image(tmp_path: Path) -> None:
    """With the default policy a drive opens its image, as a disk does."""
    (tmp_path / "disc.iso").write_bytes(bytes(SECTOR))
    drive = {"file": str(tmp_path / "disc.iso"), "format": "raw", "readonly": True}
    devices = [{"type": "virtio-cdrom", "drive": drive}]
    with Machine(accel="tcg", memory="4M", devices=devices, fragments=[{"security": "default"}]) as vm:
        assert drives(vm)["virtio-cdrom"][0].drive.disc is not None
