"""Value classes: what attrs makes of them, without its compiled methods."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from attrs import field
from cardcage import values


def made(decorator: Any, **how: Any) -> Any:
    """A class with one field of each sort, by *decorator*."""

    class Pair:
        left: int
        right: str = field(default="", converter=str)
        unseen: int = field(default=0, repr=False)
        aside: int = field(default=0, eq=False)

    return decorator(**how)(Pair) if how else decorator(Pair)


@pytest.mark.parametrize("kind", ["define", "frozen"])
def test_a_class_is_as_attrs_makes_it(kind: str) -> None:
    """Equality, hash, representation, ``evolve`` and ``asdict`` are those of attrs' own class."""
    ours, theirs = made(getattr(values, kind)), made(getattr(attrs, kind))
    samples: list[dict[str, Any]] = [
        *({"left": 1}, {"left": 2}, {"left": 1, "right": 1}, {"left": 1, "unseen": 1}, {"left": 1, "aside": 1})
    ]
    for one in samples:
        assert repr(ours(**one)) == repr(theirs(**one))
        assert attrs.asdict(ours(**one)) == attrs.asdict(theirs(**one))
        for other in samples:
            assert (ours(**one) == ours(**other)) == (theirs(**one) == theirs(**other))
            if kind == "frozen" and theirs(**one) == theirs(**other):
                assert hash(ours(**one)) == hash(ours(**other))
    assert ours(1) != theirs(1)
    assert attrs.evolve(ours(1), left=2) == ours(2)
    assert (ours.__hash__ is None) == (theirs.__hash__ is None)


def test_what_a_class_has_or_does_without_stays() -> None:
    """A class keeps its own methods, and ``eq=False`` and ``repr=False`` leave those of ``object``."""

    @values.frozen
    class Own:
        number: int

        def __eq__(self, other: object) -> bool:
            return True

        def __repr__(self) -> str:
            return "own"

        __hash__ = None  # type: ignore[assignment]

    assert (repr(Own(1)), Own(1) == Own(2), Own.__hash__) == ("own", True, None)
    bare = made(values.define, eq=False, repr=False)
    assert bare(1) != bare(1)
    assert bare.__repr__ is object.__repr__
    assert bare.__hash__ is object.__hash__


def test_a_class_without_fields_has_one_value() -> None:
    """Two values of a class that has no fields are equal."""

    @values.frozen
    class Nothing:
        pass

    assert Nothing() == Nothing()
    assert len({Nothing(), Nothing()}) == 1
    assert repr(Nothing()) == "Nothing()"
