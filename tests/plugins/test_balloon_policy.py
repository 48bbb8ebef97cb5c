"""The balloon policy on machines without a guest: what it sees, sets, reports once, and shares with other processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import define, field
from cardcage._config.structure import structure
from cardcage.errors import ConfigError, HostError
from cardcage.host import Host
from cardcage_balloon.board import Board, Entry
from cardcage_balloon.plan import MIB, Seen
from cardcage_balloon.policy import BalloonOptions, BalloonPolicy
from cardcage_fleet.hostmemory import HostMemory
from cardcage_memory_policies import MachineMemory, PolicyOffer
from cardcage_memory_policies.testing import TestBalloon, TestMachine, check_policy

SIZE = 1024 * MIB


@define
class Lab:
    """Machines under one policy, on a host and in a time that the test sets."""

    folder: Path
    budget: int = 2048 * MIB
    some: float = 0.0
    now: float = 0.0
    machines: list[TestMachine] = field(factory=list)
    made: list[BalloonPolicy] = field(factory=list)

    def host(self) -> HostMemory:
        """Headroom is the budget less what is resident, so that the policy's sum is the budget (reserve 0)."""
        return HostMemory(1 << 40, self.budget, some=self.some)

    def policy(self, **options: Any) -> BalloonPolicy:
        made = BalloonPolicy(
            structure({"reserve": 0, **options}, BalloonOptions),
            folder=lambda: self.folder,
            host=self.host,
            clock=lambda: self.now,
        )
        self.made.append(made)
        return made

    def add(self, policy: BalloonPolicy, name: str, used: int, **more: Any) -> TestBalloon:
        balloon = TestBalloon(SIZE, used, **more)
        machine = TestMachine(SIZE, name=name, balloon=balloon)
        self.machines.append(machine)
        policy.attach(MachineMemory(machine))  # type: ignore[arg-type]  # a stand-in
        return balloon

    def run(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1.0
            for policy in self.made:
                policy.step()
            for machine in self.machines:
                machine.run_soon()
                report = machine.device.report
                if report is not None and machine.device.answers:
                    object.__setattr__(report, "at", self.now)

    def logged(self, at: int = 0) -> list[str]:
        return [f"{event}: {values.get('reason', '')}" for _, event, values in self.machines[at].log.entries]


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    yield made
    for machine in made.machines:
        machine.close()


def test_the_contract() -> None:
    """The policy passes the public contract."""
    check_policy(lambda: BalloonPolicy(structure({"floor": "1M", "spare": "1M", "band": "1M"}, BalloonOptions)))


def test_memory_flows_to_the_busy(lab: Lab) -> None:
    """Four machines of 1 GiB on 2 GiB: each in its turn gets what it needs, out of what the others do not use."""
    policy = lab.policy()
    guests = [lab.add(policy, f"m{at}", 100 * MIB) for at in range(4)]
    lab.run(20)
    for busy in guests:
        for one in guests:
            one.used = (800 if one is busy else 100) * MIB
        lab.run(10)
        assert SIZE - busy.size >= 800 * MIB + 48 * MIB
        assert sum(SIZE - one.size for one in guests) <= lab.budget + 16 * MIB
        assert all(SIZE - one.size >= one.used + 24 * MIB for one in guests)
    assert not any(machine.log.entries for machine in lab.machines)


def test_plenty_is_given_and_pressure_takes_it_back(lab: Lab) -> None:
    """With memory enough guests have all of theirs; under pressure they keep what they need."""
    guest = lab.add(lab.policy(), "one", 100 * MIB)
    lab.run(5)
    assert guest.size == 0
    lab.some = 15.0
    lab.run(20)
    assert 0 < guest.size < 900 * MIB
    lab.some = 50.0
    lab.run(20)
    assert guest.size == pytest.approx(SIZE - 100 * MIB - 0.08 * SIZE, abs=17 * MIB)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"live": False}, "it has no balloon driver"),
        ({"answers": False}, "it sends no statistics"),
        ({"wild": {"free_memory": 1}}, "its statistics do not say what is available"),
        ({"pace": 0}, "it does not give memory that it has available"),
    ],
)
def test_who_does_not_cooperate_is_reported_once(lab: Lab, change: dict[str, Any], reason: str) -> None:
    """A guest that does not follow is told of once and counted at what it keeps; the others share the rest."""
    policy = lab.policy()
    bad, good = lab.add(policy, "bad", 100 * MIB), lab.add(policy, "good", 100 * MIB)
    for name, value in change.items():
        setattr(bad, name, value)
    lab.budget = 1536 * MIB
    lab.run(170)
    said = "balloon: the guest does not cooperate, its memory counts as used: "
    assert lab.logged() == [said + reason]
    assert not lab.logged(1)
    assert SIZE - good.size <= 512 * MIB + 16 * MIB
    bad.live = bad.answers = True
    bad.wild, bad.pace = None, SIZE
    lab.run(40)
    assert lab.logged() == [said + reason, "balloon: the guest cooperates again: "]
    assert SIZE - bad.size <= 1024 * MIB


