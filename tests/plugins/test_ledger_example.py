"""The example ledger, from its own distribution: machines of several processes, limits, and who died."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from cardcage import Machine
from cardcage.errors import CardError, ConfigError, HostError
from cardcage.hookspecs import hookimpl
from cardcage.host import Host
from cardcage.registry import Registry
from installed import cardcage
from scripted import Scripted

EXAMPLE = Path(__file__).parents[2] / "examples" / "ledger-card" / "src" / "ledger_card"
ledger = pytest.importorskip("ledger_card.ledger", reason="pip install ./examples/ledger-card")

ELSEWHERE = """
import sys
from cardcage import Machine
keys = {"name": "elsewhere", "platform": "none", "accel": ["tcg"], "memory": "2M"}
with Machine(machine=keys) as vm:
    print("built", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ledger of the test's own."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "ledger-card"


@pytest.fixture
def elsewhere() -> Iterator[subprocess.Popen[str]]:
    """A machine in a process of its own, which waits."""
    with subprocess.Popen(
        [sys.executable, "-c", ELSEWHERE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "built\n"
        yield process
        process.kill()


def machine(name: str, *cards: Any, limit: Any = None, log: list[Any] | None = None) -> Machine:
    """A machine of a host that has the ledger, and a scripted accelerator."""
    import ledger_card

    scripted = Scripted(vms=log if log is not None else [])
    keys = {"name": name, "platform": "none", "accel": ["scripted"], "memory": "2M"}
    policy = {"policy": {"ledger": limit}} if limit is not None else {}
    return Machine(machine=keys, fragments=[policy], host=Host([scripted, *cards, ledger_card], installed=False))


def rows() -> list[list[str]]:
    """The lines of ``cardcage ledger`` without the heading: name, pid, state, memory."""
    done = cardcage("ledger")
    assert (done.returncode, done.stderr) == (0, "")
    heading, *lines = (re.split(r" {2,}", line.strip()) for line in done.stdout.splitlines())
    assert heading == ["name", "pid", "state", "memory"]
    return lines


def test_it_uses_public_names_only() -> None:
    """The example comes from a distribution of its own, and imports the kernel's public modules and no other card."""
    (point,) = entry_points(group="cardcage", name="ledger")
    assert point.dist is not None
    assert point.dist.name == "ledger-card"
    text = "".join(one.read_text() for one in EXAMPLE.glob("*.py"))
    imports = set(re.findall(r"^ *(?:from|import) (cardcage\S*)", text, re.MULTILINE))
    public = "config errors hookspecs host machine registry security units".split()
    assert imports == {f"cardcage.{name}" for name in public}


def test_machines_of_several_processes_are_listed(elsewhere: subprocess.Popen[str]) -> None:
    """Two machines here and one elsewhere are listed with their states, and each leaves when it closes."""
    here = str(os.getpid())
    with machine("one") as one, machine("two"):
        one.start()
        assert sorted(rows()) == [
            ["elsewhere", str(elsewhere.pid), "built", "2 MiB"],
            ["one", here, "running", "2 MiB"],
            ["two", here, "built", "2 MiB"],
        ]
        one.stop()
        assert ["one", here, "stopped", "2 MiB"] in rows()
    elsewhere.communicate("")
    assert rows() == []


def test_a_killed_machine_is_told_as_dead(elsewhere: subprocess.Popen[str], folder: Path) -> None:
    """A machine whose process was killed is told as dead until it is forgotten, and counts for no limit."""
    elsewhere.send_signal(signal.SIGKILL)
    elsewhere.wait()
    assert rows() == [["elsewhere", str(elsewhere.pid), "died", "2 MiB"]]
    machine("next", limit={"type": "most", "machines": 1}).close()
    assert "died" in cardcage("ledger", "--forget").stdout
    assert rows() == []
    assert [one.name for one in folder.iterdir()] == ["lock"]


def test_a_limit_refuses_before_anything_is_taken(elsewhere: subprocess.Popen[str]) -> None:
    """The third machine is refused in one line, before there is a VM or RAM, and is not in the ledger."""
    limit = {"type": "most", "machines": 2}
    with machine("second", limit=limit):
        log: list[Any] = []
        with pytest.raises(ConfigError) as refused:
            machine("third", limit=limit, log=log)
        assert str(refused.value) == 'policy.ledger: "third" does not start: 2 of 2 machines live'
        assert log == []
        assert sorted(row[0] for row in rows()) == ["elsewhere", "second"]


def test_limits_are_asked_while_nobody_else_enters(folder: Path) -> None:
    """While a limit decides the ledger is locked, and afterwards it is not."""
    from ledger_card import LimitOffer

    def lock() -> bool:
        with (folder / "lock").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    class Looks:
        def check(self, *_: Any) -> None:
            seen.append(lock())

    class Card:
        @hookimpl
        def cardcage_register(self, registry: Registry) -> None:
            registry.add(LimitOffer("looks", Looks))

    seen: list[bool] = []
    machine("lab", Card(), limit="looks").close()
    assert (seen, lock()) == ([False], True)


def test_of_many_that_start_at_once_the_limit_holds() -> None:
    """Of eight machines that are made at once, exactly as many start as the limit says."""
    limit = {"type": "most", "machines": 3}

    def attempt(number: int) -> Machine | None:
        try:
            return machine(f"vm{number}", limit=limit)
        except ConfigError:
            return None

    with ThreadPoolExecutor(8) as pool:
        made = [one for one in pool.map(attempt, range(8)) if one is not None]
    assert sorted(row[0] for row in rows()) == sorted(one.name for one in made)
    for one in made:
        one.close()
    assert (len(made), rows()) == (3, [])


def test_a_wrong_option_is_one_line_with_file_and_key(tmp_path: Path) -> None:
    """A misspelt option, a wrong value and an unknown limit are each one line that names file and key."""
    file = tmp_path / "vm.toml"
    for text, error in (
        ('{ type = "most", machnes = 2 }', 'policy.ledger.machnes: no such key. Did you mean "machines"?'),
        ('{ type = "most", machines = "two" }', 'policy.ledger.machines: expected a whole number, got "two"'),
        ('[{ type = "mots" }]', 'policy.ledger[0]: no card offers limit "mots". Did you mean "most"?'),
    ):
        file.write_text(f'[machine]\nplatform = "none"\n[policy]\nledger = {text}\n')
        done = cardcage("run", str(file))
        assert done.returncode == 2
        assert f"{file}: {error}" in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_strangers_limit_is_asked() -> None:
    """A second card adds a limit to the ledger's kind; a bug in it is a CardError that names limit and card."""
    from ledger_card import LimitOffer

    class Broken:
        def check(self, *_: Any) -> None:
            raise ZeroDivisionError("a card's bug")

    class Card:
        @hookimpl
        def cardcage_register(self, registry: Registry) -> None:
            registry.add(LimitOffer("broken", Broken))

    with pytest.raises(CardError, match=r'limit "broken" \(card Card, given to Host\): ZeroDivisionError: a card'):
        machine("lab", Card(), limit="broken")
    assert rows() == []


def test_whom_another_card_refuses_was_never_entered() -> None:
    """The ledger's hook is called last, though its card was loaded last, so that the refused machine is not entered."""

    class Refuses:
        @hookimpl
        def cardcage_admit(self, machine: Machine) -> None:
            seen.append(rows())
            raise HostError("not today")

        @hookimpl
        def cardcage_register(self, registry: Registry) -> None: ...

    seen: list[Any] = []
    with pytest.raises(HostError, match="not today"):
        machine("lab", Refuses())
    assert (seen, rows()) == ([[]], [])


def test_without_the_card_a_machine_runs() -> None:
    """A machine runs without the card, and its key is then one that no card reads."""
    keys = {"platform": "none", "accel": ["scripted"], "memory": "2M"}
    with Machine(machine=keys, host=Host([Scripted()], installed=False)) as vm:
        vm.start().stop()
    with pytest.raises(ConfigError, match=r'policy.ledger: no card offers policy key "ledger"'):
        Machine(machine=keys, fragments=[{"policy": {"ledger": "most"}}], host=Host([Scripted()], installed=False))


def test_without_a_directory_only_a_limit_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no ledger can be kept a machine starts unless a limit is asked for, and the refusal says why."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    machine("lab").close()
    with pytest.raises(HostError, match="ledger-card: no ledger can be kept there: No such file"):
        machine("lab", limit="most")
