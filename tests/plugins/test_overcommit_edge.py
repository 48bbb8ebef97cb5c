"""Admission and the edge: numbers, two processes at once, priorities, cgroups, and the kernel's OOM killer for real."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cardcage.errors import ConfigError, HostError
from cardcage.machine import Machine
from cardcage.units import Size
from cardcage_cli import main
from cardcage_fleet import stats_of
from cardcage_fleet.admission import Room, Starter, rooms_of
from cardcage_fleet.hostmemory import HostMemory, MemoryGroup, MemoryLimit, memory_group, memory_limits
from cardcage_fleet.membership import record_of
from cardcage_fleet.oom import score
from cardcage_fleet.roster import Roster, RosterEntry
from cardcage_fleet.testing import check_admission
from cardcage_memory_policies import MachineMemory, policies_of
from cardcage_memory_policies.testing import TestMachine, check_policy
from cardcage_overcommit import edge as edges
from cardcage_overcommit.admission import Open, Ratio, RatioOptions, Strict, StrictOptions
from cardcage_overcommit.edge import Edge, EdgeOptions
from cardcage_overcommit.group import enter
from cardcage_testing import check_memory_backend
from hypothesis import given
from hypothesis import strategies as st

MIB, GIB = 1 << 20, 1 << 30
CGROUP = Path("/sys/fs/cgroup/memory")

PROGRAM = """
import sys
from cardcage.errors import ConfigError
from cardcage.machine import Machine
table = {"machine": {"accel": ["tcg"], "platform": "none", **eval(sys.argv[1])}, "policy": eval(sys.argv[2])}
print("ready", flush=True)
sys.stdin.readline()
try:
    vm = Machine(fragments=[table])
except ConfigError as error:
    print(error, flush=True)
    sys.exit(2)
with vm:
    print("built", flush=True)
    for line in sys.stdin:
        for at in range(int(line)):
            vm.memory.write((1 + at) << 20, b"x" * (1 << 20))
        print("done", flush=True)
"""


pytestmark = [pytest.mark.usefixtures("runtime"), pytest.mark.xdist_group("host"), pytest.mark.once]


@pytest.fixture
def group() -> Iterator[Path]:
    """A real memory cgroup (v1), removed afterwards."""
    if os.geteuid() or not (CGROUP / "memory.limit_in_bytes").exists():
        pytest.skip("needs root and a cgroup v1 memory hierarchy")
    made = CGROUP / f"cardcage-test-{os.getpid()}"
    made.mkdir()
    yield made
    made.rmdir()


class Far:
    """A machine in a process of its own, in a cgroup."""

    def __init__(self, group: Path, machine: dict[str, Any], policy: dict[str, Any]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, repr(machine), repr(policy)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())) and None,
        )
        assert self.hear() == "ready"

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip()

    def say(self, line: str = "") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def end(self) -> int:
        assert self.process.stdout is not None
        self.process.communicate()
        return self.process.returncode


def room(size: int, *, machines: int = 0, promised: int = 0, free: int | None = None) -> Room:
    return Room(MemoryLimit("the host", "", size, size if free is None else free), machines, promised)


def strict(**options: int) -> Strict:
    return Strict(StrictOptions(**{name: Size(value) for name, value in options.items()}))


# who may start


@pytest.mark.parametrize(
    "make", [lambda: Strict(StrictOptions()), lambda: Ratio(RatioOptions()), Open], ids=["strict", "ratio", "none"]
)
def test_admissions_keep_the_contract(make: Any) -> None:
    """Each admission policy passes the public contract."""
    check_admission(make)


def test_a_card_of_another_distribution_keeps_the_contracts() -> None:
    """The example distribution's memory back end and admission policy pass the contracts and serve a machine."""
    pytest.importorskip("memory_card", reason="pip install ./examples/memory-card")
    from memory_card.count import Count, CountOptions
    from memory_card.locked import Locked

    check_admission(lambda: Count(CountOptions()))
    check_memory_backend(Locked)
    table = {"machine": {"memory": "2M", "platform": "none", "accel": ["tcg"]}, "memory": {"type": "locked"}}
    fragments: list[dict[str, Any]] = [table, {"policy": {"admission": {"type": "count", "most": 1}}}]
    with Machine(fragments=fragments), pytest.raises(ConfigError, match=r"policy\.admission: .*has 1 machines already"):
        Machine(fragments=fragments)


