"""A test's words about its guests: the marker's keys, over the command line's, over those of the ini-file."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import pytest
from attrs import frozen
from cardcage.errors import near
from cardcage.machine import Machine as PlainMachine

from cardcage_pytest.plugin import KEYS, LIMITS

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage_agent import Machine

__all__ = ["Spec", "spec_of"]


@frozen
class Spec:
    """A guest as it was asked for.

    Attributes:
        maker: a name, such as ``"debian"`` for ``Machine.debian``, or a function that takes the class and *keys*.
        keys: its arguments. limits: seconds, as text or numbers; empty for none.
    """

    maker: str | Callable[..., Machine]
    keys: dict[str, Any]
    limits: dict[str, Any]

    @property
    def key(self) -> str:
        """The same for two guests that are made alike."""
        return repr((self.maker, sorted(self.keys.items())))

    def limit(self, name: str) -> float | None:
        """A limit in seconds; None for none. Fails the test for what is no number above 0."""
        value = self.limits[name]
        if value in ("", None):
            return None
        try:
            seconds = float(value)
        except (TypeError, ValueError):
            seconds = 0.0
        if not seconds > 0:
            raise pytest.fail.Exception(f"{name}: expected seconds, more than 0, got {value!r}", pytrace=False)
        return seconds

    def make(self, cls: type[Machine]) -> Machine:
        """A machine, not started. Fails the test for a key that the maker does not take."""
        if isinstance(self.maker, str):
            try:
                make = getattr(cls, self.maker)
            except AttributeError as error:
                raise pytest.fail.Exception(f"cardcage marker: maker: {error}", pytrace=False) from None
            known = {*inspect.signature(make).parameters, *inspect.signature(PlainMachine.__init__).parameters}
            known -= {"self", "cls", "keys"}
            for name in self.keys:
                if name not in known:
                    hint = near(name, [*known, *LIMITS]) or f" Known: {', '.join(sorted(known))}."
                    raise pytest.fail.Exception(f'cardcage marker: no key "{name}".{hint}', pytrace=False)
            made: Machine = make(**self.keys)
            return made
        return self.maker(cls, **self.keys)


def spec_of(where: pytest.FixtureRequest | pytest.Item, given: dict[str, Any]) -> Spec:
    """The keys for a test, or for a fixture of its scope: *given* over the nearest marker over what it stands in."""
    node = where.node if isinstance(where, pytest.FixtureRequest) else where
    config = where.config
    found: dict[str, Any] = {}
    for name in KEYS:
        value = getattr(config.option, f"cardcage_{name}") or config.getini(f"cardcage_{name}")
        if value:
            found[name] = int(value) if name == "cpus" and str(value).isdigit() else value
    limits = {name: config.getini(f"cardcage_{name}") for name in LIMITS}
    for mark in reversed(list(node.iter_markers("cardcage"))):  # the nearest comes first
        if mark.args:
            raise pytest.fail.Exception(
                f"cardcage marker: expected keys, such as memory='1G', got {mark.args[0]!r}", pytrace=False
            )
        found |= mark.kwargs
    found |= given
    limits |= {name: found.pop(name) for name in LIMITS if name in found}
    return Spec(found.pop("maker", "debian"), found, limits)
