"""Memory policies: what they are given, their verbs, their thread, and the public contract."""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path
from typing import Any

import cardcage_memory_policies
import pytest
from attrs import field, frozen
from cardcage.errors import CardError, ConfigError, Denied, HostError, StateError, UsageError
from cardcage.hookspecs import hookimpl
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage.registry import Registry
from cardcage.security import Act
from cardcage_fleet.hostmemory import HostMemory, read_host_memory
from cardcage_memory_policies import MachineMemory, PolicyOffer, mappings
from cardcage_memory_policies.memory import MADV_COLD, MADV_PAGEOUT
from cardcage_memory_policies.run import detach_policies
from cardcage_memory_policies.smaps import cannot_merge
from cardcage_memory_policies.testing import TestBalloon, TestMachine, check_policy
from leftovers import Leftovers
from scripted import Scripted

MIB = 1 << 20


class Walker:
    """A policy that notes what happens."""

    interval = 0.001

    def __init__(self) -> None:
        self.machines: list[MachineMemory] = []
        self.calls: list[str] = []
        self.stepped = threading.Event()
        self.error: Exception | None = None

    def attach(self, memory: MachineMemory) -> None:
        if memory.name == "refused":
            raise ConfigError("no place for this one")
        self.machines.append(memory)
        self.calls.append(f"attach {memory.name}")

    def detach(self, memory: MachineMemory) -> None:
        self.calls.append(f"detach {memory.name} {memory.ending}")

    def step(self) -> None:
        self.stepped.set()
        if self.error is not None:
            raise self.error


class WrongSignature:
    def attach(self) -> None: ...


@frozen
class Cards:
    """One policy for each machine, one for all, and one with a mistake."""

    made: list[Walker] = field(factory=list)

    def make(self) -> Walker:
        self.made.append(Walker())
        return self.made[-1]

    @hookimpl
    def cardcage_register(self, registry: Registry) -> None:
        registry.add(PolicyOffer("own", self.make))
        registry.add(PolicyOffer("shared", self.make, shared=True))
        registry.add(PolicyOffer("wrong", WrongSignature))


def machine(host: Host, name: str, *policies: str) -> Machine:
    keys: dict[str, Any] = {"name": name, "platform": "none", "accel": ["scripted"], "memory": "2M"}
    return Machine(host=host, machine=keys, fragments=[{"policy": {"memory": list(policies)}}])


def hosted() -> tuple[Host, Cards]:
    cards = Cards()
    return Host([Scripted(), cardcage_memory_policies, cards], installed=False), cards


def test_a_policy_is_one_machines_or_all_machines() -> None:
    """By default each machine has a policy of its own; a shared one hears of each machine's coming and going."""
    host, cards = hosted()
    with machine(host, "a", "own", "shared"):
        with machine(host, "b", "own", "shared"):
            assert len(cards.made) == 3
        assert cards.made[1].calls == ["attach a", "attach b", "detach b True"]
        assert cards.made[2].calls == ["attach b", "detach b True"]
    assert cards.made[1].calls[-1] == "detach a True"


def test_steps_are_on_a_thread_of_their_own_until_the_last_machine() -> None:
    """``step`` is called again and again while the machine's lock is held elsewhere, and never after the end."""
    host, cards = hosted()
    left = Leftovers()
    with machine(host, "a", "shared") as vm, vm.lock:
        assert cards.made[0].stepped.wait(30)
        cards.made[0].stepped.clear()
        assert cards.made[0].stepped.wait(30)
    assert left.threads() == []
    with machine(host, "b", "shared"):
        cards.made[0].stepped.clear()
        assert cards.made[0].stepped.wait(30)
    assert left.threads() == []


