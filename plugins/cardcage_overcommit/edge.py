"""The policy ``edge`` for when memory runs short, shared by all machines of a process that name it.

In this order, before the kernel's OOM killer has reason to act:

1. When the host or the nearest cgroup has less than ``low`` left, RAM is moved out (to swap, or to its file): from
   the machine with the lowest ``machine.priority`` first, then from the machine with most in memory.
2. The process has a soft limit of its own (``cgroup``): what its machines were promised and their VMMs. What it takes
   beyond that, it pays for itself.
3. If the kernel must end somebody, ``oom_score_adj`` makes it the process with the lowest priority, and its machines
   are named by the next ``cardcage stats``.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from attrs import field, frozen
from cardcage.security import Needs
from cardcage.units import Duration, Size, say_size
from cardcage_fleet.hostmemory import read_host_memory
from cardcage_fleet.oom import score, set_score

from cardcage_overcommit.group import enter

if TYPE_CHECKING:
    from cardcage_fleet.hostmemory import HostMemory
    from cardcage_memory_policies.memory import MachineMemory

    from cardcage_overcommit.group import OwnGroup

__all__ = ["Edge", "EdgeOptions"]

QUIET = 60.0
"""Seconds between two warnings of the same."""
STEP = 64 << 20
"""Bytes moved out of one machine before the next look at the host."""


@frozen
class EdgeOptions:
    """Options of policy ``edge``.

    Attributes:
        low: the host, and the nearest cgroup with a limit, shall have this left. interval: how often to look.
        cgroup: put the process into a cgroup of its own with a soft limit. overhead: what a VMM itself may take in it.
    """

    low: Size = field(default=Size("256M"))
    interval: Duration = field(default=Duration("1s"))
    cgroup: bool = True
    overhead: Size = field(default=Size("192M"))


class Edge:
    """The policy, shared by all machines of a host that name it with equal options."""

    def __init__(self, options: EdgeOptions | None = None) -> None:
        self.options = options or EdgeOptions()
        self.interval = float(self.options.interval)
        self.machines: list[MachineMemory] = []
        self._score: int | None = None
        self._group: OwnGroup | None = None
        self._warned = -QUIET

    def attach(self, memory: MachineMemory, /) -> None:
        memory.tell("reclaim", memory.cannot_reclaim)  # now: when memory runs short it is too late to add swap
        self.machines.append(memory)
        if len(self.machines) == 1:
            self._begin(memory)
        self._apply(memory)

    def needs(self) -> Needs:
        """The process's cgroup, which it leaves at the end, and its score."""
        groups = (self._group.folder, self._group.parent.folder) if self._group is not None else ()
        return Needs(write=("/proc/self/oom_score_adj", *map(str, groups)))

    def detach(self, memory: MachineMemory, /) -> None:
        self.machines = [one for one in self.machines if one is not memory]
        if self.machines:
            self._apply(memory)
            return
        if self._score is not None:
            set_score(self._score)
        if self._group is not None:
            try:
                self._group.leave()
            except OSError as error:
                memory.log.warning("the process stays in its cgroup", cgroup=str(self._group.folder), reason=str(error))
            self._group = None

    def _begin(self, memory: MachineMemory) -> None:
        self._score = score()
        if self.options.cgroup:
            try:
                self._group = enter()
            except OSError as error:
                memory.log.warning("no soft limit: the process gets no cgroup of its own", reason=str(error))

    def _apply(self, memory: MachineMemory) -> None:
        """The process is worth as much as its best machine, and was promised what all of them were."""
        wanted = -10 * max(one.priority for one in self.machines)
        if wanted and self._score is not None:
            wanted = max(-1000, min(1000, self._score + wanted))
            try:
                set_score(wanted)
            except PermissionError:
                memory.log.warning("oom_score_adj stays unchanged: lowering it needs CAP_SYS_RESOURCE", wanted=wanted)
        if self._group is not None:
            # More than the machines may come to have by what shall be left, or the limit itself would be the edge.
            self._group.limit(self.options.low + sum(one.size + self.options.overhead for one in self.machines))

    def step(self) -> None:
        host = read_host_memory()
        if host.headroom >= self.options.low:
            return
        wanted, gone = self.options.low - host.headroom, {}
        for memory in self.order():
            moved = 0
            while moved < wanted and (more := memory.reclaim(min(STEP, wanted - moved))):
                moved += more
            gone[memory.name] = moved
            wanted -= moved
            if wanted <= 0:
                break
        self._tell(host, gone, wanted)

    def order(self) -> list[MachineMemory]:
        """Who gives first: the lowest priority, then the most in memory."""
        return sorted(self.machines, key=lambda one: (one.priority, -one.resident))

    def _tell(self, host: HostMemory, gone: dict[str, int], short: int) -> None:
        if time.monotonic() - self._warned < QUIET:
            return
        self._warned = time.monotonic()
        where = f"cgroup {host.group}" if host.group and host.headroom < host.available else "the host"
        self.machines[0].log.warning(
            f"memory runs short: {where} has {say_size(host.headroom)} left",
            moved_out=", ".join(f"{name} {say_size(size)}" for name, size in gone.items() if size) or "nothing",
            still_short=say_size(max(0, short)),
        )
