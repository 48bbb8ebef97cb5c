"""Memory policies: what a policy card is, what it sees of a machine, and the verbs it acts with.

A policy is any object with ``attach(memory)``, called once for each machine that it is for. Optional are
``detach(memory)``, which puts everything back, and ``step()``, which a thread of the policy's own calls every
``interval`` seconds (1 by default) while machines are attached: it may take its time, it holds up no machine. The three
never overlap.

What it sees: a :class:`MachineMemory` for each machine, and :func:`~cardcage.hostmemory.read_host_memory`. How it acts:
``advise``, ``merge``, ``reclaim``, ``set_target``. An exception in ``step`` ends the machines of that policy, as any
card's does: memory that nobody steers any more would be the host's to kill.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from attrs import field, frozen

from cardcage.abilities import check_signature
from cardcage.assembly import blamed
from cardcage.config import specs_of
from cardcage.errors import HostError, StateError, UsageError
from cardcage.hostmemory import HostMemory, read_host_memory
from cardcage.memory import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from cardcage.machine import Machine
    from cardcage.security import Grant
    from cardcage.slot import PluggedDevice

__all__ = [
    "AttachedPolicy",
    "GuestMemoryReport",
    "HostMemory",
    "MachineMemory",
    "Mapping",
    "MemoryBalloon",
    "Policy",
    "PolicyRun",
    "attach_policies",
    "detach_policies",
    "mappings",
    "read_host_memory",
]

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


class Policy(Protocol):
    """A policy card's factory product. ``detach``, ``step`` and ``interval`` are optional."""

    def attach(self, memory: MachineMemory, /) -> None:
        """*memory* is this policy's from now on: the machine is built, and has not started. Raise to refuse it."""
        ...

    def detach(self, memory: MachineMemory, /) -> None:
        """Put back what was done to *memory*; ``memory.ending`` says that it is about to be freed anyway."""
        ...

    def step(self) -> None:
        """Every ``interval`` seconds, on a thread of the policy's own, while it has a machine."""
        ...


@frozen
class GuestMemoryReport:
    """What a guest last said about its memory.

    Attributes:
        at: ``time.monotonic()`` when it came.
        values: bytes or counts by name: ``available_memory free_memory disk_caches total_memory major_faults``, ...;
            a guest may leave out any, and may lie.
        ballooned: bytes that it had given then.
    """

    at: float
    values: dict[str, int] = field(factory=dict)
    ballooned: int = 0


class MemoryBalloon(Protocol):
    """A device by which a guest gives memory back; it makes itself known by ``slot.balloon(self)``.

    Called under the machine's lock, but for the three that only tell.
    """

    @property
    def live(self) -> bool:
        """Whether the guest has a driver for it that is ready."""
        ...

    @property
    def size(self) -> int:
        """Bytes that the guest has given."""
        ...

    @property
    def report(self) -> GuestMemoryReport | None:
        """The guest's last statistics, ``None`` before the first."""
        ...

    def resize(self, size: int, /) -> None:
        """Ask the guest to have given *size* bytes in all; it does so in its own time, or never."""
        ...

    def ask_statistics(self) -> None:
        """Ask for a new :attr:`report`."""
        ...


