"""vhost-user back ends that are silent, slow, or die: nobody else waits for them."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cardcage_conformance import RemoteGuest
from cardcage_fleet import stats_of
from cardcage_virtio.testing import Bench, Driver
from cardcage_virtio.vhost.kinds import VhostUserOptions, vhost_user_device
from leftovers import Leftovers

GET_FEATURES, SET_MEM_TABLE, SET_VRING_KICK, GET_VRING_BASE, GET_CONFIG = 1, 5, 12, 11, 24
GET_PROTOCOL_FEATURES, GET_QUEUE_NUM, SET_CONFIG, GET_INFLIGHT_FD, SET_INFLIGHT_FD = 15, 17, 25, 31, 32
FEATURES = 1 << 32 | 1 << 30
BAR = 0xE2000000
PROTOCOL = 1 << 0 | 1 << 3 | 1 << 9


class BackEnd:
    """A back end of no device that answers as the protocol says, but for messages in ``mute``, ``slow`` and ``last``.

    Attributes:
        mute: never answered. slow: answered byte by byte, for ever. last: the connection ends at this one.
        notes: it offers to keep a note of requests in flight. features: what it offers besides.
        heard: requests in their order.
    """

    def __init__(self, path: Path) -> None:
        self.mute: set[int] = set()
        self.slow: set[int] = set()
        self.last: set[int] = set()
        self.notes, self.features = False, FEATURES
        self.heard: list[int] = []
        self.told = threading.Condition()
        self._ended = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()
        self.peers: list[socket.socket] = []

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            self.peers.append(peer)
            self._threads.append(threading.Thread(target=self._serve, args=(peer,)))
            self._threads[-1].start()

    def _serve(self, peer: socket.socket) -> None:
        with suppress(OSError), peer:
            while head := peer.recv(12, socket.MSG_WAITALL):
                request, flags, size = struct.unpack("<III", head)
                body = peer.recv(size, socket.MSG_WAITALL) if size else b""
                with self.told:
                    self.heard.append(request)
                    self.told.notify_all()
                if request in self.last:
                    return
                answer = self._answer(request, flags, body)
                if request == GET_INFLIGHT_FD:
                    note = os.memfd_create("note")
                    socket.send_fds(peer, [struct.pack("<III", request, 5, len(body)) + body], [note])
                    os.close(note)
                    continue
                if request in self.mute or answer is None:
                    continue
                whole = struct.pack("<III", request, 5, len(answer)) + answer
                while request in self.slow and not self._ended.wait(0.02):
                    peer.send(whole[:1])
                peer.sendall(whole)

    def _answer(self, request: int, flags: int, body: bytes) -> bytes | None:
        protocol = PROTOCOL | self.notes << 12
        numbers = {GET_FEATURES: self.features, GET_PROTOCOL_FEATURES: protocol, GET_QUEUE_NUM: 2}
        if request in numbers:
            return struct.pack("<Q", numbers[request])
        if request == GET_VRING_BASE:
            return body
        if request == GET_CONFIG:
            return body[:12] + b"c" * (len(body) - 12)
        return bytes(8) if flags & 8 else None

    def hears(self, request: int, times: int = 1) -> None:
        """Wait until *request* came so often."""
        with self.told:
            assert self.told.wait_for(lambda: self.heard.count(request) >= times, timeout=30)

    def close(self) -> None:
        self._ended.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for peer in self.peers:
            with suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()


@pytest.fixture
def back_end(tmp_path: Path) -> Iterator[BackEnd]:
    made = BackEnd(tmp_path / "s")
    yield made
    made.close()


@pytest.fixture
def patient(monkeypatch: Any) -> None:
    """Who waits for the back end where it must not waits for minutes, and the test with it."""
    monkeypatch.setattr("cardcage_virtio.vhost.channel.TIMEOUT", 600.0)
    for module in ("user", "link"):
        monkeypatch.setattr(f"cardcage_virtio.vhost.{module}.PATIENCE", 0.2)
    monkeypatch.setattr("cardcage_virtio.vhost.user.ENDING", 0.2)


def bench(tmp_path: Path, **keys: Any) -> Bench:
    return Bench(vhost_user_device(VhostUserOptions(str(tmp_path / "s"), 42, **keys)), shared=True, size=16)


@pytest.mark.parametrize("status", [15, 3])
@pytest.mark.parametrize("how", ["mute", "slow"])
def test_a_start_waits_for_no_answer(tmp_path: Path, back_end: BackEnd, patient: None, how: str, status: int) -> None:
    """The driver goes on at once; a reset, then, hangs up soon, whatever the status was made, and all begins anew."""
    getattr(back_end, how).add(SET_MEM_TABLE)
    made = bench(tmp_path)
    back_end.hears(SET_MEM_TABLE)
    assert made.virtio.status == 15
    assert made.device.link.channel is not None
    made.virtio.set_status(status)
    made.virtio.reset()
    assert made.device.link.channel is None
    getattr(back_end, how).clear()
    made.slot.clock.advance(200_000_000)
    made.until(lambda: made.device.link.channel is not None)
    made.start()
    back_end.hears(SET_VRING_KICK)
    made.until(lambda: made.device.link._talk is None)
    assert made.device.link.channel is not None
    made.close()


@pytest.mark.parametrize("how", ["mute", "slow", "last"])
def test_a_stop_that_is_not_answered_ends_the_connection(
    tmp_path: Path, back_end: BackEnd, patient: None, how: str, monkeypatch: Any
) -> None:
    """A pause hangs up on a back end that does not stop its rings, and they go on with the next connection."""
    made = bench(tmp_path)
    back_end.hears(SET_VRING_KICK)
    getattr(back_end, how).add(GET_VRING_BASE)
    made.virtio.pause()
    assert made.device.link.channel is None
    made.virtio.resume()
    getattr(back_end, how).clear()
    made.slot.clock.advance(200_000_000)
    made.until(lambda: made.device.link.channel is not None)
    back_end.hears(SET_VRING_KICK, 2)
    for name in ("user.PATIENCE", "link.PATIENCE", "user.ENDING"):
        monkeypatch.setattr(f"cardcage_virtio.vhost.{name}", 60.0)
    made.virtio.pause()
    assert made.device.link.channel is not None
    made.virtio.resume()
    made.close()


@pytest.mark.parametrize("notes", [False, True])
def test_the_next_back_end_keeps_a_note_where_the_last_did_not(tmp_path: Path, back_end: BackEnd, notes: bool) -> None:
    """One that offers a note is given an empty one; where the last kept one, one that keeps none cannot go on."""
    back_end.notes = notes
    made = bench(tmp_path)
    back_end.hears(SET_VRING_KICK)
    made.until(lambda: made.device.link._talk is None)
    assert (made.device._inflight is not None) == notes
    back_end.notes = not notes
    back_end.peers[0].shutdown(socket.SHUT_RDWR)
    made.until(lambda: made.device.link.channel is None)
    made.slot.clock.advance(200_000_000)
    if notes:
        made.until(lambda: bool(made.virtio.status & 64))
        made.virtio.reset()
    else:
        made.until(lambda: made.device.link.channel is not None and made.device.link._talk is None)
        assert SET_INFLIGHT_FD in back_end.heard
        assert made.virtio.status == 15
    made.close()


def test_the_next_back_end_has_other_features(tmp_path: Path, back_end: BackEnd) -> None:
    """One that lacks what the driver took needs a reset, after which the driver is offered what there is."""
    back_end.features |= 1 << 5 | 1 << 60
    made = bench(tmp_path)
    assert made.virtio.features >> 60 & 1
    for features in (FEATURES | 1 << 5, FEATURES | 1 << 61):
        back_end.hears(SET_VRING_KICK)
        made.until(lambda: made.device.link._talk is None)
        back_end.features = features
        back_end.heard.clear()
        back_end.peers[-1].shutdown(socket.SHUT_RDWR)
        made.until(lambda: made.device.link.channel is None)
        made.slot.clock.advance(200_000_000)
        made.until(lambda: bool(made.virtio.status & 64))
        made.start()
        assert made.virtio.features == features & ~(1 << 30)
        made.slot.clock.advance(200_000_000)
        made.until(lambda: made.device.link.channel is not None and made.device.link._talk is None)
        assert made.virtio.status == 15
    made.close()


@pytest.mark.parametrize("how", ["mute", "slow", "last"])
def test_a_write_to_the_configuration_that_is_not_answered(
    tmp_path: Path, back_end: BackEnd, patient: None, how: str
) -> None:
    """It ends the connection; what the guest reads stays as it was."""
    made = bench(tmp_path, config_size=8)
    back_end.hears(SET_VRING_KICK)
    getattr(back_end, how).add(SET_CONFIG)
    made.virtio.config_write(0, 4, 7)
    assert made.device.link.channel is None
    assert made.virtio.config_read(0, 4) == int.from_bytes(b"cccc", "little")
    made.close()


@pytest.mark.parametrize("how", ["mute", "slow", "last"])
def test_a_return_that_says_nothing(tmp_path: Path, back_end: BackEnd, patient: None, how: str) -> None:
    """While the next back end accepts and is silent, the device can be reset, started and closed."""
    made = bench(tmp_path)
    back_end.hears(SET_VRING_KICK)
    getattr(back_end, how).add(GET_FEATURES)
    for peer in back_end.peers:
        peer.shutdown(socket.SHUT_RDWR)
    made.until(lambda: made.device.link.channel is None)
    made.slot.clock.advance(200_000_000)
    back_end.hears(GET_FEATURES, 2)
    made.start()
    made.virtio.pause()
    made.virtio.resume()
    assert made.device.link.channel is None
    made.close()


def test_nothing_is_left_open(tmp_path: Path, patient: None) -> None:
    """Connections that failed in every way leave no descriptor and no thread behind."""
    left = Leftovers()
    for turns in range(2):  # the first opens what the process keeps
        back_end = BackEnd(tmp_path / "s")
        ways = ("mute", SET_MEM_TABLE), ("slow", GET_VRING_BASE), ("last", SET_VRING_KICK)
        for turn, (how, request) in enumerate(ways):
            getattr(back_end, how).add(request)
            made = bench(tmp_path)
            back_end.hears(SET_MEM_TABLE, turn + 1)
            made.virtio.pause()
            made.close()
            getattr(back_end, how).clear()
        back_end.close()
        (tmp_path / "s").unlink()
        del back_end, made
        if turns == 0:
            left = Leftovers()
    assert left() == []


def test_a_machine_goes_on_beside_it(tmp_path: Path, back_end: BackEnd, patient: None) -> None:
    """Other devices, statistics, pause, reset and stop do not wait for a back end that is silent at each turn."""
    devices = [
        {"type": "vhost-user-device", "socket": str(tmp_path / "s"), "device_id": 42, "address": "05.0"},
        {"type": "virtio-rng", "address": "06.0"},
    ]
    with RemoteGuest("tcg", devices=devices, fragments=({"memory": {"type": "memfd"}},)) as guest:
        guest.start()
        back_end.mute = {SET_MEM_TABLE, GET_VRING_BASE}
        for bar, slot in ((BAR, 5), (BAR + 0x10000, 6)):
            for offset, value in ((0x24, 0), (0x20, bar), (4, 6)):
                guest.output(0xCF8, 4, 1 << 31 | slot << 11 | offset)
                guest.output(0xCFC, 4, value)
        for turn in range(2):
            silent, busy = Driver(guest.memory, 0x100000, 16), Driver(guest.memory, 0x200000, 16)
            start(guest, BAR, silent)
            back_end.hears(SET_MEM_TABLE, turn + 1)
            start(guest, BAR + 0x10000, busy)
            token = busy.add([], [32])
            guest.store(BAR + 0x13000, 2, 0)
            guest.until(lambda busy=busy: busy.wants_kick() and busy._next_used() is not None, f"no entropy {token}")
            assert stats_of(guest.machine).name == guest.machine.name
            guest.machine.pause()
            guest.machine.resume()
            back_end.mute -= {GET_FEATURES}
            guest.until(
                lambda: guest.machine.devices["vhost-user-device"].device.device.link.channel is not None, "no return"
            )
        back_end.mute.add(GET_FEATURES)
        for peer in list(back_end.peers):
            with suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)
        count = back_end.heard.count(GET_FEATURES)
        back_end.hears(GET_FEATURES, count + 1)
        guest.machine.pause()
        guest.machine.resume()
        guest.machine.stop()


def start(guest: RemoteGuest, bar: int, driver: Driver) -> None:
    for value in (0, 1, 3):
        guest.store(bar + 0x14, 1, value)
    guest.store(bar + 0x08, 4, 1)
    guest.store(bar + 0x0C, 4, 1)
    guest.store(bar + 0x14, 1, 11)
    guest.store(bar + 0x16, 2, 0)
    guest.store(bar + 0x18, 2, 16)
    for offset, address in ((0x20, driver.table), (0x28, driver.driver), (0x30, driver.device)):
        guest.store(bar + offset, 8, address)
    guest.store(bar + 0x1C, 2, 1)
    guest.store(bar + 0x14, 1, 15)
