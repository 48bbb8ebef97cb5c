"""Value classes that each start of the program makes: attrs', with less to compile.

attrs compiles a class's methods whenever the class is made. Most of that is comparison, hash and representation, which
hardly any run calls: here these are ordinary functions. All else is attrs' own.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any

import attrs

__all__ = ["define", "frozen"]

if TYPE_CHECKING:
    from attrs import define, frozen
else:

    def define(cls=None, /, **how):
        """``attrs.define``."""
        return _make(attrs.define, cls, how)

    def frozen(cls=None, /, **how):
        """``attrs.frozen``."""
        return _make(attrs.frozen, cls, how)


def _make(decorator: Any, cls: Any, how: dict[str, Any]) -> Any:
    if cls is None:
        return lambda cls: _make(decorator, cls, how)
    own, wanted = {*vars(cls)}, {"eq": True, "repr": True} | how
    cls = decorator(**how | {"eq": False, "repr": False})(cls)
    compared = [one.name for one in cls.__attrs_attrs__ if one.eq]
    key = attrgetter(*compared) if compared else lambda self: ()

    def __eq__(self: Any, other: object) -> Any:
        return key(self) == key(other) if other.__class__ is self.__class__ else NotImplemented

    def __hash__(self: Any) -> int:
        return hash(key(self))

    def __repr__(self: Any) -> str:
        shown = (f"{one.name}={getattr(self, one.name)!r}" for one in cls.__attrs_attrs__ if one.repr)
        return f"{type(self).__qualname__.rpartition('>.')[2]}({', '.join(shown)})"

    methods: dict[str, Any] = {"__repr__": __repr__} if wanted["repr"] else {}
    if wanted["eq"]:
        methods |= {"__eq__": __eq__, "__hash__": __hash__ if decorator is attrs.frozen else None}
    for name in methods.keys() - own:
        setattr(cls, name, methods[name])
    return cls
