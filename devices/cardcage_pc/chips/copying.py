"""Copies of chips' states: what :func:`copy.deepcopy` gives, in a third of its time."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["copied"]

S = TypeVar("S")
PLAIN = frozenset({int, bool, float, str, bytes, type(None)})


def copied(state: S) -> S:
    """A copy of *state*, an instance of an attrs class: of all lists, dictionaries and attrs instances in it, too.

    What shows at two places in it is two things in the copy.
    """
    kind = type(state)
    if kind in PLAIN:
        return state
    found: object
    if kind is list:
        found = [one if type(one) in PLAIN else copied(one) for one in state]  # type: ignore[attr-defined]  # a list
    elif names := _names(kind):  # type: ignore[arg-type]  # classes can be hashed
        found, put = object.__new__(kind), object.__setattr__  # no validator, and no matter whether it is frozen
        for name in names:
            one = getattr(state, name)
            put(found, name, one if type(one) in PLAIN else copied(one))
    else:
        found = deepcopy(state)
    return found  # type: ignore[return-value]  # it is of the same class


@cache
def _names(kind: Callable[..., object]) -> tuple[str, ...]:
    """Attributes of an attrs class's instances, none for others."""
    return tuple(one.name for one in getattr(kind, "__attrs_attrs__", ()))
