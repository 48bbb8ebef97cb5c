"""Abilities: found by the names and signatures of protocols, and near misses told."""

from __future__ import annotations

from contextlib import suppress
from functools import partial, wraps
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import cardcage_memory_policies
import pytest
from cardcage._machine.abilities import ABILITIES, BACKENDS, abilities_of
from cardcage.abilities import TellsNearMisses, calls, check_signature, has, near_misses, require
from cardcage.accelerator import VM, Accelerator, VmSpec
from cardcage.device import DetachingBus, DeviceBus, HasState, Pausable, Pluggable, Resettable
from cardcage.errors import CardError, MissingExtra
from cardcage.hookspecs import hookimpl
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage.ram import MemoryBackend
from cardcage.registry import Registry
from cardcage.security import CHECKER
from cardcage_cli.listing import list_cards
from cardcage_fleet.admission import Admission
from cardcage_memory_policies import MachineMemory, PolicyOffer
from cardcage_memory_policies.policy import POLICY
from cardcage_memory_policies.testing import check_policy
from cardcage_testing import check_block_backend, check_device, check_memory_backend
from scripted import Scripted, ScriptedVm

SHELVES = [Path(__file__).parents[2] / shelf for shelf in ("core", "accel", "devices", "plugins")]


class Calls(Protocol):
    """A protocol with all kinds of members."""

    size: int

    @property
    def live(self) -> bool: ...

    def seek(self, offset: int, whence: int = 0, /) -> int: ...

    def zero(self, at: int, /, *, unmap: bool) -> None: ...


class Whole:
    """Has all of it, its property being of no use yet."""

    size = 1

    @property
    def live(self) -> bool:
        raise RuntimeError("not plugged in")

    def seek(self, offset: int, whence: int = 0) -> int:
        return offset

    def zero(self, at: int, unmap: bool) -> None: ...


class Carrier:
    bus_type = "rack"

    def attach(self, device: Any, slot: Any, address: str | None, /) -> None: ...


class Rest:
    """A device that means ``reset``."""

    def read(self, offset: int, size: int, /) -> int:
        return 0

    def write(self, offset: int, size: int, value: int, /) -> None: ...

    def rest(self) -> None: ...


class Plugg(Rest):
    """One that means ``plug``, too."""

    def plugg(self, slot: Any, /) -> None: ...


class Detatch:
    """A policy that means ``detach``."""

    def attach(self, memory: MachineMemory, /) -> None: ...

    def detatch(self, memory: MachineMemory, /) -> None: ...


class Subscibe:
    """A checker that means ``subscribe``."""

    def check(self, *_: Any) -> None: ...

    def subscibe(self, changed: Any, /) -> Any: ...


class Allcate:
    """A memory back end that means ``allocate``."""

    takes_ram = True

    def allcate(self, size: int, name: str, /) -> None: ...


class Cards:
    @hookimpl
    def cardcage_register(self, registry: Registry) -> None:
        registry.device("rest", Rest)
        registry.device("plugg", Plugg)
        registry.add(PolicyOffer("detatch", Detatch))
        registry.security("subscibe", Subscibe)


# finding


def test_an_ability_is_read_from_its_protocol() -> None:
    """Methods, attributes and properties count; a default makes an argument optional, and properties are not asked."""
    assert has(Whole(), Calls)
    assert has(Whole, Calls)
    assert require(Whole(), Calls)
    assert not has(object(), Calls)


@pytest.mark.parametrize(
    ("name", "method", "error"),
    [
        ("seek", lambda offset: 0, "does not take 1 to 2 positional arguments"),
        ("seek", lambda a, b, c: 0, "does not take 1 to 2 positional arguments"),
        ("zero", lambda at: None, "does not take 1 positional argument and unmap="),
        ("zero", lambda at, *, unmap, more: None, "does not take 1 positional argument and unmap="),
    ],
)
def test_a_signature_that_does_not_fit_is_named(name: str, method: Any, error: str) -> None:
    """A method that cannot be called as its protocol says is an error that names the owner, not a missing ability."""
    made = Whole()
    setattr(made, name, method)
    with pytest.raises(CardError, match=f"who: {name}.*{error}"):
        has(made, Calls, "who")


@pytest.mark.parametrize("method", [lambda *_, **__: 0, partial(max, 0), max, lambda at, unmap=True: None])
def test_what_can_be_called_fits(method: Any) -> None:
    """Whatever takes the arguments fits: with stars, partial, written in C."""
    made = Whole()
    made.zero = method  # type: ignore[method-assign]
    assert has(made, Calls)


