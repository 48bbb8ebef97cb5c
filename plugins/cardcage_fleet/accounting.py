"""The cost of each machine's memory: exact from ``/proc/PID/smaps``, in between from counters that are free.

The kernel walks a process's page tables to write smaps: about 30 µs for each resident MiB. :class:`Sampler` therefore
looks exactly only as often as a budget of processor time allows, and moves the figures in between by what
``/proc/PID/status`` and ``ksm_merging_pages`` count anyway; :attr:`MachineStats.age` says how old the exact part is.
"""

from __future__ import annotations

import os
import re
import time
from typing import TYPE_CHECKING

from attrs import evolve, field, frozen
from cardcage.errors import HostError, StateError

from cardcage_fleet.membership import record_of
from cardcage_fleet.roster import Roster, RosterEntry, ask, pid_namespace

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cardcage.machine import Machine

__all__ = ["MachineStats", "Sampler", "measure", "stats_of"]

KIB = 1024
HEADER = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) .*\n", re.MULTILINE)
PSS = re.compile(rb"^Pss: +(\d+)", re.MULTILINE)
FIELD = re.compile(rb"^(\w+):[ \t]+(\d+) kB", re.MULTILINE)
BUDGET = 0.02
"""Seconds of processor time a second that exact looks may take by default."""


@frozen
class MachineStats:
    """One machine's memory at one moment. Sizes are bytes.

    Attributes:
        name, pid, state: the machine's. size: its RAM.
        resident: RAM in the host's memory. proportional: the same, each page divided by how many map it (PSS).
        shared: resident pages that others map too, merged ones included. merged: pages that KSM has merged.
        swapped: RAM in swap space. huge: RAM in huge pages, transparent or not.
        ballooned: what the guest gave back by its balloon; ``None`` when it has none, or nobody answers.
        available: what the guest says it could give, ``None`` when it does not say.
        overhead: what the VMM itself takes (PSS), divided by the machines of its process. code: translated code in it.
        age: seconds since the last exact look; 0 for one made now.
    """

    name: str
    pid: int
    size: int
    state: str = "running"
    resident: int = 0
    proportional: int = 0
    shared: int = 0
    merged: int = 0
    swapped: int = 0
    huge: int = 0
    ballooned: int | None = None
    available: int | None = None
    overhead: int = 0
    code: int = 0
    age: float = 0.0


def read_proc(pid: int, name: str) -> bytes:
    """A file of ``/proc/PID``. Raises HostError."""
    try:
        with open(f"/proc/{pid}/{name}", "rb", buffering=0) as file:
            parts = []
            while part := file.read(1 << 20):
                parts.append(part)
    except OSError as error:
        raise HostError(f"/proc/{pid}/{name}: cannot be read: {error.strerror}") from error
    return b"".join(parts)


