"""A policy that can do nothing on this host: the log says so once, and why."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from cardcage.machine import Machine
from cardcage.memory import PhysicalMemory, RamBlock, RamRange
from cardcage.ram import Anonymous, Backing
from cardcage_balloon.policy import BalloonPolicy
from cardcage_fleet.hostmemory import HostMemory
from cardcage_memory_policies import MachineMemory, memory, policies_of, smaps
from cardcage_memory_policies.testing import TestMachine
from cardcage_overcommit import edge as edges

pytestmark = pytest.mark.usefixtures("runtime")
MIB = 1 << 20
IDLE = "memory policy: this host does not let it act"


class Keeps(Anonymous):
    """A back end whose memory is never given back."""

    def allocate(self, size: int, name: str, /) -> Backing:
        return evolve(super().allocate(size, name), discard=None)


class Large(Anonymous):
    """A back end whose memory goes back in units of 2 MiB."""

    def allocate(self, size: int, name: str, /) -> Backing:
        return evolve(super().allocate(size, name), page=2 * MIB)


@contextmanager
def stand_in(backend: Any = None, *, shared: bool = False) -> Iterator[TestMachine]:
    """A machine whose first 4 MiB of RAM are in use."""
    vm = TestMachine(16 * MIB, shared=shared)
    if backend is not None:
        vm.memory.close()
        vm.memory = PhysicalMemory()
        vm.memory.add(RamRange(0, 16 * MIB, RamBlock(16 * MIB, backend=backend)))
    vm.memory.write(0, b"x" * 4 * MIB)
    yield vm
    vm.close()


def told(vm: TestMachine) -> list[tuple[str, str]]:
    return [(values["verb"], values["reason"]) for _, event, values in vm.log.entries if event == IDLE]


def without_swap() -> str:
    reason = smaps.no_swap()
    if not reason:
        pytest.skip("needs a host, or a cgroup, without swap space")
    return reason


@pytest.mark.parametrize("shared", [False, True], ids=["anonymous", "memfd"])
def test_reclaim_without_swap_says_so_once(shared: bool) -> None:
    """RAM that has nowhere to go stays, by `reclaim` and by advice, and the log says once that there is no swap."""
    reason = without_swap()
    with stand_in(shared=shared) as vm:
        ram = MachineMemory(vm)  # type: ignore[arg-type]  # a stand-in
        assert ram.cannot_reclaim == reason
        assert [ram.reclaim(MIB) for _ in range(3)] == [0, 0, 0]
        ram.advise(memory.MADV_PAGEOUT)
        assert told(vm) == [("reclaim", reason)]


def test_machines_of_one_policy_say_it_once() -> None:
    """What was said for one machine is not said again for another of the same policy."""
    without_swap()
    said: set[str] = set()
    with stand_in() as first, stand_in() as second:
        for vm in (first, second):
            MachineMemory(vm, "edge", said).reclaim(MIB)  # type: ignore[arg-type]  # a stand-in
        assert (len(told(first)), told(second)) == (1, [])
        assert first.log.entries[0][2]["policy"] == "edge"


def test_memory_with_somewhere_to_go_is_not_told_of(tmp_path: Path) -> None:
    """A file on a disk takes RAM in; one on tmpfs does not, without swap."""
    keys: dict[str, Any] = {"platform": "none", "accel": ["tcg"], "memory": "4M"}

    def why(path: Path) -> str:
        with Machine(machine=keys, fragments=[{"memory": {"type": "file", "path": str(path)}}]) as vm:
            return MachineMemory(vm).cannot_reclaim

    assert why(tmp_path / "ram") == ""
    path = Path(f"/dev/shm/{tmp_path.name}")
    try:
        assert why(path) == smaps.no_swap()
    finally:
        path.unlink(missing_ok=True)


def test_locked_memory_is_told_of() -> None:
    """RAM that is locked stays, and that is the reason."""
    locked = pytest.importorskip("memory_card.locked", reason="pip install ./examples/memory-card").Locked
    with stand_in(locked()) as vm:
        ram = MachineMemory(vm)  # type: ignore[arg-type]  # a stand-in
        assert ram.cannot_reclaim == "it is locked in memory (mlock)"


@pytest.mark.parametrize(
    ("backend", "reason"),
    [(Keeps(), "the memory back end gives no pages back"), (Large(), "RAM is made of pages of 2048 KiB")],
)
def test_a_balloon_that_frees_nothing_is_told_of(backend: Any, reason: str, tmp_path: Path) -> None:
    """Where the host does not get back what a guest gives, the balloon policy says so when it takes the machine on."""
    with stand_in(backend) as vm:
        ram = MachineMemory(vm)  # type: ignore[arg-type]  # a stand-in
        policy = BalloonPolicy(folder=lambda: tmp_path, host=lambda: HostMemory(1 << 40, 1 << 40))
        policy.attach(ram)
        ram.set_target(8 * MIB)
        ((verb, said),) = told(vm)
        assert verb == "set_target"
        assert said.startswith(reason)
        policy.detach(ram)
    with stand_in() as vm:
        assert MachineMemory(vm).cannot_balloon == ""  # type: ignore[arg-type]  # a stand-in


def test_advice_that_the_kernel_does_not_take_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Advice that is refused everywhere is told of once, with the kernel's word; so are huge pages that are off."""
    monkeypatch.setattr(memory, "HARMLESS", memory.HARMLESS | {999})
    with stand_in() as vm:
        ram = MachineMemory(vm)  # type: ignore[arg-type]  # a stand-in
        assert [ram.advise(999) for _ in range(2)] == [0, 0]
        assert told(vm) == [("madvise(999)", "Invalid argument")]
        ram.advise(mmap.MADV_HUGEPAGE)
        assert len(told(vm)) == 1 + bool(smaps.no_huge_pages())


def test_the_edge_says_it_before_memory_runs_short(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A machine under `edge` on a host without swap is told of when it is built, once, and not again at the edge."""
    reason = without_swap()
    policy = {"memory": [{"type": "edge", "cgroup": False, "interval": "1h"}]}
    keys: dict[str, Any] = {"platform": "none", "accel": ["tcg"], "memory": "4M"}
    with Machine(machine=keys, fragments=[{"policy": policy}]) as vm:
        said = capfd.readouterr().err
        assert IDLE in said
        assert "policy=edge" in said
        assert reason in said
        vm.memory.write(0, b"x" * MIB)
        monkeypatch.setattr(edges, "read_host_memory", lambda: HostMemory(1 << 33, 0))
        policies_of(vm)[0].policy.step()
        assert IDLE not in capfd.readouterr().err
