"""What a test leaves open in its process: descriptors and threads that were not there before.

A count would see more than the test's own: what an earlier test of the process left behind is closed when its garbage
is collected, and its threads end when they like.
"""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from contextlib import suppress

from attrs import field, frozen

__all__ = ["Leftovers", "shared"]


def descriptors() -> dict[tuple[int, int, int], str]:
    """Each open descriptor, by its number and the file behind it, with what it is open on."""
    found = {}
    for number in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # the listing's own, and what a thread closes meanwhile
            there = os.fstat(number)
            found[number, there.st_dev, there.st_ino] = f"{number}: {os.readlink(f'/proc/self/fd/{number}')}"
    return found


@frozen
class Leftovers:
    """What is open as this is made; calling it says what has come since and is there yet, garbage aside."""

    _files: dict[tuple[int, int, int], str] = field(factory=descriptors)
    _threads: set[threading.Thread] = field(factory=lambda: set(threading.enumerate()))

    def __call__(self) -> list[str]:
        return self.files() + self.threads()

    def files(self) -> list[str]:
        """Descriptors that have come since."""
        gc.collect()
        return [what for one, what in descriptors().items() if one not in self._files]

    def threads(self) -> list[str]:
        """Threads that have come since."""
        gc.collect()
        return [one.name for one in threading.enumerate() if one not in self._threads]


KCMP, KCMP_FILE = 312, 0


def shared(pid: int, kept: set[int]) -> set[str]:
    """Kinds of open files that this process and *pid* have in common, but for those of its own numbers *kept*."""
    libc = ctypes.CDLL(None, use_errno=True)
    kinds = set()
    for theirs in map(int, os.listdir(f"/proc/{pid}/fd")):
        with suppress(OSError):
            what = os.readlink(f"/proc/{pid}/fd/{theirs}")
            for ours in {int(one) for one in os.listdir("/proc/self/fd")} - kept:
                if libc.syscall(KCMP, os.getpid(), pid, KCMP_FILE, ctypes.c_ulong(ours), ctypes.c_ulong(theirs)) == 0:
                    kinds.add(what)
    return kinds
