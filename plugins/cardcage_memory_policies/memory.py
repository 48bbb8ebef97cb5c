"""One machine's memory as a policy sees it, and the verbs that a policy acts with."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from typing import TYPE_CHECKING, Any

from cardcage.errors import HostError, StateError, UsageError
from cardcage.memory import PAGE
from cardcage.security import Act

from cardcage_memory_policies.smaps import cannot_merge, cannot_move_out, no_huge_pages

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cardcage.device import Plugged
    from cardcage.machine import Machine
    from cardcage.memory import MemoryBalloon
    from cardcage.security import Grant

__all__ = ["MachineMemory"]

CHUNK = 4 << 20
"""Bytes of one madvise call: about a millisecond, in which the kernel holds this process's memory map."""
LOOK = 64 << 20
"""Bytes of one mincore call."""
MADV_COLD, MADV_PAGEOUT, MADV_POPULATE_READ, MADV_COLLAPSE = 20, 21, 22, 25
HARMLESS = {
    mmap.MADV_NORMAL,
    mmap.MADV_RANDOM,
    mmap.MADV_SEQUENTIAL,
    mmap.MADV_WILLNEED,
    mmap.MADV_HUGEPAGE,
    mmap.MADV_NOHUGEPAGE,
    MADV_COLD,
    MADV_PAGEOUT,
    MADV_POPULATE_READ,
    MADV_COLLAPSE,
}
"""Advice that leaves what the guest reads as it is."""