def test_an_exception_in_step_ends_its_machines() -> None:
    """What ``step`` raises is raised by ``wait()`` of each machine of that policy."""
    host, cards = hosted()
    with machine(host, "a", "shared") as a, machine(host, "b", "shared") as b:
        for vm in (a, b):
            vm.start()
        cards.made[0].error = ZeroDivisionError("a card's bug")
        for vm in (a, b):
            with pytest.raises(ZeroDivisionError, match="a card's bug"):
                vm.wait()


def test_a_policy_refuses_and_a_wrong_one_is_named() -> None:
    """What ``attach`` raises gets its place; a wrong signature names the card; no thread or machine is left."""
    host, _ = hosted()
    left = Leftovers()
    with pytest.raises(ConfigError, match=r"policy.memory\[0\]: no place for this one"):
        machine(host, "refused", "own")
    with pytest.raises(CardError, match=r'policy "wrong" \(card Cards, given to Host\): attach'):
        machine(host, "a", "wrong")
    assert left.threads() == []
    assert not host.machines


def test_detach_of_a_machine_that_goes_on() -> None:
    """Policies can be taken from a machine that runs; it is told that the memory stays."""
    host, cards = hosted()
    with machine(host, "a", "own") as vm:
        vm.start()
        detach_policies(vm)
        assert cards.made[0].calls == ["attach a", "detach a False"]
        with pytest.raises(StateError, match="has no balloon device"):
            cards.made[0].machines[0].set_target(1)
    assert len(cards.made[0].calls) == 2


def memory_of(vm: TestMachine) -> MachineMemory:
    return MachineMemory(vm)  # type: ignore[arg-type]  # a stand-in for a Machine


def test_resident_counts_what_was_touched() -> None:
    """``resident`` is the bytes of RAM that are in memory, and 0 once the memory is gone."""
    vm = TestMachine(256 * MIB)
    memory = memory_of(vm)
    assert memory.resident == 0
    vm.memory.write(100 * MIB, b"x" * MIB)
    assert MIB <= memory.resident <= 4 * MIB
    memory.release()
    assert memory.resident == 0
    vm.close()


def test_advice_is_only_what_leaves_memory_as_it_is() -> None:
    """Advice that changes what the guest reads, or merges, is refused, and so is memory that is not the machine's."""
    vm = TestMachine(16 * MIB)
    memory = memory_of(vm)
    vm.memory.write(0, b"kept" * 4096)
    assert memory.advise(MADV_COLD) == 16 * MIB
    ((start, size),) = memory.areas
    assert memory.advise(MADV_PAGEOUT, [(start + 4096, 8192)]) == 8192
    for wrong in (mmap.MADV_DONTNEED, mmap.MADV_FREE, mmap.MADV_REMOVE, mmap.MADV_MERGEABLE, mmap.MADV_DOFORK, 999):
        with pytest.raises(UsageError, match=f"advice {wrong} is not for a policy"):
            memory.advise(wrong)
    for area in ((start - 4096, 8192), (start + size, 4096), (start + 1, 4096), (0, 4096), (start, -4096)):
        with pytest.raises(UsageError, match="is not RAM of test in whole pages"):
            memory.advise(MADV_COLD, [area])
    assert vm.memory.read(0, 16384) == b"kept" * 4096
    memory.release()
    assert memory.advise(MADV_COLD) == 0
    vm.close()


def test_reclaim_says_what_left() -> None:
    """``reclaim`` says how much left, which is nothing where there is nowhere to move it; memory reads as before."""
    vm = TestMachine(16 * MIB)
    memory = memory_of(vm)
    vm.memory.write(0, b"x" * 16 * MIB)
    swap = len(Path("/proc/swaps").read_text().splitlines()) > 1
    moved = memory.reclaim(8 * MIB)
    assert moved >= 4 * MIB if swap else moved == 0
    assert vm.memory.read(0, 16 * MIB) == b"x" * 16 * MIB
    vm.close()


