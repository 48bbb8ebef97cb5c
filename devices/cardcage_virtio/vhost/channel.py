"""The vhost-user protocol's front end side of a socket (QEMU's docs/interop/vhost-user.rst)."""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import struct
from time import monotonic
from typing import TYPE_CHECKING

from attrs import frozen
from cardcage.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from cardcage.memory import SharedRange

__all__ = ["Channel", "MemoryRegion", "host_address", "memory_regions"]

GET_FEATURES, SET_FEATURES, SET_OWNER, SET_MEM_TABLE = 1, 2, 3, 5
SET_LOG_BASE = 6
SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE = 8, 9, 10, 11
SET_VRING_KICK, SET_VRING_CALL = 12, 13
GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, GET_QUEUE_NUM, SET_VRING_ENABLE = 15, 16, 17, 18
GET_CONFIG, SET_CONFIG, GET_INFLIGHT_FD, SET_INFLIGHT_FD = 24, 25, 31, 32
F_LOG_ALL, F_PROTOCOL_FEATURES = 1 << 26, 1 << 30
P_MQ, P_LOG_SHMFD, P_REPLY_ACK, P_CONFIG, P_INFLIGHT = 1 << 0, 1 << 1, 1 << 3, 1 << 9, 1 << 12
WANTED = P_MQ | P_LOG_SHMFD | P_REPLY_ACK | P_CONFIG | P_INFLIGHT
VERSION, REPLY, NEED_REPLY = 1, 4, 8
HEADER = struct.Struct("<III")
INFLIGHT = struct.Struct("<QQHH")
TIMEOUT = 10.0
"""Seconds that a back end may take to answer one message while nobody waits for it."""
REGIONS_MAX = 8


@frozen
class MemoryRegion:
    """RAM as the back end maps it: guest-physical address, size, our address, and offset in *fd*."""

    address: int
    size: int
    host: int
    offset: int
    fd: int

    def host_address(self, address: int, size: int) -> int | None:
        """Our address of guest-physical *address*, ``None`` when it is not all in this region."""
        inside = self.address <= address and address + size <= self.address + self.size
        return self.host + address - self.address if inside else None


def memory_regions(memory: Iterable[SharedRange]) -> list[MemoryRegion]:
    """The RAM that another process can map. Raises HostError when some cannot be shared, or is in too many pieces."""
    spans: dict[tuple[int, int], tuple[int, int]] = {}
    blocks = {}
    for one in memory:
        if one.readonly:
            continue
        if one.fd < 0:
            raise HostError(
                f"vhost-user: guest memory ({one.name}) cannot be shared with another process: "
                'set memory.type = "memfd"'
            )
        key = one.fd, one.address - one.offset  # pieces of a block that keep their distance are one region
        low, high = spans.get(key, (one.address, one.address + one.size))
        spans[key], blocks[key] = (min(low, one.address), max(high, one.address + one.size)), one
    if len(spans) > REGIONS_MAX:
        raise HostError(f"vhost-user: guest memory is in {len(spans)} pieces, more than {REGIONS_MAX}")
    return [
        MemoryRegion(low, high - low, blocks[key].host_address + low - key[1], low - key[1], key[0])
        for key, (low, high) in spans.items()
    ]


def host_address(regions: list[MemoryRegion], address: int, size: int) -> int:
    """Where this process has guest memory. Raises HostError for what is not in one region."""
    for region in regions:
        found = region.host_address(address, size)
        if found is not None:
            return found
    raise HostError(f"ring at {address:#x} is not in shared memory")