def test_a_paused_guest_is_not_blamed(lab: Lab) -> None:
    """A machine that is paused says nothing, and is not reported for it."""
    policy = lab.policy()
    lab.add(policy, "paused", 100 * MIB)
    lab.run(5)
    lab.machines[0].state = "paused"
    lab.run(100)
    assert not lab.logged()


def test_too_little_for_all_is_said(lab: Lab) -> None:
    """When guests use more than there is, one line says so, and none is driven below what it uses."""
    policy = lab.policy()
    guests = [lab.add(policy, name, 900 * MIB) for name in "ab"]
    lab.budget = 1000 * MIB
    lab.run(50)
    assert lab.logged() == ["balloon: guests need more than there is: "]
    assert all(SIZE - one.size >= 924 * MIB for one in guests)


def test_processes_plan_together(lab: Lab) -> None:
    """Two policies (two processes) with two machines each share one budget as one policy with four does."""
    first, second = lab.policy(), lab.policy()
    guests = [lab.add(policy, f"m{at}", 100 * MIB) for at, policy in enumerate((first, first, second, second))]
    lab.run(20)
    assert all(SIZE - one.size == pytest.approx(512 * MIB, abs=17 * MIB) for one in guests)
    guests[3].used = 900 * MIB
    lab.run(20)
    assert SIZE - guests[3].size >= 948 * MIB
    assert sum(SIZE - one.size for one in guests) <= lab.budget + 16 * MIB


def test_detach_gives_all_back(lab: Lab) -> None:
    """A machine whose policy is taken away gets all its memory, and its line goes from the board."""
    policy = lab.policy()
    guest = lab.add(policy, "one", 100 * MIB)
    lab.budget = 300 * MIB
    lab.run(20)
    assert guest.size > 500 * MIB
    policy.detach(policy._watched[0].memory)
    lab.machines[0].run_soon()
    assert guest.size == 0
    assert list(lab.folder.iterdir()) == []


def test_a_floor_above_the_size_is_the_size(lab: Lab) -> None:
    """A machine that is smaller than the floor keeps all it has."""
    guest = lab.add(lab.policy(floor="2G"), "one", 100 * MIB)
    lab.budget = 300 * MIB
    lab.run(20)
    assert guest.size == 0


def test_without_a_board_it_plans_alone(lab: Lab) -> None:
    """Where processes cannot meet, the policy says so and steers its own machines."""

    def nowhere() -> Path:
        raise HostError("no such place")

    policy = lab.policy()
    policy._folder = nowhere
    guest = lab.add(policy, "one", 100 * MIB)
    lab.budget = 500 * MIB
    lab.run(20)
    assert guest.size > 400 * MIB
    assert lab.logged() == ["balloon: plans without the machines of other processes: no such place"]


def test_what_a_dead_process_wrote_goes(tmp_path: Path) -> None:
    """The board keeps the lines of the living only; other groups, other versions and rubbish are passed over."""
    code = (
        "import sys, time; from pathlib import Path; from cardcage_balloon.board import Board, Entry\n"
        "from cardcage_balloon.plan import Seen\n"
        "board = Board(Path(sys.argv[1])); board.write('g', [Entry('other', Seen(1, 2, 3, 4), 5)])\n"
        "print('ready', flush=True); time.sleep(1000)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        mine = Board(tmp_path)
        mine.write("g", [])
        assert mine.others("g") == [Entry("other", Seen(1, 2, 3, 4), 5)]
        assert mine.others("another group") == []
        (path,) = (one for one in tmp_path.glob("*.json") if one.stem != mine.name)
        text = path.read_text()
        for rubbish in ("", "[]", '{"time": 1}', text.replace("kept", "keeps"), "\0" * (2 << 20)):
            path.write_text(rubbish)
            assert mine.others("g") == []
        path.write_text(text)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert mine.others("g") == []
        assert not path.exists()
        mine.close()
        mine.close()
    assert list(tmp_path.iterdir()) == []


def test_who_no_longer_steers_counts_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process that hangs wrote long ago is counted, but not as steered."""
    hung, mine = Board(tmp_path), Board(tmp_path)
    hung.write("g", [Entry("hung", Seen(9, 0, 8, 7), 5)])
    monkeypatch.setattr("time.monotonic", lambda: os.times().elapsed + 1e6)
    assert mine.others("g") == [Entry("hung", Seen(9, 0, 8, 7, steered=False), 5)]
    hung.close()
    mine.close()


def test_the_policy_is_found_by_name() -> None:
    """``balloon`` is one policy for all machines of a host, with its options checked."""
    with Host() as host:
        offer = host.registry.get(PolicyOffer, "balloon")
        assert offer.shared
        with pytest.raises(ConfigError, match="margin"):
            host.options(offer, {"margin": 2.0})
        assert host.options(offer, {"floor": "1M"}).floor == MIB