def test_reclaim_moves_memory_to_its_file(tmp_path: Path) -> None:
    """RAM with a file behind it leaves the host's memory, about as much as asked for, and reads as before."""
    memory_table = {"type": "file", "path": str(tmp_path / "ram")}
    keys: dict[str, Any] = {"platform": "none", "accel": ["tcg"], "memory": "32M"}
    with Machine(machine=keys, fragments=[{"memory": memory_table}]) as vm:
        memory = MachineMemory(vm)
        vm.memory.write(MIB, data := os.urandom(MIB) + b"x" * 30 * MIB)
        before = memory.resident
        first = memory.reclaim(8 * MIB)
        assert first >= 8 * MIB
        assert memory.resident <= before - first + MIB
        assert memory.reclaim(32 * MIB) >= 16 * MIB
        assert vm.memory.read(MIB, len(data)) == data


def merging(memory: MachineMemory) -> bool:
    (start, _), *_ = memory.areas
    return any("mg" in one.flags for one in mappings() if one.start <= start < one.end)


def test_merging_is_marked_and_taken_back() -> None:
    """``merge`` marks private memory for ksmd, and ``merge(False)`` takes it back."""
    vm = TestMachine()
    memory = memory_of(vm)
    memory.merge()
    assert merging(memory)
    memory.merge(False)
    assert not merging(memory)
    vm.close()


def test_shared_memory_is_not_merged() -> None:
    """Memory that other processes map is refused with the reason, as is what is not mapped."""
    vm = TestMachine(shared=True)
    with pytest.raises(HostError, match=r"test: RAM cannot be merged: it is shared"):
        memory_of(vm).merge()
    vm.close()
    assert cannot_merge(0) == "it is not mapped"


def test_merging_asks_the_checkers() -> None:
    """Before memory is merged the checkers are asked with the label of those it would be merged with."""
    asked: list[Act] = []

    class Checker:
        def check(self, act: Act, /) -> None:
            asked.append(act)
            if act.target == "secret":
                raise Denied("not with that one")

    vm = TestMachine(label="mine", checkers=(Checker(),))
    memory = memory_of(vm)
    assert memory.labelled
    memory.merge()
    memory.merge(False)
    with pytest.raises(Denied, match="not with that one"):
        memory.merge(target="secret")
    assert not merging(memory)
    assert asked == [Act("mine", "mine", "memory", ("merge",)), Act("mine", "secret", "memory", ("merge",))]
    vm.close()


def test_targets_reach_the_balloon_on_the_loop_thread() -> None:
    """A target is what the guest keeps; it is bounded by the RAM's size, and needs a balloon."""
    vm = TestMachine(16 * MIB)
    memory = memory_of(vm)
    with pytest.raises(StateError, match="test: has no balloon device"):
        memory.set_target(MIB)
    memory.add("virtio-balloon")
    assert isinstance(memory.balloon, TestBalloon)
    for wrong in (-1, 16 * MIB + 1):
        with pytest.raises(UsageError, match="expected 0 to"):
            memory.set_target(wrong)
    memory.set_target(12 * MIB)
    assert memory.balloon.size == 0
    vm.run_soon()
    assert memory.balloon.size == 4 * MIB
    memory.ask_statistics()
    vm.run_soon()
    assert memory.balloon.report is not None
    assert memory.balloon.report.values["available_memory"] == 4 * MIB
    vm.close()


