"""The hooks of a machine's life: their order, what a refusal leaves, and whose fault an exception is."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from cardcage.errors import CardError, ConfigError, Denied, HostError
from cardcage.hookspecs import Hooks, hookimpl
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage.registry import Registry
from cardcage.security import Needs
from scripted import Scripted

PHASES = ("cardcage_admit", "cardcage_built", "cardcage_starting", "cardcage_closing")
REFUSALS = (ConfigError("refused"), HostError("refused"), Denied("refused"))


def quiet(_: Any) -> None:
    """Do nothing."""


class Card:
    """A card whose hooks tell what is called and then do as they are told.

    Args:
        acts: what to do, by the hook's name. marks: ``tryfirst`` or ``trylast``.
    """

    def __init__(self, name: str, calls: list[str], marks: dict[str, bool] | None = None, **acts: Any) -> None:
        self.__name__, self.calls = name, calls
        for phase in PHASES:
            setattr(self, phase, hookimpl(**(marks or {}))(self.hook(phase, acts.get(phase, quiet))))

    def hook(self, phase: str, act: Callable[[Any], None]) -> Callable[[Any], None]:
        def call(machine: Any) -> None:
            self.calls.append(f"{phase.removeprefix('cardcage_')} {self.__name__}")
            act(machine)

        return call

    @hookimpl
    def cardcage_register(self, registry: Registry) -> None:
        self.calls.append(f"register {self.__name__}")


def refuses(error: BaseException) -> Callable[[Any], None]:
    """A hook that raises *error*."""

    def act(_: Any) -> None:
        raise error

    return act


def ran(machine: Machine) -> None:
    """Start a machine and close it."""
    with machine:
        machine.start()


def test_every_phase_is_called_once_and_in_order(make_machine: Any) -> None:
    """A card hears of cardcage_register, then of each phase of a machine that runs, once and in the order of Hooks."""
    calls: list[str] = []
    ran(make_machine(cards=(Card("one", calls),)))
    assert calls == [f"{name} one" for name in ("register", "admit", "built", "starting", "closing")]
    known = [name for name in vars(Hooks) if name.startswith("cardcage_")]
    between = ["cardcage_needs", "cardcage_forking", "cardcage_forked"]
    assert known == ["cardcage_register", *PHASES[:3], *between, PHASES[3]]


def test_needs_are_asked_of_all_cards(make_machine: Any) -> None:
    """cardcage_needs gives what the cards say, without those that need nothing; a card that fails at it is named."""

    class Needy:
        def __init__(self, name: str, found: Needs | None) -> None:
            self.__name__, self.found = name, found

        @hookimpl
        def cardcage_needs(self, machine: Machine) -> Needs | None:
            return self.found

    class Failing:
        @hookimpl
        def cardcage_needs(self, machine: Machine) -> Needs | None:
            raise ZeroDivisionError("no luck")

    wanted = Needs(read=("/a",))
    with make_machine(cards=(Needy("one", wanted), Needy("two", None))) as machine:
        assert machine.host.phases.call("needs", machine) == [wanted]
    failing = Failing()
    with make_machine(cards=(failing,)) as machine, pytest.raises(CardError, match="cardcage_needs: ZeroDivisionError"):
        machine.host.phases.call("needs", machine)


@pytest.mark.parametrize("phase", PHASES)
def test_cards_are_called_in_pluggys_order(make_machine: Any, phase: str) -> None:
    """The card loaded last is called first, tryfirst before all, and trylast after all."""
    calls: list[str] = []
    cards = [
        Card("first", calls, {"tryfirst": True}),
        Card("last", calls, {"trylast": True}),
        Card("a", calls),
        Card("b", calls),
    ]
    ran(make_machine(cards=cards))
    word = phase.removeprefix("cardcage_")
    assert [one for one in calls if one.startswith(word)] == [f"{word} {name}" for name in ("first", "b", "a", "last")]


def test_a_wrapper_surrounds_the_others(make_machine: Any) -> None:
    """A wrapper runs before and after the cards that it surrounds, and may turn their refusal into its own."""
    calls: list[str] = []

    class Around:
        @hookimpl(wrapper=True)
        def cardcage_admit(self, machine: Any) -> Generator[None, Any, Any]:
            calls.append("before")
            try:
                return (yield)
            except HostError as error:
                raise HostError(f"{machine.name}: {error}") from error
            finally:
                calls.append("after")

        @hookimpl
        def cardcage_register(self, registry: Registry) -> None: ...

    ran(make_machine(cards=(Around(), Card("one", calls))))
    assert calls == [
        "register one",
        "before",
        "admit one",
        "after",
        *(f"{name} one" for name in ("built", "starting", "closing")),
    ]
    with pytest.raises(HostError, match=r"^machine: full$"):
        make_machine(cards=(Card("one", calls, cardcage_admit=refuses(HostError("full"))), Around()))


@pytest.mark.parametrize("error", REFUSALS, ids=lambda one: type(one).__name__)
def test_refused_in_admit_nothing_was_taken(error: Exception) -> None:
    """A machine that cardcage_admit refuses has no VM, no RAM, no thread and no place in its host; the rest is undone.

    What cards deferred is called in the reverse order, and the cards after the refusal are not asked.
    """
    calls: list[str] = []
    seen: list[Machine] = []

    def takes(machine: Machine) -> None:
        seen.append(machine)
        machine.defer(lambda: calls.append("undo 1"))
        machine.defer(lambda: calls.append("undo 2"))
        assert not hasattr(machine, "vm")
        assert not machine.memory.ranges

    def takes_too(machine: Machine) -> None:
        machine.defer(lambda: calls.append("undo 3"))
        raise error

    scripted = Scripted()
    cards = [scripted, Card("never", calls), Card("no", calls, cardcage_admit=takes_too)]
    host = Host([*cards, Card("yes", calls, cardcage_admit=takes)], installed=False)
    calls.clear()
    threads = set(threading.enumerate())
    with pytest.raises(type(error), match="refused"):
        Machine(machine={"platform": "none", "accel": ["scripted"], "memory": "2M"}, host=host)
    assert calls == ["admit yes", "admit no", "undo 3", "undo 2", "undo 1"]
    assert (scripted.vms, host.machines, seen[0].memory.ranges) == ([], [], [])
    assert set(threading.enumerate()) <= threads


def test_what_admit_may_look_at(make_machine: Any) -> None:
    """In cardcage_admit a machine has all that the hook's page promises."""
    seen: dict[str, Any] = {}
    promised = ("config", "name", "label", "mediator", "log", "observers", "memory_backend", "host")

    def look(machine: Machine) -> None:
        seen.update({name: getattr(machine, name) for name in promised})

    make_machine(cards=(Card("one", [], cardcage_admit=look),))
    assert seen["memory_backend"].takes_ram
    assert (seen["name"], seen["config"].machine.memory) == ("machine", 2 << 20)