class MachineMemory:
    """One machine's memory as a policy sees and steers it. Thread-safe; holds the machine's lock nowhere.

    Attributes: ``name``, ``label``, ``size`` (bytes of RAM), ``priority`` (who has the lowest gives first), ``log``.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.name, self.label, self.log = machine.name, machine.label, machine.log
        self._blocks = list({id(one.block): one.block for one in machine.memory.ranges}.values())
        self.size: int = machine.config.machine.memory
        self.priority: int = machine.config.machine.priority
        self._lock = threading.Lock()  # held for one madvise call: the memory cannot go away meanwhile
        self._gone = False
        self._hand = 0
        self._merging: Grant | None = None
        self._libc = ctypes.CDLL(None, use_errno=True)

    # what it sees

    @property
    def state(self) -> str:
        """The machine's: built, running, paused or stopped."""
        return self._machine.state

    @property
    def ending(self) -> bool:
        """Whether the machine is stopped, and its memory about to be freed."""
        return self._gone or self._machine.state == "stopped"

    @property
    def labelled(self) -> bool:
        """Whether security checkers are in use, so that :attr:`label` means something."""
        return bool(self._machine.mediator.checkers)

    @property
    def balloon(self) -> MemoryBalloon | None:
        """The machine's balloon, ``None`` without one (:meth:`add` adds one)."""
        return self._machine.balloon

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

    # what it does

    def advise(self, advice: int, areas: Iterable[tuple[int, int]] | None = None) -> int:
        """madvise(2) over all RAM, or over *areas* of this process's memory that lie inside it, 4 MiB at a time.

        Returns the bytes for which the kernel took the advice. Raises UsageError for advice that would change what the
        guest reads (``MADV_DONTNEED``, ...), for merging (:meth:`merge`), and for areas that are not RAM.
        """
        if advice not in HARMLESS:
            raise UsageError(f"advice {advice} is not for a policy: it changes or merges the guest's memory")
        return sum(self._advise(advice, start, size) for start, size in self._checked(areas))

    def _checked(self, areas: Iterable[tuple[int, int]] | None) -> list[tuple[int, int]]:
        if areas is None:
            return self.areas
        wanted = list(areas)
        for start, size in wanted:
            inside = any(base <= start and start + size <= base + length for base, length in self.areas)
            if start % PAGE or size < 0 or not inside:
                raise UsageError(f"{start:#x}+{size:#x} is not RAM of {self.name} in whole pages")
        return wanted

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
            self.label, target or self.label, "memory", ("merge",), {"machine": self.name}, self._unmerge, self._merge
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
        gone = 0
        for _ in range(len(places)):
            if gone >= size:
                break
            start, length = places[self._hand % len(places)]
            self._hand = (self._hand + 1) % len(places)
            if before := self._resident(start, length):
                self._write_back(start, length)
                self._advise(MADV_PAGEOUT, start, length)
                gone += max(0, before - self._resident(start, length))
        return gone

    def _write_back(self, start: int, size: int) -> None:
        """Linux moves only clean pages of a file out (mm/vmscan.c); for other memory msync(2) does nothing."""
        with self._lock:
            if not self._gone:
                self._libc.msync(ctypes.c_void_p(start), ctypes.c_size_t(size), 4)  # MS_SYNC

    def _allow_reclaim(self) -> None:
        self._machine.mediator.check(self.label, self.label, "memory", ("reclaim",), {"machine": self.name})

    def set_target(self, size: int) -> None:
        """Ask the guest to do with *size* bytes of its RAM; the balloon takes the rest in the guest's own time.

        Raises StateError without a balloon, UsageError for a size below 0 or above :attr:`size`.
        """
        if not 0 <= size <= self.size:
            raise UsageError(f"{self.name}: a target of {size} bytes: expected 0 to {self.size}")
        balloon = self._need_balloon()
        self._allow_reclaim()
        self._machine.events.call_soon(lambda: balloon.resize(self.size - size))

    def ask_statistics(self) -> None:
        """Ask the guest for statistics: ``balloon.report`` is new soon after, unless it does not answer."""
        balloon = self._need_balloon()
        self._machine.events.call_soon(balloon.ask_statistics)

    def _need_balloon(self) -> MemoryBalloon:
        if (balloon := self.balloon) is None:
            raise StateError(f"{self.name}: has no balloon device")
        return balloon

    def add(self, type: str, /, **keys: Any) -> PluggedDevice:
        """Add a device that the policy needs, from ``attach``: ``memory.add("virtio-balloon")``."""
        return self._machine.add(type, **keys)

    def fail(self, error: BaseException) -> None:
        """Stop the machine with *error*."""
        self._machine.fail(error)

    def release(self) -> None:
        """The machine's memory is about to go: no verb touches it any more."""
        with self._lock:
            self._gone = True


def cannot_merge(address: int) -> str:
    """Why KSM cannot merge the mapping at *address* of this process; empty when it can (proc_pid_smaps(5))."""
    flags = next((one.flags for one in mappings() if one.start <= address < one.end), None)
    if flags is None:
        return "it is not mapped"
    if "ht" in flags:
        return "it is made of huge pages (hugetlb)"
    if "sh" in flags:
        return "it is shared (a memfd, or a file behind it), and KSM merges only private memory"
    return ""


@frozen
class Mapping:
    """A mapping of this process (proc_pid_smaps(5)).

    Attributes:
        start, end: addresses. flags: two letters each, such as ``mg`` (mergeable).
        sizes: bytes by name: ``Rss Pss Referenced Anonymous KSM Swap``, ...
    """

    start: int
    end: int
    flags: tuple[str, ...]
    sizes: dict[str, int]


