"""The stream: frames both ways, each with a number of its own and a sum over all of it.

It begins with :data:`PREFACE` and a version. A frame is kind (1 byte), 3 bytes of zero, the size of its body (4), an
argument (8), its number (4; each side counts from 0) and the CRC-32 of these 20 bytes and the body (4), all
little-endian. Whoever sends is not trusted: each kind has a largest size, and what breaks the form ends the stream.

What is said, in this order (one way: without the answers, and without COMMIT's):

========  ==  =================================================================================================
HELLO     >   JSON: the machine (:class:`~cardcage_migrate.passport.Passport`)
ACCEPT    <   a machine is built and waits; the argument is the time that it needs to load a state, nanoseconds
PAGES     >   RAM: the argument is a number of runs; their offsets (8) and sizes (4), then their bytes
PING      >   answered by PONG once all before it was taken
STATE     >   JSON in pieces: vCPUs and devices; the source stands still
END       >   nothing more comes of the state
READY     <   all is loaded; the destination stands still, and has no disk
COMMIT    >   the source has given the machine up, and let go of its disks; JSON: their stamps
STARTED   <   the destination runs: the source may end
FAILED    <   instead of ACCEPT, READY or STARTED: text; the destination has not run and never will
ABORT     >   instead of COMMIT: the source goes on
========  ==  =================================================================================================

Post-copy has a second connection, to the same place, for pages. ACCEPT has a secret then, by which its first frame is
known; and it can be made anew, as often as it breaks:

========  ==  =================================================================================================
MISSING   >   on the first connection, after the last PAGES: runs (as in PAGES, without bytes) that are out of date
              there, and are not to be had before they come on the second one; then STATE follows
JOIN      >   the secret, on the second connection
JOINED    <   it is taken; with 1 in the argument pages are waited for: then MISSING tells which, and END. 2: it runs.
              Once more, with 1 and without these, when the first pages may come
REQUEST   <   pages that somebody waits for: their offsets (8)
PAGES     >   as above; ZEROS: runs that are zero
STARTED   <   the destination runs
DONE      <   all pages are there, and the source is not needed any more; said back by it (the argument is 1 where the
              machine has ended)
FAILED    <   the machine is lost
========  ==  =================================================================================================
"""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol
from zlib import crc32

from cardcage.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from typing_extensions import Buffer

__all__ = [
    "HEAD",
    "LARGEST",
    "PIECE",
    "PREFACE",
    "RUN",
    "VERSION",
    "BrokenStream",
    "Channel",
    "Frame",
    "Kind",
    "LinkLost",
]
__all__ += ["ASKED", "OFFSET", "SECRET", "Peer", "Pipe", "Refused", "bare_runs", "pages_asked", "runs_in"]
__all__ += ["tables_of_runs"]

PREFACE = b"cardcage-move"
VERSION = 1
_PREFACE = struct.Struct("<13sBH")
HEAD = struct.Struct("<B3xIQI")
_SUM = struct.Struct("<I")
RUN = struct.Struct("<QI")
PIECE = 1 << 20
"""Bytes of RAM in a frame, at most."""
RUNS = PIECE // 4096
OFFSET = struct.Struct("<Q")
SECRET = 32
"""Bytes by which the connection for pages is known."""
ASKED = 512
"""Pages in a frame REQUEST, at most."""
MOST = 4096
"""Runs in a frame without their bytes, at most."""
LONGEST = 1 << 30
"""Bytes of such a run, at most."""


class Kind(IntEnum):
    """The kinds of frames."""

    HELLO = 1
    ACCEPT = 2
    PAGES = 3
    PING = 4
    PONG = 5
    STATE = 6
    END = 7
    READY = 8
    COMMIT = 9
    STARTED = 10
    FAILED = 11
    ABORT = 12
    MISSING = 13
    JOIN = 14
    JOINED = 15
    REQUEST = 16
    ZEROS = 17
    DONE = 18


LARGEST = {
    Kind.HELLO: 4 << 20,
    Kind.ACCEPT: SECRET,
    Kind.PAGES: PIECE + RUNS * RUN.size,
    Kind.STATE: PIECE,
    Kind.COMMIT: 1 << 16,
    Kind.FAILED: 4096,
    Kind.ABORT: 4096,
    Kind.MISSING: MOST * RUN.size,
    Kind.JOIN: SECRET,
    Kind.REQUEST: ASKED * OFFSET.size,
    Kind.ZEROS: MOST * RUN.size,
}
"""Bytes of a body; no other kind has one."""
_KINDS = {int(one): one for one in Kind}


