"""What cards add to the face of a machine: attributes of it, and ways to make one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from cardcage.errors import CardError
from cardcage.hookspecs import hookimpl
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage.registry import Registry, VerbOffer
from scripted import Scripted


def greet(machine: Any, name: str = "you") -> str:
    """A verb."""
    return f"{machine.name} greets {name}"


label = property(lambda machine: f"<{machine.name}>")


def small(cls: Any, *, name: str, host: Host | None = None) -> Any:
    """A way to make a machine."""
    return cls(name=name, memory="1M", accel="scripted", machine={"platform": "none"}, host=host)


class Card:
    """Offers them."""

    __name__ = "greeter"

    @hookimpl
    def cardcage_register(self, registry: Registry) -> None:
        registry.accelerator("scripted", Scripted)
        registry.verb("greet", f"{__name__}:greet")
        registry.verb("tag", f"{__name__}:label")
        registry.verb("gone", f"{__name__}:gone")


@pytest.fixture
def machine() -> Any:
    with small(Machine, name="one", host=Host([Card()], installed=False)) as made:
        yield made


def test_a_verb_is_as_if_the_class_had_it(machine: Any) -> None:
    """A function is bound to the machine, a property is computed of it, and neither is stored in it."""
    assert machine.greet("me") == "one greets me"
    assert machine.tag == "<one>"
    assert "greet" not in vars(machine)


def test_what_nobody_offers_is_no_attribute(machine: Any) -> None:
    """AttributeError names what is near; hasattr, names with an underscore and an unfinished machine get it too."""
    with pytest.raises(AttributeError, match=re.escape("no attribute 'gret', and no card offers it. Did")):
        machine.gret  # noqa: B018  the access is the test
    assert not hasattr(machine, "small")
    assert not hasattr(machine, "_greet")
    assert not hasattr(Machine.__new__(Machine), "greet")


def test_a_verb_that_cannot_be_imported_is_its_cards_fault(machine: Any) -> None:
    """CardError names the card."""
    with pytest.raises(CardError, match=re.escape('verb "gone" (card greeter')):
        machine.gone  # noqa: B018  the access is the test


@pytest.fixture
def makers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution that announces two."""
    folder = tmp_path / "makes-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: makes\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(f"[cardcage.makers]\nsmall = {__name__}:small\nlost = nowhere:lost\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_a_way_to_make_machines_is_an_attribute_of_the_class(makers: None) -> None:
    """It gets the class that it was asked of; what nobody announces is an AttributeError that names what is near."""

    class Mine(Machine):
        pass

    with Mine.small(name="two", host=Host([Card()], installed=False)) as made:  # type: ignore[attr-defined]
        assert (type(made), made.name) == (Mine, "two")
    with pytest.raises(AttributeError, match=re.escape("no attribute 'smal', and no card makes one. Did you mean")):
        Machine.smal  # type: ignore[attr-defined]  # noqa: B018  the access is the test
    assert not hasattr(Machine, "_small")
    with pytest.raises(CardError, match=re.escape("maker 'lost' (makes 1.0): ModuleNotFoundError")):
        Machine.lost  # type: ignore[attr-defined]  # noqa: B018  the access is the test


def test_a_card_that_imports_the_class_is_looked_through_for_hooks(makers: None) -> None:
    """Asking the class for a hook's mark makes no host, which would load that card again."""
    assert not hasattr(Machine, "cardcage_impl")
    with Host([Card()], installed=False) as host:
        assert not host.broken


def test_a_verbs_name_is_a_python_name() -> None:
    """The registry refuses another."""
    with pytest.raises(CardError, match="expected a name like"):
        Registry().add(VerbOffer("Not-One", greet))