def test_check_policy_finds_mistakes() -> None:
    """The public contract passes a decent policy, and names what others break."""

    class Base:
        def __init__(self) -> None:
            self.machines: list[MachineMemory] = []

        def attach(self, memory: MachineMemory) -> None:
            memory.add("virtio-balloon")
            self.machines.append(memory)

        def detach(self, memory: MachineMemory) -> None:
            memory.set_target(memory.size)
            self.machines.remove(memory)

        def step(self) -> None:
            for memory in self.machines:
                memory.set_target(memory.size // 2)

    class Leaves(Base):
        def detach(self, memory: MachineMemory) -> None:
            self.machines.remove(memory)

    class Trusts(Base):
        def step(self) -> None:
            for memory in self.machines:
                memory.ask_statistics()
                if memory.balloon and memory.balloon.report:
                    memory.set_target(memory.size - memory.balloon.report.values["available_memory"])

    class Marks(Base):
        def attach(self, memory: MachineMemory) -> None:
            super().attach(memory)
            memory.merge()

    check_policy(Base)
    for broken, problem in (
        (Leaves, "after detach the balloon of test0 is asked for"),
        (Trusts, "step() raised"),
        (Marks, "after detach the RAM is mapped with other flags"),
    ):
        with pytest.raises(AssertionError, match=problem.replace("(", r"\(").replace(")", r"\)")):
            check_policy(broken)


def test_the_host_is_read() -> None:
    """What this host says about its memory is consistent."""
    host = read_host_memory()
    assert 0 < host.available <= host.total
    assert host.headroom <= host.available
    assert 0 <= host.full <= host.some <= 100 or host.full <= 100


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


MEMINFO = {
    "proc/meminfo": "MemTotal: 1000 kB\nMemFree: 5 kB\nMemAvailable:  800 kB\nSwapFree: 1 kB\nHugePages_Total: 0\n"
}


def test_a_v1_limit_is_found(tmp_path: Path) -> None:
    """The nearest limit of cgroup v1 counts, wherever the hierarchy is mounted, and file pages in it can be dropped."""
    write(tmp_path, MEMINFO)
    write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory,hugetlb:/outer/a/b\n1:cpu:/x\n0::/\n",
            "proc/self/mountinfo": "30 24 0:26 /outer /mnt/mem rw - cgroup cgroup rw,memory,hugetlb\n",
            "mnt/mem/a/b/memory.limit_in_bytes": "9223372036854771712\n",
            "mnt/mem/a/b/memory.usage_in_bytes": "1\n",
            "mnt/mem/a/memory.limit_in_bytes": "400000\n",
            "mnt/mem/a/memory.usage_in_bytes": "390000\n",
            "mnt/mem/a/memory.stat": "inactive_file 1\ntotal_inactive_file 10000\ntotal_active_file 500\n",
            "mnt/mem/memory.limit_in_bytes": "500000\n",
            "mnt/mem/memory.usage_in_bytes": "391000\n",
            "proc/pressure/memory": "some avg10=1.50 avg60=0 total=9\nfull avg10=0.25 avg60=0 total=3\n",
        },
    )
    host = read_host_memory(tmp_path)
    assert host == HostMemory(1024000, 819200, 1024, "/outer/a", 400000, 390000, 10500, 1.5, 0.25)
    assert host.headroom == 20500


def test_a_v2_limit_is_found(tmp_path: Path) -> None:
    """cgroup v2: the lesser of memory.max and memory.high, and the group's own pressure."""
    write(tmp_path, MEMINFO)
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/vms\n",
            "proc/self/mountinfo": "30 24 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n",
            "sys/fs/cgroup/vms/memory.max": "max\n",
            "sys/fs/cgroup/vms/memory.high": "300000\n",
            "sys/fs/cgroup/vms/memory.current": "310000\n",
            "sys/fs/cgroup/vms/memory.pressure": "some avg10=12.00 avg60=0 avg300=0 total=9\n",
            "proc/pressure/memory": "some avg10=1.50 avg60=0 avg300=0 total=9\n",
        },
    )
    host = read_host_memory(tmp_path)
    assert (host.group, host.limit, host.some, host.headroom) == ("/vms", 300000, 12.0, -10000)


def test_a_host_without_limits(tmp_path: Path) -> None:
    """Without a cgroup or pressure information the host's own figures count; without /proc it is an error."""
    write(tmp_path, MEMINFO)
    assert read_host_memory(tmp_path) == HostMemory(1024000, 819200, 1024)
    with pytest.raises(HostError, match="memory policies need it"):
        read_host_memory(tmp_path / "none")
