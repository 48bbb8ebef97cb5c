"""``check_policy``: the contract of a memory policy, and a machine without vCPUs to test a policy with."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from cardcage.abilities import has, near_misses
from cardcage.memory import GuestMemoryReport, PhysicalMemory, RamBlock, RamRange
from cardcage.ram import Memfd
from cardcage.security import Mediator
from cardcage_testing.slot import TestLog

from cardcage_memory_policies.memory import MachineMemory
from cardcage_memory_policies.policy import POLICY, Stepping
from cardcage_memory_policies.run import PolicyRun
from cardcage_memory_policies.smaps import mappings

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["TestBalloon", "TestMachine", "check_policy"]

KSM = Path("/sys/kernel/mm/ksm")
SETTINGS = "run sleep_millisecs smart_scan use_zero_pages merge_across_nodes max_page_sharing advisor_mode"
WILD: tuple[dict[str, int], ...] = (
    {},
    {"available_memory": 0, "free_memory": 0, "disk_caches": 0, "total_memory": 0},
    {"available_memory": (1 << 64) - 1, "free_memory": (1 << 64) - 1, "total_memory": 1},
    {"major_faults": 5},
)
"""Nonsense that guests may report."""


class TestBalloon:
    """A guest's side of a balloon that does what it is asked at once, ``pace`` bytes a time.

    Attributes:
        live: whether the guest has a driver. used: bytes that its programs use. answers: whether it sends statistics.
        wild: what it says in place of the truth.
    """

    __test__ = False

    def __init__(self, ram: int, used: int, pace: int = 1 << 40) -> None:
        self.ram, self.used, self.pace = ram, used, pace
        self.live = self.answers = True
        self.size = self.target = 0
        self.report: GuestMemoryReport | None = None
        self.wild: dict[str, int] | None = None

    def resize(self, size: int, /) -> None:
        self.target = size
        self.settle()

    def settle(self) -> None:
        """Move towards the target, as far as memory that is free allows."""
        if self.live:
            room = max(0, self.ram - self.used - self.size)
            self.size += max(-self.pace, min(self.pace, room, self.target - self.size))

    def ask_statistics(self) -> None:
        self.settle()
        if self.live and self.answers:
            left = max(0, self.ram - self.size - self.used)
            said = {"available_memory": left, "free_memory": left, "disk_caches": 0, "total_memory": self.ram}
            self.report = GuestMemoryReport(time.monotonic(), said if self.wild is None else self.wild, self.size)


class TestMachine:
    """As much of a machine as :class:`~cardcage_memory_policies.memory.MachineMemory` needs, with real RAM and no vCPU.

    Args:
        size: bytes of RAM. shared: as a memfd. label: the security label. checkers: security checkers.
        priority: who has the lowest gives first.
        balloon: what ``add("virtio-balloon")`` plugs in; by default a :class:`TestBalloon` with half of the RAM in use.
    """

    __test__ = False

    def __init__(
        self,
        size: int = 16 << 20,
        *,
        name: str = "test",
        shared: bool = False,
        label: str = "machine",
        checkers: tuple[Any, ...] = (),
        balloon: Any = None,
        priority: int = 0,
    ) -> None:
        self.name, self.label, self.state = name, label, "running"
        self.log, self.lock, self.mediator = TestLog(), threading.RLock(), Mediator(checkers)
        self.memory = PhysicalMemory()
        self.memory.add(RamRange(0, size, RamBlock(size, backend=Memfd() if shared else None)))
        self.config = SimpleNamespace(machine=SimpleNamespace(memory=size, priority=priority))
        self.loop = SimpleNamespace(call_soon=self._soon)
        self.device = balloon or TestBalloon(size, size // 2)
        self.services: dict[str, Any] = {}
        self.failure: BaseException | None = None
        self._late: list[Callable[[], None]] = []

    def _soon(self, act: Callable[[], None]) -> None:
        self._late.append(act)

    def run_soon(self) -> None:
        """Do what was asked of the loop thread."""
        while self._late:
            self._late.pop(0)()

    def add(self, type: str, /, **keys: Any) -> Any:
        """Plug the balloon in, whatever it is called."""
        self.services["balloon"] = self.device
        return SimpleNamespace(id=type, device=self.device)

    def fail(self, error: BaseException) -> None:
        self.failure = error

    def close(self) -> None:
        self.memory.close()


def check_policy(
    factory: Callable[[], Any], *, size: int = 16 << 20, machine: Callable[..., TestMachine] = TestMachine
) -> None:
    """Hold a memory policy to the contract; raises AssertionError with what it broke.

    Args:
        factory: makes a policy. size: bytes of RAM of a test machine. machine: makes it from ``size`` and ``name``.

    The contract: methods have the agreed signatures. Any number of machines come and go. What guests say may be
    missing, old or nonsense. ``step`` returns while somebody holds a machine's lock. RAM reads as it did. After
    ``detach`` of a machine that goes on, its balloon is asked for nothing, its mappings have the flags they had, and
    ksmd its settings; no thread is left. ``detach`` of a stopped machine works too.
    """
    settings, threads = _ksm(), set(threading.enumerate())
    policy = factory()
    who = type(policy).__name__
    run = PolicyRun(policy, "test", who)
    misses = near_misses(policy, POLICY)
    assert not misses, f"{who}: {'; '.join(misses)}"
    run.stepping = False  # steps are taken here, one by one
    made = [machine(size, name=f"test{at}") for at in range(3)]
    memories = [MachineMemory(one) for one in made]  # type: ignore[arg-type]  # stand-ins for a Machine
    flags = _flags(memories)
    for one in made:
        one.memory.write(0, one.name.encode() * 1000)
    before = [one.memory.read(0, size) for one in made]
    try:
        for memory in memories[:2]:
            run.attach(memory)
        _steps(run, made, who)
        run.attach(memories[2])
        run.detach(memories[0])
        run.detach(memories[0])  # once is enough
        _steps(run, made, who)
        made[2].state = "stopped"
        for memory in memories[1:]:
            run.detach(memory)
        for one, memory, text in zip(made, memories, before, strict=True):
            one.run_soon()
            assert one.memory.read(0, size) == text, f"{who}: the guest's memory reads differently now"
            target = getattr(one.services.get("balloon"), "target", 0)
            assert memory.ending or not target, f"{who}: after detach the balloon of {one.name} is asked for {target}"
            assert one.failure is None, f"{who}: {one.name} failed: {one.failure!r}"
        assert _flags(memories[:2]) == flags[:2], f"{who}: after detach the RAM is mapped with other flags than before"
        assert _ksm() == settings, f"{who}: after detach ksmd has other settings than before"
        left = {one.name for one in threading.enumerate()} - {one.name for one in threads}
        assert not left, f"{who}: after detach threads are left: {sorted(left)}"
    finally:
        for memory, one in zip(memories, made, strict=True):
            run.detach(memory)
            memory.release()
            one.close()


def _steps(run: PolicyRun, machines: list[TestMachine], who: str) -> None:
    """Some steps with cooperative guests, wild ones, silent ones, paused ones, and locks that are held."""
    if not has(run.policy, Stepping):
        return
    step = run.policy.step
    moods: list[Callable[[TestBalloon], None]] = [lambda one: None, lambda one: None]
    moods += [lambda one, said=said: setattr(one, "wild", said) for said in WILD]  # type: ignore[misc]  # a default argument
    moods += [lambda one: setattr(one, "answers", False), lambda one: setattr(one, "live", False)]
    for at, mood in enumerate(moods):
        for one in machines:
            one.state = "paused" if at % 3 == 2 else "running"
            if isinstance(balloon := one.services.get("balloon"), TestBalloon):
                mood(balloon)
        _bounded(step, machines, who)
        for one in machines:
            one.run_soon()
    for one in machines:
        one.state = "running"
        one.device.live = one.device.answers = True
        one.device.wild = None


def _bounded(step: Callable[[], None], machines: list[TestMachine], who: str) -> None:
    problem: list[BaseException] = []

    def guarded() -> None:
        try:
            step()
        except BaseException as error:  # the policy's: told as what broke the contract
            problem.append(error)

    for one in machines:
        one.lock.acquire()
    try:
        thread = threading.Thread(target=guarded, name="check-policy-step", daemon=True)
        thread.start()
        thread.join(30)
        assert not thread.is_alive(), f"{who}: step() waits for a machine's lock, or for longer than 30 s"
    finally:
        for one in machines:
            one.lock.release()
    if problem:
        raise AssertionError(f"{who}: step() raised {problem[0]!r}") from problem[0]


def _flags(memories: list[MachineMemory]) -> list[set[str]]:
    """Flags of the mappings that each machine's RAM is made of."""
    there = list(mappings())

    def within(start: int, size: int) -> set[str]:
        return {flag for one in there if start < one.end and one.start < start + size for flag in one.flags}

    return [set().union(*(within(start, size) for start, size in memory.areas)) for memory in memories]


def _ksm() -> dict[str, str]:
    return {name: (KSM / name).read_text() for name in SETTINGS.split() if (KSM / name).exists()}