def test_refused_in_built_the_machine_closes(make_machine: Any) -> None:
    """A machine that cardcage_built refuses is closed: devices unplugged, RAM freed, threads ended, cards told."""
    calls: list[str] = []
    seen: list[Any] = []
    threads = set(threading.enumerate())

    def refuse(machine: Machine) -> None:
        seen.extend([machine, machine.devices["panel"].device])
        assert machine.memory.ranges
        machine.defer(lambda: calls.append("undo"))
        raise ConfigError("no good", key="policy.mine")

    cards = (Card("b", calls), Card("a", calls, cardcage_built=refuse))
    with pytest.raises(ConfigError, match=r"^policy.mine: no good$"):
        make_machine(cards=cards)
    assert calls[2:] == ["admit a", "admit b", "built a", "undo", "closing a", "closing b"]
    machine, panel = seen
    assert panel.calls == ["unplug"]
    assert (machine.memory.ranges, machine.vm.closed, machine.host.machines) == ([], True, [])
    assert set(threading.enumerate()) <= threads


def test_starting_can_keep_a_machine_from_starting(make_machine: Any) -> None:
    """What cardcage_starting raises is raised by start, the machine stays built, and can be started later."""
    calls: list[str] = []
    errors: list[Exception] = [HostError("not yet")]

    def starting(machine: Machine) -> None:
        assert threading.current_thread() is threading.main_thread()
        assert machine.state == "built"
        if errors:
            raise errors.pop()

    machine = make_machine(cards=(Card("one", calls, cardcage_starting=starting),))
    with pytest.raises(HostError, match="not yet"):
        machine.start()
    assert (machine.state, len(machine.scripted.log)) == ("built", 0)
    machine.start()
    assert machine.state == "running"
    assert calls.count("starting one") == 2
    machine.close()
    assert calls[-1] == "closing one"