class BrokenStream(HostError):
    """Bytes that are no stream of a machine, or a damaged one."""


class LinkLost(HostError):
    """The other side is gone, or says nothing any more."""


class Refused(HostError):
    """The other side says why it does not go on."""


class Peer(Protocol):
    """A connection, as a socket has it."""

    def recv_into(self, buffer: memoryview, /) -> int: ...

    def sendall(self, data: Buffer, /) -> None: ...

    def settimeout(self, seconds: float | None, /) -> None: ...

    def close(self) -> None: ...


class Pipe:
    """A file or a pipe as a connection, in one direction or both. The descriptor is closed with it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def recv_into(self, buffer: memoryview, /) -> int:
        """Read some bytes; 0 at the end."""
        return os.readv(self._fd, [buffer])

    def sendall(self, data: Buffer, /) -> None:
        """Write all of them."""
        with memoryview(data).cast("B") as view:
            at = 0
            while at < len(view):
                at += os.write(self._fd, view[at:])

    def settimeout(self, seconds: float | None, /) -> None:
        """It takes as long as it takes."""

    def fileno(self) -> int:
        """The descriptor."""
        return self._fd

    def close(self) -> None:
        """Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class Frame(NamedTuple):
    """One frame. *body* shows memory that the next one takes."""

    kind: Kind
    argument: int
    body: memoryview


class Channel:
    """Frames on a connection, which it closes. Each direction is for one thread at a time.

    Args:
        peer: the connection.
        patience: seconds that the other side may be silent, or take nothing.
        one_way: nothing ever comes back.
    """

    def __init__(self, peer: Peer, *, patience: float = 30, one_way: bool = False) -> None:
        self.peer, self.one_way = peer, one_way
        self.sent = 0
        self._sending, self._receiving = 0, 0
        self._buffer = bytearray(1 << 16)
        self.set_patience(patience)

    def set_patience(self, seconds: float | None) -> None:
        """From now on the other side may be silent so long; None for as long as it takes."""
        self.patience = seconds
        self.peer.settimeout(seconds)

    def begin(self) -> None:
        """Say what this is. Raises LinkLost."""
        self._write(_PREFACE.pack(PREFACE, 0, VERSION))

    def meet(self) -> None:
        """Hear what this is. Raises BrokenStream for anything else, LinkLost."""
        text, zero, version = _PREFACE.unpack(self._read(_PREFACE.size))
        if text != PREFACE or zero:
            raise BrokenStream("what came is no machine of cardcage's")
        if version != VERSION:
            raise BrokenStream(f"the stream is of version {version}: this cardcage takes version {VERSION}")

    def send(self, kind: Kind, *parts: Buffer, argument: int = 0) -> None:
        """Send a frame, whose body are the *parts*. Raises LinkLost."""
        body = [memoryview(one).cast("B") for one in parts]
        head = HEAD.pack(kind, sum(map(len, body)), argument, self._sending)
        sum_ = crc32(head)
        for one in body:
            sum_ = crc32(one, sum_)
        self._sending += 1
        self._write(head + _SUM.pack(sum_))
        for one in body:
            self._write(one)

    def say(self, kind: Kind, text: str) -> None:
        """Send text. Raises LinkLost."""
        self.send(kind, text.encode(errors="replace")[: LARGEST[kind]])

    def receive(self, *kinds: Kind) -> Frame:
        """The next frame. Raises BrokenStream for one of other *kinds*, Refused for FAILED and ABORT, LinkLost."""
        head = bytes(self._read(HEAD.size + _SUM.size))
        number, size, argument, turn = HEAD.unpack_from(head)
        kind = _KINDS.get(number)
        if kind is None or any(head[1:4]) or size > LARGEST.get(kind, 0):
            raise BrokenStream(f"the stream has no frame where one is expected (kind {number}, {size} bytes)")
        body = self._read(size)
        if turn != self._receiving or _SUM.unpack_from(head, HEAD.size)[0] != crc32(body, crc32(head[: HEAD.size])):
            raise BrokenStream(f"frame {self._receiving} of the stream is damaged, or another's")
        self._receiving += 1
        if kind in (Kind.FAILED, Kind.ABORT) and kind not in kinds:
            raise Refused("".join(one if one.isprintable() else "?" for one in str(body, errors="replace")))
        if kind not in kinds:
            raise BrokenStream(f"the stream has {kind.name} where {' or '.join(one.name for one in kinds)} is expected")
        return Frame(kind, argument, body)

    def _write(self, data: Buffer) -> None:
        try:
            self.peer.sendall(data)
        except TimeoutError as error:
            raise LinkLost(f"the other side took nothing for {self.patience:g} s") from error
        except (OSError, ValueError) as error:
            raise LinkLost(f"the connection broke: {_why(error)}") from error
        self.sent += memoryview(data).nbytes

    def _read(self, size: int) -> memoryview:
        if size > len(self._buffer):
            self._buffer = bytearray(size)  # at most the largest body
        view, done = memoryview(self._buffer)[:size], 0
        while done < size:
            try:
                got = self.peer.recv_into(view[done:])
            except TimeoutError as error:
                raise LinkLost(f"the other side said nothing for {self.patience:g} s") from error
            except (OSError, ValueError) as error:
                raise LinkLost(f"the connection broke: {_why(error)}") from error
            if not got:
                raise LinkLost("the other side hung up")
            done += got
        return view

    def close(self) -> None:
        """Idempotent."""
        with suppress(OSError):  # what was not sent yet is lost, and so is the connection
            self.peer.close()