def test_the_check_finds_a_policy_that_breaks_the_contract() -> None:
    """check_admission names a refusal that is no ConfigError, one that names no machine, and a verdict that changes."""

    class Wrong:
        def admit(self, request: Starter, rooms: tuple[Room, ...], /) -> None:
            raise error

    error: Exception = HostError("lab")
    with pytest.raises(AssertionError, match="a refusal is a ConfigError"):
        check_admission(Wrong)
    error = ConfigError("no")
    with pytest.raises(AssertionError, match="does not name"):
        check_admission(Wrong)
    turns = iter(range(10**6))

    class Moody:
        def admit(self, request: Starter, rooms: tuple[Room, ...], /) -> None:
            if next(turns) % 7 == 0:
                raise ConfigError(request.name)

    with pytest.raises(AssertionError, match="a different answer from before"):
        check_admission(Moody)


@given(
    st.integers(0, 100),
    st.integers(0, 100),
    st.integers(0, 40),
    st.sampled_from([0.5, 1.0, 1.5, 3.0]),
    st.integers(0, 10),
)
def test_the_sum_decides(total: int, promised: int, size: int, ratio: float, reserve: int) -> None:
    """A machine is let in exactly when the promises, with it and all overheads, stay within ratio times the rest."""
    options = RatioOptions(ratio, Size(reserve * MIB), Size(MIB), Size(0))
    fits = promised + 3 + size + 1 <= max(0, total - reserve) * ratio and total >= 1
    try:
        Ratio(options).admit(Starter("lab", size * MIB), (room(total * MIB, machines=3, promised=promised * MIB),))
        assert fits
    except ConfigError:
        assert not fits


def test_a_refusal_has_the_numbers() -> None:
    """The line says what is wanted, what there is, what is kept, promised and left, and where."""
    with pytest.raises(ConfigError) as caught:
        strict(reserve=GIB, overhead=64 * MIB).admit(
            Starter("lab", 4 * GIB), (room(24 * GIB, machines=5, promised=20 * GIB),)
        )
    assert str(caught.value) == (
        '"lab" does not start: it wants 4 GiB and 64 MiB for its VMM; the host has 24 GiB, keeps 1 GiB, and may '
        "promise 23 GiB, of which 5 machines took 20.31 GiB: 2.688 GiB are left"
    )
    with pytest.raises(ConfigError, match="has 100 MiB of 24 GiB free, and 320 MiB are asked for"):
        Ratio(RatioOptions()).admit(Starter("lab", GIB), (room(24 * GIB, free=100 * MIB),))


def test_only_machines_inside_a_cgroup_count_there() -> None:
    """The host counts all, a cgroup those in it or below it, not those beside it or with a name that begins alike."""
    entries = [RosterEntry(name, 1, GIB, promised=GIB, group=name) for name in ("/a", "/a/b", "/ab", "/c", "")]
    limits = (
        MemoryLimit("the host", "", 1, 1),
        MemoryLimit("cgroup /a", "/a", 1, 1),
        MemoryLimit("cgroup /", "/", 1, 1),
    )
    assert [one.machines for one in rooms_of(limits, entries)] == [5, 2, 5]