def test_a_machine_that_never_started_is_closed_alike(make_machine: Any) -> None:
    """cardcage_closing comes once for a machine that was built and not started, however often it is closed."""
    calls: list[str] = []
    machine = make_machine(cards=(Card("one", calls),))
    machine.close()
    machine.close()
    assert calls == [f"{name} one" for name in ("register", "admit", "built", "closing")]


def test_one_cards_closing_keeps_no_other_from_it(make_machine: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """While cardcage_closing is called devices and RAM are there and no vCPU runs; what one card raises is logged."""
    calls: list[str] = []

    def closing(machine: Machine) -> None:
        assert machine.state == "stopped"
        assert machine.memory.read(0, 1) == b"\0"
        assert machine.devices["panel"].device.calls == []
        calls.append("all there")

    broken = Card("broken", calls, cardcage_closing=refuses(ZeroDivisionError("a card's bug")))
    machine = make_machine(cards=(Card("a", calls, cardcage_closing=closing), broken, Card("b", calls)))
    ran(machine)
    assert calls[-4:] == ["closing b", "closing broken", "closing a", "all there"]
    logged = capfd.readouterr().err
    assert logged.count("a card's hook failed") == 1
    assert "card=broken" in logged
    assert "ZeroDivisionError: a card's bug (in act, " in logged.replace("\\'", "'")


def test_deferred_callbacks_are_all_called(make_machine: Any) -> None:
    """A deferred callback that raises keeps no other from being called; close raises it."""
    calls: list[str] = []

    def built(machine: Machine) -> None:
        machine.defer(lambda: calls.append("first"))
        machine.defer(lambda: 1 // 0)
        machine.defer(lambda: calls.append("last"))

    machine = make_machine(cards=(Card("one", [], cardcage_built=built),))
    with pytest.raises(ZeroDivisionError):
        machine.close()
    assert calls == ["last", "first"]
    assert machine not in machine.host.machines
    machine.close()


def test_what_is_deferred_in_admit_comes_after_the_ram(make_machine: Any) -> None:
    """What cardcage_admit defers is called when RAM was given back, what cardcage_built defers while it is there."""
    seen: dict[str, int] = {}

    def look(when: str) -> Callable[[Machine], None]:
        return lambda machine: machine.defer(lambda: seen.update({when: len(machine.memory.ranges)}))

    machine = make_machine(cards=(Card("one", [], cardcage_admit=look("admit"), cardcage_built=look("built")),))
    machine.close()
    assert seen == {"built": 1, "admit": 0}


STRANGER = """
from cardcage.hookspecs import hookimpl

@hookimpl
def cardcage_register(registry): pass

@hookimpl
def {phase}(machine):
    {{}}["missing"]
"""


@pytest.mark.parametrize("phase", PHASES[:3])
def test_a_strangers_exception_names_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    """What a stranger's hook raises that is no refusal is a CardError with its card, distribution and hook."""
    name = f"stray_{phase}"
    (tmp_path / f"{name}.py").write_text(STRANGER.format(phase=phase))
    info = tmp_path / "stray-2.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stray\nVersion: 2.1\n")
    (info / "entry_points.txt").write_text(f"[cardcage]\nstray = {name}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    keys = {"platform": "none", "accel": ["scripted"], "memory": "2M"}
    with Host([Scripted()]) as host:
        with pytest.raises(CardError, match=re.escape(f"card stray (stray 2.1): {phase}: KeyError: 'missing'")):
            Machine(machine=keys, host=host).start()
        assert len(host.machines) == (phase == "cardcage_starting")


def test_a_hook_of_another_signature_makes_its_card_broken() -> None:
    """A hook that takes what it is not given leaves its card out, with the reason."""

    class Wrong:
        @hookimpl
        def cardcage_starting(self, machine: Any, more: int) -> None: ...

    (broken,) = Host([Wrong()], installed=False).broken
    assert "more" in broken.reason