def test_a_decorated_method_is_what_it_wraps() -> None:
    """Where a decorator takes everything, the method under it is looked at."""

    def plain(method: Any) -> Any:
        @wraps(method)
        def inner(*values: Any) -> Any:
            return method(*values)

        return inner

    class Decorated:
        @plain
        def reset(self, hard: bool) -> None: ...

    with pytest.raises(CardError, match=r"Decorated: reset.*0 positional arguments"):
        has(Decorated(), Resettable)


def test_class_and_static_methods_are_found_on_objects_and_classes() -> None:
    """What is bound already takes no ``self``."""

    class Kinds:
        @staticmethod
        def pause() -> None: ...

        @classmethod
        def resume(cls) -> None: ...

    assert has(Kinds, Pausable)
    assert has(Kinds(), Pausable)


def test_one_of_a_pair_is_an_error() -> None:
    """Some members without the others are a mistake, and a near miss of what is missing is named."""

    class Half:
        def pause(self) -> None: ...

        def resum(self) -> None: ...

    with pytest.raises(CardError, match=r"Half: has 'pause' but no 'resume'; did you mean it by \"resum\"\?"):
        has(Half(), Pausable)
    with pytest.raises(CardError, match="me: has no method 'save'"):
        require(Half(), HasState, "me")
    with pytest.raises(CardError, match="me: has no attribute 'takes_ram'"):
        require(type("Backend", (), {"allocate": lambda self, size, name: None})(), MemoryBackend, "me")


def test_a_protocol_that_extends_another_is_had_for_its_own_members() -> None:
    """A bus need not detach; ``attach`` and ``detach`` without ``bus_type`` are words for something else."""
    assert abilities_of(Carrier(), "who") == {"bus"}
    full = type("Full", (Carrier,), {"detach": lambda self, device: None})
    assert abilities_of(full(), "who") == {"bus", "detach"}
    other = type("Other", (), {"attach": lambda self: None, "detach": lambda self: None})
    assert not has(other(), DeviceBus)
    assert not has(other(), DetachingBus)


def test_a_declaration_is_no_method() -> None:
    """A class that lists protocols among its bases has of them what it defines itself."""

    class Explicit(Pluggable, Resettable):
        def reset(self) -> None: ...

    assert abilities_of(Explicit(), "who") == {"reset"}


def test_calls_are_those_of_the_abilities_there_are() -> None:
    """The bound methods of what an object has, by name, and nothing of what it has not."""
    made = Carrier()
    assert calls(made, [DeviceBus, DetachingBus, Resettable]) == {"attach": made.attach}
    with pytest.raises(CardError, match="who: has no method 'raed'"):
        check_signature(made, "raed", 2, "who")


# near misses


@pytest.mark.parametrize(
    ("name", "member"),
    [
        ("rest", "reset"),
        ("plugg", "plug"),
        ("powerButton", "power_button"),
        ("powr_buton", None),
        ("contirbute", "contribute"),
        ("unpulg", "unplug"),
        ("resett", "reset"),
        ("closed", None),
        ("loaded", None),
        ("saves", None),
        ("preset", None),
        ("plugin", None),
        ("flag", None),
    ],
)
def test_what_is_close(name: str, member: str | None) -> None:
    """A letter more, less, wrong or exchanged is a near miss; another form of the verb, or another word, is none."""
    made = type("Made", (), {name: lambda self: None})
    found = near_misses(made, ABILITIES.values())
    assert [one.split('"')[3] for one in found] == ([member] if member else [])


def test_a_near_miss_of_what_is_there_is_none() -> None:
    """Who has the method may have another beside it, on its class or on itself."""
    made = Rest()
    assert near_misses(made, ABILITIES.values()) == ['has "rest": did you mean "reset" (Resettable)?']
    made.reset = made.rest  # type: ignore[attr-defined]
    assert near_misses(made, ABILITIES.values()) == []


def test_the_contracts_tell_near_misses() -> None:
    """The public contracts of devices, policies and back ends fail for a method that nobody would call."""
    with pytest.raises(AssertionError, match=r'Rest: has "rest": did you mean "reset" \(Resettable\)\?'):
        check_device(Rest)
    with pytest.raises(AssertionError, match='has "plugg": did you mean "plug"'):
        check_device(Plugg)
    with pytest.raises(AssertionError, match=r'Detatch: has "detatch": did you mean "detach" \(Detachable\)\?'):
        check_policy(Detatch)

    with pytest.raises(CardError, match="Allcate: has no method 'allocate'; did you mean it by \"allcate\""):
        check_memory_backend(Allcate)  # type: ignore[arg-type]  # that is the point

    def disk() -> Any:
        members = dict.fromkeys(("readv", "writev", "discard", "write_zeroes"), lambda self, *_, **__: None)
        members |= dict.fromkeys(("flush", "close"), lambda self: None)
        from cardcage.backends import BlockInfo

        return type("Disk", (), {**members, "info": BlockInfo(512), "tryreadv": lambda self: None})()

    with pytest.raises(AssertionError, match='Disk: has "tryreadv": did you mean "try_readv"'):
        check_block_backend(disk)


