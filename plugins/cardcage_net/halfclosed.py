"""An old passt's half-closed connections: what it would damage is lost instead.

From the moment a passt of before 2025_03_20 has a FIN of the guest, it takes the guest's acknowledgements as a sign to
go on, but leaves the acknowledged bytes in the host's socket, from whose beginning it reads: it sends them again as new
ones, and never comes to the end. (Its bug 114; seen in captures with 2023_03_09, not with 2025_05_03.) Nothing else
makes it take bytes from the socket. So such an engine does not see these acknowledgements: the guest then gets, whole,
what its window had room for, and a reset in place of the end, after 16 s.
"""

from __future__ import annotations

import re
import subprocess
from collections import OrderedDict
from struct import pack_into, unpack_from
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Buffer

__all__ = ["WHOLE", "HalfClosed", "damages"]

WHOLE = "2025_03_20"
"""The first version whose half-closed connections are whole."""
FLOWS = 4096
"""Connections that are remembered; of more, those that were still for longest are forgotten."""
FIN, SYN, RST, ACK = 1, 2, 4, 16
_HEADS = 14 + 60 + 20


def damages(engine: str) -> bool:
    """True if the program *engine* is a passt of before :data:`WHOLE`, as it says; False when it cannot be run.

    One that says no version, as Debian 12's, is known by the options that it has not.
    """

    def says(option: str) -> str:
        done = subprocess.run(
            [engine, option],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=10,
            check=False,
        )
        return done.stdout.decode("utf-8", "replace")

    try:
        dated = re.search(r"^passt .*?20(\d\d)_?(\d\d)_?(\d\d)", says("--version"), re.MULTILINE)
        if dated is not None:
            return "_".join(("20" + dated[1], dated[2], dated[3])) < WHOLE
        return "--repair-path" not in says("--help")
    except (OSError, subprocess.TimeoutExpired):
        return False


class HalfClosed:
    """The connections of one guest. Used under the machine's lock.

    Args:
        lost: called once, when the first acknowledgement is kept back.
    """

    def __init__(self, lost: Callable[[], None]) -> None:
        self._lost = lost
        self._told = False
        self._acked: OrderedDict[bytes, int] = OrderedDict()
        self._over: OrderedDict[bytes, None] = OrderedDict()

    def forget(self) -> None:
        """A new engine knows no connection."""
        self._acked.clear()
        self._over.clear()

    def watch(self, received: Callable[[int, bytes | memoryview], bool]) -> Callable[[int, bytes | memoryview], bool]:
        """*received*, which sees the engine's frames after this object."""

        def seen(queue: int, frame: bytes | memoryview) -> bool:
            self._incoming(frame)
            return received(queue, frame)

        return seen

    def _incoming(self, frame: bytes | memoryview) -> None:
        """After the engine's own end of a connection acknowledgements do no harm: nothing comes behind it."""
        places = _places(frame)
        if places is not None and frame[places[2] + 13] & (FIN | RST):
            at, size, tcp = places
            key = bytes(frame[at + size : at + 2 * size]) + bytes(frame[at : at + size])
            key += bytes(frame[tcp + 2 : tcp + 4]) + bytes(frame[tcp : tcp + 2])
            self._acked.pop(key, None)
            _note(self._over, key, None)

    def outgoing(self, parts: Sequence[Buffer]) -> Sequence[Buffer]:
        """The guest's frame as the engine is to have it; empty for not at all."""
        head = memoryview(parts[0])
        if len(head) < _HEADS and len(parts) > 1:
            head = memoryview(b"".join(parts))
        places = _places(head)
        if places is None:
            return parts
        at, size, tcp = places
        key, flags = bytes(head[at : at + 2 * size]) + bytes(head[tcp : tcp + 4]), head[tcp + 13]
        if flags & (SYN | RST):
            self._acked.pop(key, None)
            self._over.pop(key, None)
            return parts
        acked = self._acked.get(key)
        if acked is None:
            if flags & FIN and flags & ACK and key not in self._over:
                _note(self._acked, key, unpack_from(">I", head, tcp + 8)[0])
            return parts
        self._acked.move_to_end(key)
        if not flags & FIN and _payload(head, tcp) <= 0:
            if not self._told:
                self._told = True
                self._lost()
            return ()
        frame = bytearray(b"".join(parts))  # sent again: the engine may have it already
        _acknowledge(frame, tcp, acked)
        return (frame,)


def _note(where: OrderedDict[bytes, int] | OrderedDict[bytes, None], key: bytes, value: int | None) -> None:
    where[key] = value  # type: ignore[assignment]
    where.move_to_end(key)
    if len(where) > FLOWS:
        where.popitem(last=False)


def _places(head: bytes | memoryview) -> tuple[int, int, int] | None:
    """Where the addresses are, their size, and where the TCP header is, ``None`` if *head* does not hold it all."""
    if len(head) < 54:
        return None
    kind = head[12] << 8 | head[13]
    if kind == 0x0800 and head[23] == 6 and not (head[20] & 0x1F or head[21]):
        at, size, tcp = 26, 4, 14 + 4 * (head[14] & 15)
    elif kind == 0x86DD and head[20] == 6:
        at, size, tcp = 22, 16, 54
    else:
        return None
    return (at, size, tcp) if at + 2 * size <= tcp and tcp + 20 <= len(head) else None


def _payload(head: memoryview, tcp: int) -> int:
    """The bytes of payload that the headers speak of."""
    end = 54 + unpack_from(">H", head, 18)[0] if head[12] == 0x86 else 14 + unpack_from(">H", head, 16)[0]
    return int(end - tcp - 4 * (head[tcp + 12] >> 4))


def _acknowledge(frame: bytearray, tcp: int, number: int) -> None:
    """Make *frame* acknowledge *number*; its checksum follows (RFC 1624)."""
    old = unpack_from(">HH", frame, tcp + 8)
    pack_into(">I", frame, tcp + 8, number)
    total = (unpack_from(">H", frame, tcp + 16)[0] ^ 0xFFFF) + sum(one ^ 0xFFFF for one in old)
    total += sum(unpack_from(">HH", frame, tcp + 8))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    pack_into(">H", frame, tcp + 16, total ^ 0xFFFF)
