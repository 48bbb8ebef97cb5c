"""Places: an error names the file and key of the very value that it is about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from attrs import field, frozen
from cardcage._config.places import Place, place_of, placed
from cardcage.device import Slot
from cardcage.errors import ConfigError, NotOffered
from cardcage.hookspecs import hookimpl
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage.registry import Registry
from hypothesis import given
from hypothesis import strategies as st
from scripted import Scripted


@frozen
class TwoOptions:
    """Two back ends, a list of more, and a table around another."""

    a: str | dict[str, Any] = "null"
    b: str | dict[str, Any] = "null"
    more: list[str] = field(factory=list)
    table: dict[str, Any] = field(factory=dict)


class Two:
    """Opens all that it is given."""

    def __init__(self, options: TwoOptions) -> None:
        self.options = options

    def plug(self, slot: Slot, /) -> None:
        for spec in (self.options.a, self.options.b, *self.options.more, *self.options.table.values()):
            slot.host.open("char", spec)

    def read(self, offset: int, size: int, /) -> int:
        return 0

    def write(self, offset: int, size: int, value: int, /) -> None: ...


class Sink:
    def start(self, received: Any, /) -> None: ...

    def write(self, data: bytes, /) -> None: ...

    def close(self) -> None: ...


class Card:
    """A back end that can be opened once."""

    opened = 0

    @hookimpl
    def cardcage_register(self, registry: Registry) -> None:
        registry.device("two", Two, options=TwoOptions)
        registry.backend("char", "null", lambda slot: Sink())
        registry.backend("char", "once", self.once)

    def once(self, slot: Slot) -> Sink:
        self.opened += 1
        if self.opened > 1:
            raise ConfigError("it is open already")
        return Sink()


CASES = {
    'a = "once"\nb = "once"': "device[0].b",
    'b = "once"\na = "once"': "device[0].b",
    'a = "once"\nmore = ["null", "once"]': "device[0].more[1]",
    'a = { type = "once" }\nb = { type = "once" }': "device[0].b",
    'a = "once"\ntable = { one = "null", other = "once" }': "device[0].table.other",
}


@pytest.mark.parametrize("text", CASES)
def test_of_two_equal_values_the_right_one_is_blamed(text: str, tmp_path: Path) -> None:
    """An option keeps its place from the file to the device, whatever equal value stands elsewhere."""
    file = tmp_path / "vm.toml"
    machine = '[machine]\naccel = "scripted"\nmemory = "1M"\nplatform = "none"\n'
    file.write_text(f'{machine}[[device]]\ntype = "two"\n{text}\n')
    with pytest.raises(ConfigError) as caught:
        Machine.from_toml(file, host=Host([Scripted(), Card()], installed=False))
    assert (caught.value.file, caught.value.key) == (str(file), CASES[text])


def test_a_missing_name_is_told_by_its_kind_of_error() -> None:
    """A name that no card offers raises NotOffered, to which the host adds the cards that are broken."""

    class Broken:
        __name__ = "broken"

        @hookimpl
        def cardcage_register(self, registry: Registry) -> None:
            raise RuntimeError("no card offers anything")

    host = Host([Scripted(), Broken()], installed=False)
    keys = {"platform": "none", "accel": "scripted", "memory": "1M"}
    with pytest.raises(NotOffered, match=r'no card offers device "nothing".*card "broken" .* was left out'):
        Machine(host=host, machine=keys, devices=[{"type": "nothing"}])
    with pytest.raises(NotOffered, match=r"policy\.memroy: no card offers policy key"):
        Machine(host=host, machine=keys, fragments=[{"policy": {"memroy": "x"}}])


names = st.text("abc", min_size=1, max_size=2)
values = st.recursive(
    st.integers() | st.text(max_size=3) | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(names, values, max_size=4))
def test_placed_values_are_what_they_were(table: dict[str, Any]) -> None:
    """Placing changes no value, and each text and table says the path that leads to it."""

    def walk(value: Any, path: str) -> None:
        if isinstance(value, str | dict):
            assert place_of(value, Place()).key == path
        if isinstance(value, dict):
            for key, one in value.items():
                walk(one, f"{path}.{key}")
        elif isinstance(value, list):
            for at, one in enumerate(value):
                walk(one, f"{path}[{at}]")

    found = placed(table, Place("file", "top"))
    assert found == table
    walk(found, "top")