def test_the_listing_tells_near_misses(capsys: pytest.CaptureFixture[str]) -> None:
    """``cardcage cards -v`` has a line under the device, the security card, and what a card's own kinds look for."""
    list_cards(Host([Cards()], installed=False), verbose=True)
    said = capsys.readouterr().out
    assert said.count('has "rest": did you mean "reset" (Resettable)?') == 2
    assert 'has "plugg": did you mean "plug" (Pluggable)?' in said
    assert 'has "subscibe": did you mean "subscribe" (PolicySource)?' in said
    assert 'has "detatch": did you mean "detach" (Detachable)?' in said


def test_the_log_tells_near_misses_once(capfd: pytest.CaptureFixture[str]) -> None:
    """Plugging warns with the device's name, card and distribution, once for each class; so do policy and checker."""
    host = Host([Scripted(), cardcage_memory_policies, Cards()], installed=False)
    keys = {"platform": "none", "memory": "1M", "accel": "scripted"}
    for _ in range(2):
        with Machine(
            host=host,
            machine=keys,
            devices=[{"type": "rest"}, {"type": "rest"}],
            fragments=[{"policy": {"memory": ["detatch"]}, "security": {"checkers": ["subscibe"]}}],
        ):
            pass
    said = [line for line in capfd.readouterr().err.splitlines() if "near miss" in line]
    assert len(said) == 3
    for line, who, what in zip(
        said,
        ('security "subscibe" (card Cards, given to Host)', 'device "rest" (card Cards, given to Host)', "detatch"),
        ('"subscribe" (PolicySource)', '"reset" (Resettable)', '"detach" (Detachable)'),
        strict=True,
    ):
        assert who in line
        assert what in line


def test_a_vm_is_held_to_what_it_states(capfd: pytest.CaptureFixture[str]) -> None:
    """A VM without a method of its protocol, or of a capability that it states, is its card's mistake; it is closed."""

    class Vm(ScriptedVm):
        def memory_writen_many(self, ranges: Any, /) -> None: ...

    class Card(Scripted):
        stated: frozenset[str] = frozenset()

        def create_vm(self, spec: VmSpec, /) -> ScriptedVm:
            self.vms.append(Vm(spec, (), self.log))
            self.vms[-1].capabilities = self.stated
            return self.vms[-1]

    card = Card()
    keys = {"platform": "none", "memory": "1M", "accel": "scripted"}
    with Machine(host=Host([card], installed=False), machine=keys):
        assert 'has "memory_writen_many": did you mean "memory_written_many"' in capfd.readouterr().err
    card.stated = frozenset({"doorbells"})
    with pytest.raises(CardError, match="has no method 'add_doorbell'"):
        Machine(host=Host([card], installed=False), machine=keys)
    assert card.vms[-1].closed


# our own


def ours() -> list[type]:
    """Every class of ours."""
    found = []
    for shelf in SHELVES:
        for file in sorted(shelf.rglob("*.py")):
            if file.stem != "__main__":
                name = ".".join(file.relative_to(shelf).with_suffix("").parts).removesuffix(".__init__")
                with suppress(MissingExtra):  # of what needs a library that is not here
                    found += [
                        one for one in vars(import_module(name)).values() if getattr(one, "__module__", "") == name
                    ]
    return [one for one in found if isinstance(one, type)]


def is_one(made: type, protocol: Any) -> bool:
    try:
        return bool(require(made, protocol))
    except CardError:
        return False


def test_none_of_ours_has_a_near_miss() -> None:
    """No device, back end, VM, checker or policy of ours has a method that would be taken for a slip."""
    groups = [*BACKENDS.values(), VM, CHECKER, POLICY, (Accelerator,), (MemoryBackend,), (Admission,)]
    classes = ours()
    held = [(one, group) for one in classes for group in groups if is_one(one, group[0])]
    assert len(held) > 20
    for offer in Host().registry:
        made = offer.load() if offer.kind == "device" else None
        if isinstance(made, type):
            held.append((made, tuple(ABILITIES.values())))
        elif has(made, TellsNearMisses):
            assert made.near_misses() == []
    assert {one.__name__: found for one, group in held if (found := near_misses(one, group))} == {}