class MachineMemory:
    """One machine's memory as a policy sees and steers it. Thread-safe; holds the machine's lock nowhere.

    Attributes: ``name``, ``label``, ``size`` (bytes of RAM), ``priority`` (who has the lowest gives first), ``log``.

    What a verb can do nothing about on this host, such as moving memory out without swap, the log says once.

    Args:
        policy: whose, for the log. told: what was said for it already, also of other machines.
    """

    def __init__(self, machine: Machine, policy: str = "", told: set[str] | None = None) -> None:
        self._machine, self._policy, self._told = machine, policy, set() if told is None else told
        self.name, self.label, self.log = machine.name, machine.label, machine.log
        self._blocks = list({id(one.block): one.block for one in machine.memory.ranges}.values())
        self.size: int = machine.config.machine.memory
        self.priority: int = machine.config.machine.priority
        self._lock = threading.Lock()  # held for one madvise call: the memory cannot go away meanwhile
        self._gone = False
        self._hand = 0
        self._merging: Grant | None = None
        self._stays: str | None = None
        self._libc = ctypes.CDLL(None, use_errno=True)

    # what it sees

    @property
    def state(self) -> str:
        """The machine's: built, running, paused or stopped."""
        return str(self._machine.state)

    @property
    def ending(self) -> bool:
        """True when the machine is stopped, and its memory about to be freed."""
        return self._gone or self._machine.state == "stopped"

    @property
    def labelled(self) -> bool:
        """True when security checkers are in use, so that :attr:`label` means something."""
        return bool(self._machine.mediator.checkers)

    @property
    def balloon(self) -> MemoryBalloon | None:
        """The machine's balloon, ``None`` without one (:meth:`add` adds one)."""
        found: MemoryBalloon | None = self._machine.services.get("balloon")
        return found

    @property
    def areas(self) -> list[tuple[int, int]]:
        """Where RAM is in this process: (address, bytes) of each block."""
        return [(block.host_address, block.size) for block in self._blocks]

    @property
    def resident(self) -> int:
        """Bytes of RAM that are in the host's memory now (mincore(2)); 0 once the machine is closed."""
        return sum(self._resident(start, size) for start, size in self.areas)

    def _resident(self, start: int, size: int) -> int:
        vector, pages = ctypes.create_string_buffer(LOOK // PAGE), 0
        for at in range(0, size, LOOK):
            length = min(LOOK, size - at)
            with self._lock:
                if self._gone:
                    return 0
                failed = self._libc.mincore(ctypes.c_void_p(start + at), ctypes.c_size_t(length), vector)
            if not failed:
                pages += vector.raw[: length // PAGE].count(1)
        return pages * PAGE

    @property
    def cannot_merge(self) -> str:
        """Why KSM cannot merge this RAM (shared, huge pages, a file behind it); empty when it can."""
        return next((reason for start, _ in self.areas if (reason := cannot_merge(start))), "")

    @property
    def cannot_reclaim(self) -> str:
        """Why nothing of this RAM can be moved out (no swap, huge pages, locked); empty when it can."""
        if self._stays is None:  # looking takes 10 ms for a GiB
            self._stays = next((reason for start, _ in self.areas if (reason := cannot_move_out(start))), "")
        return self._stays

    @property
    def cannot_balloon(self) -> str:
        """Why the host does not get back what a guest gives to a balloon, 4 KiB at a time; empty when it does."""
        page = max((block.page for block in self._blocks), default=PAGE)
        if page > PAGE:
            return f"RAM is made of pages of {page >> 10} KiB, and a balloon takes {PAGE >> 10} KiB at a time"
        with self._lock:
            if self._gone or all(block.discard(0, 0) for block in self._blocks):
                return ""
        return "the memory back end gives no pages back"

    def tell(self, verb: str, reason: str) -> None:
        """Say that *verb* can do nothing here, and why: once for all machines of the policy, never without *reason*."""
        if reason and (said := f"{verb}: {reason}") not in self._told:
            self._told.add(said)
            policy = {"policy": self._policy} if self._policy else {}
            self.log.warning("memory policy: this host does not let it act", **policy, verb=verb, reason=reason)

    # what it does

    def advise(self, advice: int, areas: Iterable[tuple[int, int]] | None = None) -> int:
        """madvise(2) over all RAM, or over *areas* of this process's memory that lie inside it, 4 MiB at a time.

        Returns the bytes for which the kernel took the advice. Raises UsageError for advice that would change what the
        guest reads (``MADV_DONTNEED``, ...), for merging (:meth:`merge`), and for areas that are not RAM.
        """
        if advice not in HARMLESS:
            raise UsageError(f"advice {advice} is not for a policy: it changes or merges the guest's memory")
        checked = self.areas if areas is None else list(areas)
        for start, size in checked:
            inside = any(base <= start and start + size <= base + length for base, length in self.areas)
            if start % PAGE or size < 0 or not inside:
                raise UsageError(f"{start:#x}+{size:#x} is not RAM of {self.name} in whole pages")
        done = sum(self._advise(advice, start, size) for start, size in checked)
        if not done and any(size for _, size in checked) and not self._gone:
            self.tell(f"madvise({advice})", os.strerror(ctypes.get_errno()))
        elif advice == MADV_PAGEOUT and not self._gone:
            self.tell("reclaim", self.cannot_reclaim)
        elif advice == mmap.MADV_HUGEPAGE:
            self.tell(f"madvise({advice})", no_huge_pages())
        return done

    def _advise(self, advice: int, start: int, size: int, errors: tuple[int, ...] = ()) -> int:
        """Bytes taken. Raises HostError for an error number in *errors*."""
        done = 0
        for at in range(0, size, CHUNK):
            length = min(CHUNK, size - at)
            with self._lock:
                if self._gone:
                    return done
                failed = self._libc.madvise(ctypes.c_void_p(start + at), ctypes.c_size_t(length), advice)
            if not failed:
                done += length
            elif ctypes.get_errno() in errors:
                raise HostError(f"{self.name}: madvise({advice}): {os.strerror(ctypes.get_errno())}")
        return done

    def merge(self, on: bool = True, *, target: str | None = None) -> None:
        """Let ksmd merge this RAM's pages with equal ones, or take each back for its own.

        Merged pages are a side channel: the security checkers are asked whether this machine may merge with those
        labelled *target* (by default its own label). Raises Denied, or HostError with the reason why this memory cannot
        merge, or when the host has not enough to take pages back.
        """
        if (grant := self._merging) is not None:
            self._merging = None
            grant.drop()
        if not on:
            self._unmerge()
            return
        if reason := self.cannot_merge:
            raise HostError(f"{self.name}: RAM cannot be merged: {reason}")
        self._merging = self._machine.mediator.grant(
            Act(self.label, target or self.label, "memory", ("merge",), {"machine": self.name}),
            self._unmerge,
            self._merge,
        )
        self._merge()

    def _merge(self) -> None:
        for start, size in self.areas:
            self._advise(mmap.MADV_MERGEABLE, start, size, errors=(12, 22))  # ENOMEM; EINVAL: no KSM in this kernel

    def _unmerge(self) -> None:
        for start, size in self.areas:
            self._advise(mmap.MADV_UNMERGEABLE, start, size, errors=(12,))  # ENOMEM

    def reclaim(self, size: int) -> int:
        """Move about *size* bytes of resident RAM out, to swap or to the file behind it (``MADV_PAGEOUT``).

        Goes round the RAM like a clock hand, from where the last call stopped; what the guest still uses comes back
        when it is touched. Returns the bytes that left: 0 where there is nowhere to move them.
        """
        self._allow_reclaim()
        areas = self.areas
        places = [(start + at, min(CHUNK, length - at)) for start, length in areas for at in range(0, length, CHUNK)]
        gone, looked = 0, False
        for _ in range(len(places)):
            if gone >= size:
                break
            start, length = places[self._hand % len(places)]
            self._hand = (self._hand + 1) % len(places)
            if before := self._resident(start, length):
                self._write_back(start, length)
                self._advise(MADV_PAGEOUT, start, length)
                looked = True
                gone += max(0, before - self._resident(start, length))
        if looked and not gone and not self._gone:
            self.tell("reclaim", self.cannot_reclaim)
        return gone

    def _write_back(self, start: int, size: int) -> None:
        """Linux moves only clean pages of a file out (mm/vmscan.c); for other memory msync(2) does nothing."""
        with self._lock:
            if not self._gone:
                self._libc.msync(ctypes.c_void_p(start), ctypes.c_size_t(size), 4)  # MS_SYNC

    def _allow_reclaim(self) -> None:
        self._machine.mediator.check(Act(self.label, self.label, "memory", ("reclaim",), {"machine": self.name}))

    def set_target(self, size: int) -> None:
        """Ask the guest to do with *size* bytes of its RAM; the balloon takes the rest in the guest's own time.

        Raises StateError without a balloon, UsageError for a size below 0 or above :attr:`size`.
        """
        if not 0 <= size <= self.size:
            raise UsageError(f"{self.name}: a target of {size} bytes: expected 0 to {self.size}")
        balloon = _found(self.balloon, self.name)
        self._allow_reclaim()
        if size < self.size:
            self.tell("set_target", self.cannot_balloon)
        self._machine.loop.call_soon(lambda: balloon.resize(self.size - size))

    def ask_statistics(self) -> None:
        """Ask the guest for statistics: ``balloon.report`` is new soon after, unless it does not answer."""
        balloon = _found(self.balloon, self.name)
        self._machine.loop.call_soon(balloon.ask_statistics)

    def add(self, type: str, /, **keys: Any) -> Plugged:
        """Add a device that the policy needs, from ``attach``: ``memory.add("virtio-balloon")``."""
        return self._machine.add(type, **keys)

    def fail(self, error: BaseException) -> None:
        """Stop the machine with *error*."""
        self._machine.fail(error)

    def release(self) -> None:
        """The machine's memory is about to go: no verb touches it any more."""
        with self._lock:
            self._gone = True


def _found(balloon: MemoryBalloon | None, name: str) -> MemoryBalloon:
    if balloon is None:
        raise StateError(f"{name}: has no balloon device")
    return balloon