def measure(pid: int, entries: Iterable[RosterEntry], smaps: bytes | None = None) -> list[MachineStats]:
    """Look exactly at machines of one process. Raises HostError when /proc does not let us.

    Args:
        smaps: what ``/proc/PID/smaps`` says, by default read now.
    """
    text = read_proc(pid, "smaps") if smaps is None else smaps
    machines = list(entries)
    sums: list[dict[bytes, int]] = [{} for _ in machines]
    code, headers = 0, list(HEADER.finditer(text))
    generated = {f"/memfd:{one.code}".encode() for one in machines if one.code}
    for at, header in enumerate(headers):
        start = int(header[1], 16)
        body = text[header.end() : headers[at + 1].start() if at + 1 < len(headers) else len(text)]
        if any(name in header[0] for name in generated):
            code += int(found[1]) if (found := PSS.search(body)) else 0
        for one, counts in zip(machines, sums, strict=True):
            if one.start and one.start <= start < one.start + one.size:
                for name, value in FIELD.findall(body):
                    counts[name] = counts.get(name, 0) + int(value) * KIB
                break
    whole = sum(int(one) for one in PSS.findall(text)) * KIB
    own = max(0, whole - sum(counts.get(b"Pss", 0) for counts in sums)) // max(1, len(machines))
    if not any(b"KSM" in counts for counts in sums):  # before Linux 6.8: only the process's sum is known
        pages = _ksm_pages(pid) * 4096
        resident = sum(counts.get(b"Rss", 0) for counts in sums) or 1
        for counts in sums:
            counts[b"KSM"] = pages * counts.get(b"Rss", 0) // resident
    return [_stats(one, counts, own, code * KIB // len(machines)) for one, counts in zip(machines, sums, strict=True)]


def _stats(entry: RosterEntry, counts: dict[bytes, int], overhead: int, code: int) -> MachineStats:
    told = ask(entry) or {}
    hugetlb = counts.get(b"Shared_Hugetlb", 0) + counts.get(b"Private_Hugetlb", 0)
    huge = sum(counts.get(name, 0) for name in (b"AnonHugePages", b"ShmemPmdMapped", b"FilePmdMapped"))
    shared = counts.get(b"Shared_Clean", 0) + counts.get(b"Shared_Dirty", 0)
    return MachineStats(
        entry.name,
        entry.pid,
        entry.size,
        entry.state,
        resident=counts.get(b"Rss", 0) + hugetlb,  # which the kernel leaves out of Rss and Pss
        proportional=counts.get(b"Pss", 0) + hugetlb,
        shared=shared,
        merged=counts.get(b"KSM", 0),
        swapped=counts.get(b"Swap", 0),
        huge=huge + hugetlb,
        ballooned=told.get("ballooned"),
        available=told.get("available"),
        overhead=overhead,
        code=code,
    )


def stats_of(machine: Machine) -> MachineStats:
    """Look exactly at a machine of this process: about 30 µs for each resident MiB. Raises StateError once closed."""
    if not machine.memory.ranges:
        raise StateError("the machine is closed: it has no memory any more")
    block = machine.memory.ranges[0].block
    record = record_of(machine)
    if record is None:  # no roster: then others of this process are not known, and the overhead is all ours
        code = machine.accelerator.probe.code_memory
        entry = RosterEntry(
            machine.name, os.getpid(), block.size, str(machine.state), start=block.host_address, code=code
        )
        return measure(entry.pid, [entry])[0]
    mine = record.entry
    alive, _, _ = Roster(record.folder.parents[1]).read()
    others = [one for one in alive if one.here and one.pid == mine.pid and one.file != mine.file]
    return measure(mine.pid, [mine, *others])[0]


def _ksm_pages(pid: int) -> int:
    try:
        return int(read_proc(pid, "ksm_merging_pages"))
    except (HostError, ValueError):  # a kernel without KSM, or before 5.19
        return 0


@frozen
class _Counters:
    """Counters that the kernel keeps anyway, for a whole process."""

    resident: int
    swapped: int
    merged: int

    @classmethod
    def read(cls, pid: int) -> _Counters:
        found = dict(FIELD.findall(read_proc(pid, "status")))
        return cls(int(found.get(b"VmRSS", 0)) * KIB, int(found.get(b"VmSwap", 0)) * KIB, _ksm_pages(pid) * 4096)


@frozen
class _Look:
    """The last exact look at a process: when, what it took, what was found, and the counters then."""

    when: float
    took: float
    counters: _Counters
    found: dict[str, MachineStats] = field(factory=dict)
    """By the entry's file."""


class Sampler:
    """Looks at machines again and again, within a budget of processor time.

    Args:
        budget: seconds of processor time a second that exact looks may take; the first at a process is always made.
    """

    def __init__(self, budget: float = BUDGET) -> None:
        self.budget = budget
        self.problems: list[str] = []
        self._credit, self._last = 0.0, time.monotonic()
        self._looks: dict[int, _Look] = {}

    def sample(self, entries: Iterable[RosterEntry]) -> list[MachineStats]:
        """The machines now, in the order of *entries*. Those that cannot be read are in :attr:`problems` instead."""
        self.problems = []
        now = time.monotonic()
        self._credit = min(0.5, self._credit + (now - self._last) * self.budget)
        self._last = now
        processes: dict[int, list[RosterEntry]] = {}
        namespace = pid_namespace()
        for one in entries:
            if one.namespace == namespace:
                processes.setdefault(one.pid, []).append(one)
            else:
                self.problems.append(f"{one.name}: its process is in another namespace of process ids")
        self._looks = {pid: look for pid, look in self._looks.items() if pid in processes}
        found: dict[str, MachineStats] = {}
        # The oldest look is renewed first, so that each has its turn.
        for pid in sorted(processes, key=lambda pid: self._looks[pid].when if pid in self._looks else 0.0):
            try:
                found |= self._process(pid, processes[pid], now)
            except HostError as error:
                self.problems.append(f"{', '.join(one.name for one in processes[pid])}: {error}")
        return [found[one.file] for one in entries if one.file in found]

    def _process(self, pid: int, entries: list[RosterEntry], now: float) -> dict[str, MachineStats]:
        look, counters = self._looks.get(pid), _Counters.read(pid)
        if look is None or set(look.found) != {one.file for one in entries} or self._due(look, counters):
            began = time.thread_time()
            stats = measure(pid, entries)
            took = time.thread_time() - began
            self._credit -= took if look is not None else 0.0
            look = _Look(now, took, counters, {one.file: made for one, made in zip(entries, stats, strict=True)})
            self._looks[pid] = look
            return look.found
        whole = sum(one.resident for one in look.found.values())
        return {one.file: self._moved(one, look, counters, now, whole) for one in entries}

    def _due(self, look: _Look, counters: _Counters) -> bool:
        return counters != look.counters and self._credit >= look.took

    def _moved(self, entry: RosterEntry, look: _Look, counters: _Counters, now: float, whole: int) -> MachineStats:
        """The last exact figures, moved by the machine's part of what its process has gained or lost since."""
        was = look.found[entry.file]
        part = was.resident / whole if whole else 1 / len(look.found)
        gained = int((counters.resident - look.counters.resident) * part)
        swapped = int((counters.swapped - look.counters.swapped) * part)
        merged = int((counters.merged - look.counters.merged) * part)
        told = ask(entry) or {}
        return evolve(
            was,
            state=entry.state,
            resident=_within(was.resident + gained, was.size),
            proportional=_within(was.proportional + gained, was.size),
            swapped=_within(was.swapped + swapped, was.size),
            merged=_within(was.merged + merged, was.size),
            ballooned=told.get("ballooned"),
            available=told.get("available"),
            age=now - look.when,
        )


def _within(value: int, most: int) -> int:
    return max(0, min(value, most))