def test_a_machine_is_refused_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A machine that admission refuses ends `cardcage run` with status 2 and one line with file, key and numbers."""
    file = tmp_path / "vm.toml"
    host = memory_limits()[0].size // MIB
    file.write_text(
        f'[machine]\nname = "lab"\nmemory = "{host - 16}M"\naccel = "tcg"\nplatform = "none"\n'
        '[policy]\nadmission = { type = "strict", overhead = "64M" }\n'
    )
    assert main(["run", str(file)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f'outcome: bad configuration: {file}: policy.admission: "lab" does not start: it wants')
    assert Roster().read()[0] == []


@pytest.mark.parametrize(
    ("admission", "says"),
    [
        ("stirct", 'policy.admission: no card offers admission "stirct". Did you mean "strict"?'),
        ({"type": "ratio", "ratio": 0}, "policy.admission.ratio: must be >= 0.01"),
        ({"type": "ratio", "most": 2}, "policy.admission.most: no such key"),
        (["none", "strikt"], 'policy.admission[1]: no card offers admission "strikt"'),
    ],
)
def test_mistakes_name_the_key(admission: Any, says: str) -> None:
    """A mistake in policy.admission is one line with the key."""
    with pytest.raises(ConfigError) as caught:
        Machine(fragments=[{"machine": {"platform": "none", "accel": ["tcg"]}, "policy": {"admission": admission}}])
    assert str(caught.value).startswith(says), str(caught.value)


def test_without_a_roster_admission_refuses(runtime: Path) -> None:
    """Where the other machines cannot be known, a machine that is to be counted does not start."""
    runtime.mkdir()
    runtime.chmod(0o777)
    with pytest.raises(HostError, match="admission needs to know the other machines"):
        Machine(fragments=[{"machine": {"platform": "none", "accel": ["tcg"]}, "policy": {"admission": "none"}}])


def test_huge_pages_are_not_promised_twice() -> None:
    """A machine whose memory does not come out of ordinary RAM is on the roster with nothing promised."""
    from cardcage_fleet.membership import entry_of

    with Machine(fragments=[{"machine": {"memory": "2M", "platform": "none", "accel": ["tcg"]}}]) as vm:
        assert record_of(vm).entry.promised == 2 * MIB
        stand_in = SimpleNamespace(**{one: getattr(vm, one) for one in ("name", "label", "config")})
        stand_in.memory_backend = SimpleNamespace(takes_ram=False)
        assert entry_of(stand_in).promised == 0


def test_of_two_that_start_at_once_one_is_refused(group: Path) -> None:
    """Two processes in one cgroup start a machine in the same moment where one fits: exactly one runs, each time."""
    (group / "memory.limit_in_bytes").write_text(str(600 * MIB))
    machine = {"memory": "300M"}
    policy = {"admission": {"type": "strict", "reserve": 0, "overhead": "64M"}}
    for _ in range(3):
        both = [Far(group, machine, policy), Far(group, machine, policy)]
        for one in both:
            one.say()
        said = sorted(one.hear() for one in both)
        assert said[0] == "built"
        assert "cgroup /" in said[1]
        assert "1 machine took 364 MiB: 236 MiB are left" in said[1]
        assert sorted(one.end() for one in both) == [0, 2]


# the edge


def test_edge_keeps_the_contract() -> None:
    """The policy passes the public contract of policies."""
    check_policy(lambda: Edge(EdgeOptions(cgroup=False)))


def test_the_lowest_priority_gives_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the host has less than low left, RAM leaves the machine with the lowest priority, then the largest."""
    machines = [TestMachine(16 * MIB, name=name, priority=worth) for name, worth in (("a", 5), ("b", -5), ("c", -5))]
    memories = [MachineMemory(one) for one in machines]  # type: ignore[arg-type]  # a stand-in
    for one, size in zip(machines, (16, 4, 12), strict=True):
        one.memory.write(0, b"x" * size * MIB)
    policy = Edge(EdgeOptions(low=Size(GIB), cgroup=False))
    for memory in memories:
        policy.attach(memory)
    assert [one.name for one in policy.order()] == ["c", "b", "a"]
    asked: list[tuple[str, int]] = []

    def reclaim(memory: MachineMemory, size: int) -> int:
        asked.append((memory.name, size))
        return min(size, 4 * MIB) if len(asked) < 3 else 0

    monkeypatch.setattr(MachineMemory, "reclaim", reclaim)
    monkeypatch.setattr(edges, "read_host_memory", lambda: HostMemory(8 * GIB, GIB - 10 * MIB))
    policy.step()
    assert asked == [("c", 10 * MIB), ("c", 6 * MIB), ("c", 2 * MIB), ("b", 2 * MIB), ("a", 2 * MIB)]
    asked.clear()
    monkeypatch.setattr(edges, "read_host_memory", lambda: HostMemory(8 * GIB, GIB))
    policy.step()
    assert asked == []
    for memory in memories:
        policy.detach(memory)
        memory.release()


def test_memory_in_a_file_is_written_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the edge a machine's memory really leaves the host for its file, and comes back as it was."""
    path = Path("/var/tmp") / f"cardcage-test-{os.getpid()}"
    keys = {"memory": "16M", "platform": "none", "accel": ["tcg"]}
    table = {"machine": keys, "memory": {"type": "file", "path": str(path)}}
    policy = {"memory": [{"type": "edge", "cgroup": False, "interval": "1h"}]}
    try:
        with Machine(fragments=[table, {"policy": policy}]) as vm:
            vm.memory.write(0x100000, b"x" * 8 * MIB)
            os.fsync(vm.memory.ranges[0].block.fd)  # dirty pages leave only once they are written
            before = stats_of(vm).resident
            monkeypatch.setattr(edges, "read_host_memory", lambda: HostMemory(8 * GIB, 0))
            policies_of(vm)[0].policy.step()
            assert before - stats_of(vm).resident >= 6 * MIB
            assert vm.memory.read(0x100000, 8 * MIB) == b"x" * 8 * MIB
    finally:
        path.unlink(missing_ok=True)


