"""The policy: looks at guests, host and board, plans, and sets the targets of this process's machines."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from attrs import define, field, frozen
from attrs.validators import ge, gt, le
from cardcage.errors import Denied, HostError
from cardcage.security import Needs
from cardcage.units import Duration, Size
from cardcage_fleet.hostmemory import read_host_memory
from cardcage_fleet.rundir import run_directory

from cardcage_balloon.board import Board, Entry
from cardcage_balloon.plan import MIB, Rules, Seen, plan

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cardcage_fleet.hostmemory import HostMemory
    from cardcage_memory_policies.memory import MachineMemory

__all__ = ["BalloonOptions", "BalloonPolicy"]

QUIET = 60.0
"""Seconds without a shortage, after which the next is told of again."""
HURRY = 0.25
"""Seconds between steps while a guest is short of what it needs."""


@frozen
class BalloonOptions:
    """Options of the policy ``balloon``.

    Attributes:
        floor: a machine always keeps this much (or its size, where that is less).
        reserve: what the host, or the cgroup, shall have left.
        margin: part of its size that a guest shall have available, 0 to 0.9. spare: the same in bytes, at least.
        shrink, grow: how fast a target moves, bytes in a second.
        band: differences that are not worth a move.
        pressure: per cent of the time in which tasks wait for memory (PSI, 10 s), from which on guests get no more than
            they need; at half of it this begins.
        interval: time between steps; a quarter of a second while a guest is short of what it needs.
        patience: how long a guest may not answer, or not give, until it is reported and counted as it is; one without a
            driver has ten times that to boot.
    """

    floor: Size = field(default=Size("64M"))
    reserve: Size = field(default=Size("256M"))
    margin: float = field(default=0.08, validator=[ge(0.0), le(0.9)])
    spare: Size = field(default=Size("48M"))
    shrink: Size = field(default=Size("256M"), validator=ge(Size("1M")))
    grow: Size = field(default=Size("1G"), validator=ge(Size("1M")))
    band: Size = field(default=Size("16M"), validator=ge(Size(1)))
    pressure: float = field(default=20.0, validator=[gt(0.0), le(100.0)])
    interval: Duration = field(default=Duration("1s"), validator=ge(Duration(0.1)))
    patience: Duration = field(default=Duration("15s"), validator=ge(Duration(1)))


@define(eq=False)
class Watched:
    """One machine, and since when it has not done what it was asked."""

    memory: MachineMemory
    floor: int
    target: int
    since: float
    reported: str = ""

    @property
    def kept(self) -> int:
        """Memory that the guest has not given, by its own account."""
        balloon = self.memory.balloon
        return max(0, self.memory.size - (balloon.size if balloon is not None else 0))


class BalloonPolicy:
    """One for all machines of a host; processes of one account plan together.

    Args:
        options: see :class:`BalloonOptions`.
        folder, host, clock: where the board is, how the host is looked at, and the time; tests bring their own.
    """

    def __init__(
        self,
        options: BalloonOptions | None = None,
        *,
        folder: Callable[[], Path] = lambda: run_directory("balloon"),
        host: Callable[[], HostMemory] = read_host_memory,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.options = options or BalloonOptions()
        self.interval = float(self.options.interval)
        self._folder, self._host, self._clock = folder, host, clock
        self._watched: list[Watched] = []
        self._board: Board | None = None
        self._before: float | None = None
        self._short: float | None = None

    def attach(self, memory: MachineMemory) -> None:
        """Take the machine on; a balloon is added where it has none."""
        self._host()  # what cannot be read is said now
        if memory.balloon is None:
            memory.add("virtio-balloon")
        memory.set_target(memory.size)  # a security policy that forbids it says so now
        memory.tell("set_target", memory.cannot_balloon)
        if self._board is None:
            try:
                self._board = Board(self._folder())
            except (HostError, OSError) as error:
                memory.log.info("balloon: plans without the machines of other processes", reason=str(error))
        self._watched.append(Watched(memory, min(self.options.floor, memory.size), memory.size, self._clock()))

    def needs(self) -> Needs:
        """The board, on which each process writes."""
        return Needs(write=(str(self._folder()),)) if self._board is not None else Needs()

    def detach(self, memory: MachineMemory) -> None:
        """Let the guest have all its memory again."""
        self._watched = [one for one in self._watched if one.memory is not memory]
        if not memory.ending:
            memory.set_target(memory.size)
        if not self._watched and self._board is not None:
            self._board.close()
            self._board = None

    def step(self) -> None:
        """Look, plan, act."""
        now = self._clock()
        seconds = min(now - self._before, 5.0) if self._before is not None else self.interval
        self._before = now
        host = self._host()
        ours = [Entry(one.memory.name, self._look(one, now), one.memory.resident) for one in self._watched]
        others: list[Entry] = []
        if self._board is not None:
            self._board.write(host.group, ours)
            others = self._board.others(host.group)
        every = [*ours, *others]
        budget = sum(one.resident for one in every) + host.headroom - self.options.reserve
        made = plan(self._rules(), [one.seen for one in every], budget, seconds, self._surplus(host))
        self._say_short(made.short, host, now)
        for one, entry, target in zip(self._watched, ours, made.targets, strict=False):
            if entry.seen.steered and target != one.target:
                self._set(one, target)
            if one.memory.balloon is not None and one.memory.state == "running":
                one.memory.ask_statistics()
        hungry = any(one.seen.steered and one.seen.target - one.seen.used < self._least(one.seen) for one in ours)
        self.interval = min(HURRY, self.options.interval) if hungry else float(self.options.interval)

    def _set(self, one: Watched, target: int) -> None:
        try:
            one.memory.set_target(target)
            one.target = target
        except Denied as error:  # a security policy that changed: the machine keeps what it has
            self._say(one, str(error))

    def _rules(self) -> Rules:
        options = self.options
        least = min(24 * MIB, options.spare)
        return Rules(options.margin, options.spare, least, options.shrink, options.grow, options.band)

    def _least(self, seen: Seen) -> int:
        return max(self.options.spare, int(seen.size * self.options.margin)) // 2

    def _surplus(self, host: HostMemory) -> float:
        half = self.options.pressure / 2
        return min(1.0, max(0.0, (self.options.pressure - host.some) / half))

    def _say_short(self, short: int, host: HostMemory, now: float) -> None:
        """One line, and no other until there was enough for a minute."""
        if short > self.options.band:
            if self._short is None and self._watched:
                where = f"cgroup {host.group}" if host.group else "the host"
                log = self._watched[0].memory.log
                log.warning("balloon: guests need more than there is", where=where, short=f"{short >> 20} MiB")
            self._short = now
        elif self._short is not None and now - self._short > QUIET:
            self._short = None

    # one machine

    def _look(self, one: Watched, now: float) -> Seen:
        """The machine as it is now; one that does not cooperate is told of once and counted as it is."""
        memory, balloon = one.memory, one.memory.balloon
        resident, kept = memory.resident, one.kept
        if memory.state != "running" or balloon is None:
            one.since = now
            return Seen(
                memory.size, one.floor, max(kept, resident), one.target, steered=False, priority=memory.priority
            )
        problem, patience = self._problem(one, resident, now)
        if not problem:
            self._say(one, "")
            one.since = now
        elif now - one.since >= patience:
            self._say(one, problem)
            return Seen(
                memory.size, one.floor, max(kept, resident), one.target, steered=False, priority=memory.priority
            )
        report = balloon.report
        available = report.values.get("available_memory") if report is not None else None
        if not balloon.live or report is None or available is None:
            # Still booting: what it has touched, and what it may touch until the next steps.
            booting = min(memory.size, max(one.floor, resident + 64 * MIB))
            return Seen(memory.size, one.floor, booting, one.target, steered=False, priority=memory.priority)
        used = max(0, memory.size - report.ballooned - min(available, memory.size))
        return Seen(memory.size, one.floor, max(kept, resident), one.target, used, priority=memory.priority)

    def _problem(self, one: Watched, resident: int, now: float) -> tuple[str, float]:
        """Return the guest's failure to cooperate and how long it may last; empty when it cooperates."""
        balloon, options = one.memory.balloon, self.options
        if balloon is None or not balloon.live:
            return "it has no balloon driver", 10 * options.patience
        report = balloon.report
        if report is None or now - report.at > options.patience:
            return "it sends no statistics", options.patience
        if "available_memory" not in report.values:
            return "its statistics do not say what is available", options.patience
        if resident > one.kept + 4 * options.band:
            return "it uses memory that it says it has given", options.patience
        available = min(report.values["available_memory"], one.memory.size)
        if one.kept > one.target + options.band and available > options.spare:
            return "it does not give memory that it has available", options.patience
        return "", 0.0

    def _say(self, one: Watched, problem: str) -> None:
        if problem and not one.reported:
            one.memory.log.warning("balloon: the guest does not cooperate, its memory counts as used", reason=problem)
        elif one.reported and not problem:
            one.memory.log.info("balloon: the guest cooperates again")
        one.reported = problem
