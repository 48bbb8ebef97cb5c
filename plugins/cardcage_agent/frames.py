"""Frames between host and agent, and the splitting of a hostile guest's bytes into them.

The protocol is ours; ``native/agent.h`` states it for the guest's side. A frame is a header of 12 bytes (``call`` u32,
``kind`` u16, ``stream`` u16, ``size`` u32; little-endian) and at most :data:`PAYLOAD_MAX` bytes. Calls are numbered by
the host. Stream 0 of a call goes to the guest, 1 and 2 come from it; each is bounded by credit of its own, and the port
to the guest as a whole by :data:`LINK`.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

from cardcage_agent.errors import ProtocolError

__all__ = [
    "BUFFER",
    "LINK",
    "MORE",
    "PAYLOAD_MAX",
    "REQUEST_MAX",
    "VERSION",
    "WINDOW",
    "Frame",
    "Kind",
    "Parser",
    "Verb",
    "frame",
    "number",
]

HEADER = struct.Struct("<IHHI")
FRAME_MAX = 32768
PAYLOAD_MAX = FRAME_MAX - HEADER.size
"""Bytes: a frame fits into one write of Linux's virtio_console."""
MORE = 0x8000
"""Bit of a request's stream: a further piece follows."""
BUFFER = 1 << 17
"""Bytes of stream 0 that the agent keeps for a reader in the guest."""
REQUEST_MAX = BUFFER
"""Bytes of a request: the arguments and the environment of a process, for example."""
WINDOW = 1 << 18
"""Bytes of stream 1 or 2 that are kept here for a reader."""
LINK = 1 << 18
"""Bytes that may be on their way to the agent: a virtio console keeps as many, and drops what is beyond."""
VERSION = 1


class Kind(IntEnum):
    """The kind of a frame."""

    WELCOME = 1
    REQUEST = 2
    CONTINUE = 3
    SIGNAL = 4
    RESIZE = 5
    CANCEL = 6
    GREET = 7
    DATA = 8
    END = 9
    CREDIT = 10
    HELLO = 16
    TAKEN = 17
    STARTED = 18
    EXITED = 19
    RESULT = 20


class Verb(IntEnum):
    """The subject of a request."""

    RUN = 1
    READ = 2
    WRITE = 3
    LIST = 4
    STAT = 5
    RENAME = 6
    REMOVE = 7
    MKDIR = 8
    TIME = 9
    SEED = 10
    PING = 11
    READLINK = 12
    SYMLINK = 13
    FREEZE = 14
    THAW = 15
    WATCH = 16


class Frame(NamedTuple):
    """One frame."""

    call: int
    kind: int
    stream: int
    payload: bytes


def frame(call: int, kind: Kind, stream: int = 0, payload: bytes | memoryview = b"") -> bytes:
    """The bytes of a frame; *payload* has at most :data:`PAYLOAD_MAX`."""
    return HEADER.pack(call, kind, stream, len(payload)) + payload


def number(payload: bytes) -> int:
    """The u32 that *payload* is. Raises ProtocolError for another size."""
    if len(payload) != 4:
        raise ProtocolError(f"a number of {len(payload)} bytes: expected 4")
    return int.from_bytes(payload, "little")


class Parser:
    """Splits a stream into frames, however it is cut. It keeps less than one frame."""

    def __init__(self) -> None:
        self._kept = b""

    @property
    def is_empty(self) -> bool:
        """It is between two frames."""
        return not self._kept

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that are whole now. Raises ProtocolError for one that is longer than any."""
        data, at, found = self._kept + data, 0, []
        while len(data) - at >= HEADER.size:
            call, kind, stream, size = HEADER.unpack_from(data, at)
            if size > PAYLOAD_MAX:
                raise ProtocolError(f"a frame of {size} bytes: expected {PAYLOAD_MAX} at most")
            end = at + HEADER.size + size
            if end > len(data):
                break
            found.append(Frame(call, kind, stream, data[at + HEADER.size : end]))
            at = end
        self._kept = data[at:]
        return found