class Channel:
    """A connection to a back end.

    Args:
        path: AF_UNIX socket that the back end listens at.

    Used by one thread at a time, but for :meth:`hang_up`. What speaks raises OSError when the back end hangs up or is
    too slow, HostError when it does not keep to the protocol.

    Attributes:
        features: virtio and vhost features of the back end. protocol: protocol features both have.
        queues: most queues that it serves, ``None`` when it does not say.
    """

    def __init__(self, path: str) -> None:
        self._path, self._socket = path, socket.socket(socket.AF_UNIX)
        self.features = self.protocol = 0
        self.queues: int | None = None
        self._ended = False
        self._limit, self._deadline = math.inf, 0.0

    def open(self) -> None:
        """Connect, and agree on features and protocol. Raises OSError, too, when nobody listens."""
        self._socket.settimeout(TIMEOUT)
        self._socket.connect(self._path)
        if self._ended:  # before there was a connection to end
            raise ConnectionAbortedError("vhost-user: given up")
        self.features = self.get(GET_FEATURES)
        if self.features & F_PROTOCOL_FEATURES:
            self.protocol = self.get(GET_PROTOCOL_FEATURES) & WANTED
            self.send(SET_PROTOCOL_FEATURES, struct.pack("<Q", self.protocol))
        self.queues = self.get(GET_QUEUE_NUM) if self.protocol & P_MQ else None
        self.send(SET_OWNER)

    def fileno(self) -> int:
        return self._socket.fileno()

    def ended(self) -> bool:
        """True if the back end hung up, or sent an unsolicited message, which ends the connection too."""
        ready = select.poll()
        ready.register(self._socket, select.POLLIN)
        return bool(ready.poll(0))

    def hang_up(self) -> None:
        """End the connection: who waits for an answer gets an error at once. Any thread."""
        self._ended = True
        with contextlib.suppress(OSError):  # not connected yet, or no longer
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the socket back. Idempotent."""
        self._socket.close()

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """All that is said in the block takes no longer than this together."""
        self._limit = monotonic() + seconds
        try:
            yield
        finally:
            self._limit = math.inf

    def _wait(self) -> None:
        """Let the socket wait until the deadline; a back end that sends byte by byte gains nothing."""
        left = self._deadline - monotonic()
        if left <= 0:
            raise TimeoutError("vhost-user: the back end does not answer")
        self._socket.settimeout(left)

    def send(self, request: int, payload: bytes = b"", fds: list[int] | None = None, *, reply: bool = False) -> None:
        """Send a message; with REPLY_ACK agreed, wait until it was acted on. Raises HostError when it could not be."""
        acknowledge = not reply and self._acknowledged(request)
        flags = VERSION | (NEED_REPLY if acknowledge else 0)
        message = HEADER.pack(request, flags, len(payload)) + payload
        self._deadline = min(monotonic() + TIMEOUT, self._limit)
        self._wait()
        if socket.send_fds(self._socket, [message], fds or []) < len(message):
            raise HostError("vhost-user: the back end does not read")
        if acknowledge:
            code = int.from_bytes(self._answer(request, 8), "little")
            if code:
                raise HostError(f"vhost-user: the back end refused message {request}: {code}")

    def _acknowledged(self, request: int) -> bool:
        return bool(self.protocol & P_REPLY_ACK) and request not in (SET_PROTOCOL_FEATURES, SET_OWNER)

    def receive(self, request: int) -> tuple[bytes, list[int]]:
        """The answer to *request*, with descriptors that came along."""
        self._wait()
        data, fds, _, _ = socket.recv_fds(self._socket, HEADER.size, 8, socket.MSG_CMSG_CLOEXEC)
        try:
            data += self._exactly(HEADER.size - len(data))
            kind, flags, size = HEADER.unpack(data)
            if kind != request or flags & 7 != VERSION | REPLY or size > 4096:
                raise HostError(f"vhost-user: answer {kind}, flags {flags:#x}, {size} bytes to message {request}")
            return self._exactly(size), fds
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise

    def _exactly(self, size: int) -> bytes:
        found = b""
        while len(found) < size:
            self._wait()
            part = self._socket.recv(size - len(found))
            if not part:
                raise ConnectionResetError("vhost-user: the back end hung up")
            found += part
        return found

    def get(self, request: int, payload: bytes = b"") -> int:
        """Ask for a 64-bit number."""
        self.send(request, payload, reply=True)
        return int.from_bytes(self._answer(request, 8), "little")

    def _answer(self, request: int, size: int) -> bytes:
        """The answer to *request*, which has *size* bytes and no descriptors of use."""
        data, fds = self.receive(request)
        for fd in fds:
            os.close(fd)
        if len(data) != size:
            raise HostError(f"vhost-user: {len(data)} bytes for message {request}, expected {size}")
        return data

    # memory and rings

    def set_memory(self, regions: list[MemoryRegion]) -> None:
        rows = b"".join(struct.pack("<QQQQ", one.address, one.size, one.host, one.offset) for one in regions)
        self.send(SET_MEM_TABLE, struct.pack("<II", len(regions), 0) + rows, [one.fd for one in regions])

    @property
    def logs(self) -> bool:
        """True if the back end can log its writes."""
        return bool(self.protocol & P_LOG_SHMFD and self.features & F_LOG_ALL)

    def set_log(self, fd: int, size: int) -> None:
        """Have the back end set a bit for each page it writes, from address 0 on, in shared memory of *size* bytes."""
        self.send(SET_LOG_BASE, struct.pack("<QQ", size, 0), [fd], reply=True)
        for one in self.receive(SET_LOG_BASE)[1]:
            os.close(one)

    def set_ring(
        self, index: int, size: int, base: int, table: int, used: int, avail: int, kick: int, call: int, log: int | None
    ) -> None:
        """Start queue *index*; ring addresses are ours (:meth:`MemoryRegion.host_address`), but for *log*, the guest's
        of the used ring, when its writes are to be logged."""
        self.send(SET_VRING_NUM, struct.pack("<II", index, size))
        self.send(SET_VRING_BASE, struct.pack("<II", index, base))
        self.send(SET_VRING_ADDR, struct.pack("<IIQQQQ", index, log is not None, table, used, avail, log or 0))
        self.send(SET_VRING_CALL, struct.pack("<Q", index), [call])
        self.send(SET_VRING_KICK, struct.pack("<Q", index), [kick])
        if self.features & F_PROTOCOL_FEATURES:
            self.send(SET_VRING_ENABLE, struct.pack("<II", index, 1))

    def stop_ring(self, index: int) -> int:
        """Stop queue *index*; returns the available index to go on from."""
        return self.get(GET_VRING_BASE, struct.pack("<II", index, 0)) >> 32

    def config(self, size: int) -> bytes:
        """The device's configuration space. Raises HostError when the back end has none."""
        if not self.protocol & P_CONFIG:
            raise HostError("vhost-user: the back end gives no configuration space")
        self.send(GET_CONFIG, struct.pack("<III", 0, size, 0) + bytes(size), reply=True)
        return self._answer(GET_CONFIG, 12 + size)[12:]

    def set_config(self, offset: int, data: bytes) -> None:
        if self.protocol & P_CONFIG:
            self.send(SET_CONFIG, struct.pack("<III", offset, len(data), 0) + data)

    def new_inflight(self, queues: int, size: int) -> tuple[int, bytes] | None:
        """Shared memory in which the back end notes requests in flight: its descriptor and description."""
        if not self.protocol & P_INFLIGHT:
            return None
        self.send(GET_INFLIGHT_FD, INFLIGHT.pack(0, 0, queues, size), reply=True)
        data, fds = self.receive(GET_INFLIGHT_FD)
        if len(data) != INFLIGHT.size or len(fds) != 1:
            for fd in fds:
                os.close(fd)
            raise HostError("vhost-user: the back end gave no memory for requests in flight")
        return fds[0], data

    def set_inflight(self, inflight: tuple[int, bytes]) -> None:
        self.send(SET_INFLIGHT_FD, inflight[1], [inflight[0]])