def mappings() -> Iterator[Mapping]:
    """Each mapping of this process; the kernel looks at every page of it, about 10 ms for a GiB."""
    start = end = 0
    sizes: dict[str, int] = {}
    with open("/proc/self/smaps") as lines:
        for line in lines:
            words = line.split()
            if words[0] == "VmFlags:":
                yield Mapping(start, end, tuple(words[1:]), sizes)
            elif words[0].endswith(":"):
                sizes[words[0][:-1]] = int(words[1]) * 1024 if words[-1] == "kB" else int(words[1])
            else:
                low, _, high = words[0].partition("-")
                start, end, sizes = int(low, 16), int(high, 16), {}


class PolicyRun:
    """Drives one policy: attaches machines, and calls its ``step`` on a thread of its own while there are any.

    The policy hears one call at a time. Raises CardError for wrong signatures.

    Args:
        policy: the card's object. name: the configuration's word for it. who: it, its card and distribution.

    Attributes:
        stepping: set it to False before the first machine, and call ``step`` yourself.
    """

    def __init__(self, policy: Any, name: str, who: str) -> None:
        self.policy, self.name = policy, name
        check_signature(policy, "attach", 1, who)
        self._detach = check_signature(policy, "detach", 1, who) if hasattr(policy, "detach") else None
        self._step = check_signature(policy, "step", 0, who) if hasattr(policy, "step") else None
        self.stepping = self._step is not None
        self._machines: list[MachineMemory] = []
        self._lock = threading.Lock()  # one attach or detach at a time
        self._calling = threading.Lock()  # the policy hears one call at a time
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def attach(self, memory: MachineMemory) -> None:
        """Give the policy one more machine. What the policy raises, it refuses with."""
        with self._lock:
            with self._calling:
                self.policy.attach(memory)
            self._machines = [*self._machines, memory]
            if self.stepping and self._step is not None and self._thread is None:
                self._stop = threading.Event()
                main = partial(self._main, self._step, self._stop)
                self._thread = threading.Thread(target=main, name=f"policy-{self.name}", daemon=True)
                self._thread.start()

    def detach(self, memory: MachineMemory) -> None:
        """Take a machine from the policy; its thread ends with the last. Nothing when it is not there."""
        with self._lock:
            if not any(one is memory for one in self._machines):
                return
            self._machines = [one for one in self._machines if one is not memory]
            if not self._machines and self._thread is not None:
                self._stop.set()
                self._thread.join()
                self._thread = None
            if self._detach is not None:
                with self._calling:
                    self._detach(memory)

    def _main(self, step: Callable[[], None], stop: threading.Event) -> None:
        while not stop.wait(float(getattr(self.policy, "interval", 1.0))):
            try:
                with self._calling:
                    step()
            except BaseException as error:  # a card's exception ends its machines, and is raised by wait()
                for memory in self._machines:
                    memory.fail(error)
                return


@frozen(eq=False)
class AttachedPolicy:
    """An entry of ``machine.policies``: what drives the policy, and the machine's memory as it sees it."""

    run: PolicyRun
    memory: MachineMemory

    @property
    def policy(self) -> Any:
        """The card's object."""
        return self.run.policy


def attach_policies(machine: Machine) -> None:
    """Attach what ``[policy]`` names. Raises ConfigError, CardError, or what a policy refuses with."""
    host = machine.host
    for kind, value in machine.config.policy.items():
        if kind == "admission":  # asked before the machine had memory
            continue
        for spec in specs_of(value, machine.config.place(f"policy.{kind}")):
            name, place = spec.name, spec.place
            offer = host.registry.get("policy", name, file=place.file, key=place.key)
            options = host.options(offer, spec.options, file=place.file, key=place.key)
            who = f'policy "{name}" (card {offer.card}, {offer.distribution})'

            def make(offer: Any = offer, options: Any = options, name: str = name, who: str = who) -> PolicyRun:
                factory = offer.load()
                return PolicyRun(factory(options) if options is not None else factory(), name, who)

            shared = offer.extra.get("shared", False)
            key = f"policy:{name}:{options!r}"
            run = blamed(who, place, partial(host.share, key, make) if shared else make)
            memory = MachineMemory(machine)
            blamed(who, place, partial(run.attach, memory))
            machine.policies.append(AttachedPolicy(run, memory))


def detach_policies(machine: Machine) -> None:
    """Take the machine from its policies, the last first; without the machine's lock. Idempotent."""
    policies, machine.policies = machine.policies, []
    for one in reversed(policies):
        try:
            one.run.detach(one.memory)
        except Exception as error:  # one card's fault must not keep the machine from giving back what it holds
            machine.log.error("detach failed", policy=one.run.name, error=repr(error))
        one.memory.release()
