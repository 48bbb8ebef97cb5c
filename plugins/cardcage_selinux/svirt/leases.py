"""Pairs of categories, one for each machine of the host, and which machines are alive.

A lease is a file in a directory, held by flock(2): the kernel lets go of it when the process ends, however it ends. A
pair is also the name of an abstract unix socket, so that machines of other users, who have other directories, do
not draw it. (Network namespaces have abstract sockets of their own: there only the directory counts.)
"""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

from attrs import define
from cardcage.errors import HostError
from cardcage_fleet.held import HeldFile, hold, is_held

__all__ = ["CATEGORIES", "Lease", "alive", "draw", "lease"]

CATEGORIES = 1024
"""Categories c0 to c1023: 523,776 pairs."""
TRIES = 4096


@define(eq=False)
class Lease:
    """A name that is ours while this is open."""

    name: str
    file: HeldFile
    sign: socket.socket | None = None

    def close(self) -> None:
        """Let go. Idempotent."""
        self.file.close()
        if self.sign is not None:
            self.sign.close()


def lease(folder: Path, name: str) -> Lease | None:
    """Hold *name*, a file name; ``None`` when somebody else does. Raises OSError."""
    held = hold(folder / f"{name}.lease")
    return None if held is None else Lease(name, held)


def alive(folder: Path, name: str) -> bool:
    """True if somebody holds *name*."""
    return is_held(folder / f"{name}.lease")


def draw(folder: Path, categories: int = CATEGORIES) -> Lease:
    """A pair that no machine of this host has; its name is ``c12,c500``. Raises HostError when none is found."""
    for _ in range(TRIES):
        number = int.from_bytes(os.urandom(8))
        one, apart = number % categories, number // categories % (categories - 1) + 1
        low, high = sorted((one, (one + apart) % categories))
        name = f"c{low},c{high}"
        held = lease(folder, name)
        if held is None:
            continue
        sign = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        held.sign = sign
        try:
            sign.bind(f"\0cardcage/svirt/{name}")
        except OSError as error:
            held.close()
            if error.errno == errno.EADDRINUSE:
                continue
            raise
        return held
    raise HostError(f"svirt: {TRIES} pairs of categories were drawn, and each is another machine's")