def test_scores_follow_the_best_machine_and_are_put_back() -> None:
    """oom_score_adj follows the highest priority of the process's machines, and is as before at the end."""
    before = score()
    low, high = (MachineMemory(TestMachine(MIB, priority=worth)) for worth in (-30, -10))  # type: ignore[arg-type]  # a stand-in
    policy = Edge(EdgeOptions(cgroup=False))
    policy.attach(low)
    assert score() == min(1000, before + 300)
    policy.attach(high)
    assert score() == min(1000, before + 100)
    policy.detach(low)
    policy.detach(high)
    assert score() == before


def test_the_process_gets_a_soft_limit_of_its_own(group: Path) -> None:
    """Under cgroup v1 the process is in a group with a soft limit while its machines run, and back afterwards."""
    policy = {"memory": [{"type": "edge", "overhead": "100M", "low": "50M"}]}
    far = Far(group, {"memory": "64M"}, policy)
    far.say()
    assert far.hear() == "built"
    own = group / f"cardcage-{far.process.pid}"
    assert (own / "cgroup.procs").read_text().split() == [str(far.process.pid)]
    assert int((own / "memory.soft_limit_in_bytes").read_text()) == 214 * MIB
    assert Roster().read()[0][0].group == f"/{group.name}/{own.name}"
    assert far.end() == 0
    assert not own.exists()


def test_under_v2_the_controller_is_handed_down(tmp_path: Path) -> None:
    """Under cgroup v2 (a fake: this host has none with memory) the child gets memory.high, and all is undone."""
    parent = MemoryGroup("/unit", tmp_path / "unit", 2)
    parent.folder.mkdir()
    with pytest.raises(FileNotFoundError, match="No such file"):
        enter(MemoryGroup("/gone", tmp_path / "gone", 2))
    own = enter(parent)
    own.limit(64 * MIB)
    assert (parent.folder / "cgroup.subtree_control").read_text() == "+memory"
    assert (own.folder / "cgroup.procs").read_text() == str(os.getpid())
    assert (own.folder / "memory.high").read_text() == str(64 * MIB)
    for one in own.folder.iterdir():
        one.unlink()
    own.leave()
    assert (parent.folder / "cgroup.procs").read_text() == str(os.getpid())
    assert not own.folder.exists()


def test_the_kernel_ends_the_lowest_priority_and_stats_says_so(group: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """When a cgroup is really full, the kernel takes the machine with the lowest priority though it is the smaller, the
    other runs on, and the next `cardcage stats` names the one that was killed."""
    (group / "memory.limit_in_bytes").write_text(str(280 * MIB))
    (group / "memory.swappiness").write_text("0")
    policy = {"memory": [{"type": "edge", "cgroup": False, "interval": "1h"}]}
    for _ in range(10):  # now and then the kernel takes a second one, before the first has given its memory back
        dear = Far(group, {"name": "dear", "memory": "256M", "priority": 100}, policy)
        cheap = Far(group, {"name": "cheap", "memory": "256M", "priority": -100}, policy)
        for one, size in ((dear, 60), (cheap, 60)):
            one.say()
            assert one.hear() == "built"
            one.say(str(size))
            assert one.hear() == "done"
        dear.say("200")  # more than there is beside the other
        lived = dear.hear() == "done"
        assert cheap.end() == -9
        if lived:
            break
        dear.end()
    assert lived
    assert main(["stats"]) == 0
    said = capsys.readouterr().out
    assert f"cheap (pid {cheap.process.pid}): " in said
    assert "killed by the kernel's OOM killer" in said
    assert "dear" in said
    assert dear.end() == 0


def test_this_process_has_its_group() -> None:
    """The memory cgroup of this process is found where the host has one, and counts its OOM kills."""
    found = memory_group()
    if found is None:
        pytest.skip("no memory cgroup is mounted")
    assert str(os.getpid()) in (found.folder / "cgroup.procs").read_text().split()
    assert (found.oom_kills() or 0) >= 0