def _why(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def runs_in(frame: Frame, size: int) -> Sequence[tuple[int, int]]:
    """The (offset, size) of the runs of a frame PAGES, whose bytes follow them. Raises BrokenStream unless they are
    whole pages of *size* bytes of RAM, and the frame has just their bytes."""
    table = frame.argument * RUN.size
    if not 0 < frame.argument <= RUNS or table > len(frame.body):
        raise BrokenStream(f"a frame of {frame.argument} runs of RAM")
    found = _in_ram(frame.body[:table], size)
    if sum(length for _, length in found) != len(frame.body) - table:
        raise BrokenStream("a frame of RAM without the bytes that it tells of")
    return found


def _in_ram(table: memoryview, size: int) -> list[tuple[int, int]]:
    found = list(RUN.iter_unpack(table))
    for offset, length in found:
        if offset % 4096 or length % 4096 or not length or offset + length > size:
            raise BrokenStream(f"RAM at {offset:#x}, {length} bytes: the machine has {size}")
    return found


def tables_of_runs(runs: Iterable[tuple[int, int]]) -> Iterator[bytes]:
    """Bodies of frames MISSING or ZEROS that tell of *runs*; one at least."""
    table, told = bytearray(), False
    for offset, length in runs:
        for at in range(offset, offset + length, LONGEST):
            table += RUN.pack(at, min(LONGEST, offset + length - at))
            if len(table) == MOST * RUN.size:
                yield bytes(table)
                table, told = bytearray(), True
    if table or not told:
        yield bytes(table)


def bare_runs(frame: Frame, size: int) -> Sequence[tuple[int, int]]:
    """The (offset, size) of the runs of a frame MISSING or ZEROS, in order. Raises BrokenStream unless they are whole
    pages of *size* bytes of RAM, each behind the one before."""
    if len(frame.body) % RUN.size or frame.argument * RUN.size != len(frame.body):
        raise BrokenStream(f"a frame of {frame.argument} runs of RAM")
    found, end = _in_ram(frame.body, size), 0
    for offset, length in found:
        if offset < end:
            raise BrokenStream(f"RAM at {offset:#x} twice, or out of order")
        end = offset + length
    return found


def pages_asked(frame: Frame, size: int) -> Sequence[int]:
    """The offsets in a frame REQUEST. Raises BrokenStream unless they are of pages of *size* bytes of RAM."""
    if not frame.body or len(frame.body) % OFFSET.size:
        raise BrokenStream("a frame REQUEST that asks for no page")
    found = [offset for (offset,) in OFFSET.iter_unpack(frame.body)]
    for offset in found:
        if offset % 4096 or offset >= size:
            raise BrokenStream(f"a page at {offset:#x} is asked for: the machine has {size} bytes")
    return found
