"""Abilities of cards' objects, read from the Protocol classes themselves, one way for all kinds of objects.

An ability is a :class:`typing.Protocol` with the methods and attributes that it takes. An object has it when they are
all there and its methods can be called as the protocol's are declared. That is found out once, when the object is
handed over; a guest's path calls what was found. A protocol that extends another has the other's members too.

A method whose name is nearly that of one which would be called (``rest`` for ``reset``) is a *near miss*: nobody ever
calls it.
"""

from __future__ import annotations

import inspect
from functools import cache
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeGuard, TypeVar
from weakref import WeakKeyDictionary

from cardcage.errors import CardError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = [
    "TellsNearMisses",
    "calls",
    "check_signature",
    "has",
    "method_names",
    "near_misses",
    "require",
    "tell_near_misses",
]

P = TypeVar("P")
"""Annotated as what ``Callable[..., P]`` gives, because mypy takes no protocol where it is asked for ``type[P]``."""

INFLECTIONS = {"s", "d", "ed", "r", "er", "n", "y", "able"}
"""``closed`` and ``ready`` are words of their own beside ``close`` and ``read``."""
LONG = 8
"""Letters from which two wrong ones in a row, inside, are still the same name."""


class TellsNearMisses(Protocol):
    """A factory that is no class, and knows what it makes, for listings."""

    def near_misses(self) -> list[str]:
        """As :func:`near_misses` of what it makes."""


class _Shape(NamedTuple):
    """How a method is called: numbers of positional arguments, and the names of keyword-only ones."""

    least: int
    most: int
    keywords: tuple[str, ...] = ()

    def __str__(self) -> str:
        count = f"{self.least} to {self.most}" if self.least != self.most else f"{self.most}"
        return f"{count} positional argument{'s' * (self.most != 1)}{''.join(f' and {one}=' for one in self.keywords)}"


class _Members(NamedTuple):
    """A protocol's methods and attributes; *own* are those that it adds to the protocols which it extends."""

    methods: Mapping[str, _Shape]
    attributes: tuple[str, ...]
    own: tuple[str, ...]


@cache
def _members(protocol: Any) -> _Members:
    methods: dict[str, _Shape] = {}
    attributes: dict[str, None] = {}
    own: list[str] = []
    for base in reversed(protocol.__mro__):
        if Protocol not in base.__bases__:
            continue
        names = [one for one in (*vars(base), *inspect.get_annotations(base)) if not one.startswith("_")]
        for name in names:
            method = vars(base).get(name)
            if isinstance(method, FunctionType):
                methods[name] = _shape(method)
            else:
                attributes[name] = None
        own = names
    return _Members(methods, tuple(attributes), tuple(dict.fromkeys(own)))


def _shape(method: FunctionType) -> _Shape:
    code, defaults = method.__code__, method.__defaults__ or ()
    most = code.co_argcount - 1
    return _Shape(most - len(defaults), most, code.co_varnames[code.co_argcount :][: code.co_kwonlyargcount])


def has(owner: object, protocol: Callable[..., P], who: str = "") -> TypeGuard[P]:
    """True when *owner*, an object or (for listings) its class, has the ability *protocol*.

    Without one of the protocol's attributes it has not: a method's name alone may be a word for something else.

    Raises CardError, naming *who*, for a method that cannot be called so, and when one is there and another missing.
    """
    methods, attributes, own = _members(protocol)
    if not any(_there(owner, name, protocol, methods) for name in own):
        return False
    if not all(_there(owner, name, protocol, methods) for name in attributes):
        return False
    missing = next((name for name in methods if not _there(owner, name, protocol, methods)), None)
    if missing is not None:
        present = next(name for name in own if _there(owner, name, protocol, methods))
        raise CardError(f"{_name(owner, who)}: has {present!r} but no {missing!r}{_hint(owner, protocol, missing)}")
    for name, shape in methods.items():
        _fit(owner, name, shape, who)
    return True


def require(owner: object, protocol: Callable[..., P], who: str = "") -> P:
    """*owner*, which must have the ability *protocol*. Raises CardError that names *who* and what is missing or wrong.

    Of a class, only methods are asked: attributes may come with the object.
    """
    methods, attributes, _ = _members(protocol)
    for name, shape in methods.items():
        if not _there(owner, name, protocol, methods):
            raise CardError(f"{_name(owner, who)}: has no method {name!r}{_hint(owner, protocol, name)}")
        _fit(owner, name, shape, who)
    for name in attributes if not isinstance(owner, type) else ():
        if not _there(owner, name, protocol, methods):
            raise CardError(f"{_name(owner, who)}: has no attribute {name!r}{_hint(owner, protocol, name)}")
    return owner  # type: ignore[return-value]  # it has what P declares


def calls(owner: object, protocols: Iterable[Any], who: str = "") -> dict[str, Callable[..., Any]]:
    """The bound methods, by name, of those *protocols* that *owner* has. Raises CardError as :func:`has` does."""
    return {name: getattr(owner, name) for one in protocols if has(owner, one, who) for name in _members(one).methods}


def method_names(protocols: Iterable[Any]) -> set[str]:
    """The names of the methods that *protocols* declare."""
    return {name for one in protocols for name in _members(one).methods}


def check_signature(owner: Any, method: str, arguments: int, who: str, keywords: tuple[str, ...] = ()) -> Any:
    """``getattr(owner, method)``, for a name that no protocol knows. Raises CardError when it cannot be called so."""
    if not callable(getattr(owner, method, None)):
        raise CardError(f"{who}: has no method {method!r}")
    return _fit(owner, method, _Shape(arguments, arguments, keywords), who)


def _name(owner: object, who: str) -> str:
    return who or (owner if isinstance(owner, type) else type(owner)).__name__


def _there(owner: object, name: str, protocol: Any, methods: Mapping[str, _Shape]) -> bool:
    if isinstance(getattr(type(owner), name, None), property) and name not in methods:
        return True  # what it computes may need a device that is plugged in
    found = getattr(owner, name, None)
    if name not in methods:
        return found is not None
    # A class that lists the protocol among its bases inherits declarations, which do nothing.
    return callable(found) and getattr(found, "__func__", found) is not getattr(protocol, name)


def _fit(owner: object, name: str, shape: _Shape, who: str) -> Any:
    """The method. Raises CardError when it cannot be called with *shape*."""
    found = getattr(owner, name)
    function, bound = (found.__func__, 1) if isinstance(found, MethodType) else (found, 0)
    if isinstance(owner, type) and isinstance(found, FunctionType):
        bound = not isinstance(inspect.getattr_static(owner, name), staticmethod)
    if isinstance(function, FunctionType) and _plainly_fits(function, shape, bound):
        return found
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):  # written in C: there is nothing to look at
        return found
    unbound = bound if found is function else 0
    try:
        for count in {shape.least, shape.most}:
            signature.bind(*[None] * (count + unbound), **dict.fromkeys(shape.keywords))
    except TypeError as error:
        raise CardError(f"{_name(owner, who)}: {name}{signature} does not take {shape}: {error}") from error
    return found


def _plainly_fits(function: FunctionType, shape: _Shape, bound: int) -> bool:
    """The usual case at a twentieth of what :func:`inspect.signature` costs. False: look again, slowly."""
    code = function.__code__
    most = code.co_argcount - bound
    least = most - len(function.__defaults__ or ())
    keywords = code.co_varnames[code.co_argcount :][: code.co_kwonlyargcount]
    needed = [one for one in keywords if one not in (function.__kwdefaults__ or ())]
    return (
        not hasattr(function, "__wrapped__")
        and least <= shape.least
        and (most >= shape.most or bool(code.co_flags & inspect.CO_VARARGS))
        and set(needed) <= set(shape.keywords) <= set(keywords)
    )


def near_misses(owner: object, protocols: Iterable[Any]) -> list[str]:
    """Names that *owner*, an object or its class, nearly has: ``has "rest": did you mean "reset" (Resettable)?``.

    A line for each public name of its class that is no member of one of *protocols*, but close to one that it lacks.
    """
    cls = owner if isinstance(owner, type) else type(owner)
    found: dict[tuple[str, str], str] = {}
    for name, member, protocol in _near(cls, tuple(protocols)):
        if not _there(owner, member, protocol, _members(protocol).methods):
            line = f'has "{name}": did you mean "{member}" ({protocol.__name__})?'
            found.setdefault((name, member), line)
    return list(found.values())


_told: WeakKeyDictionary[type, set[str]] = WeakKeyDictionary()


def tell_near_misses(owner: object, protocols: Iterable[Any], who: str, log: Any) -> None:
    """Warn in *log* of what :func:`near_misses` finds, once for each class in this process."""
    for line in near_misses(owner, protocols):
        told = _told.setdefault(type(owner), set())
        if line not in told:
            told.add(line)
            log.warning("near miss: nobody calls this", who=who, why=line)


def _hint(owner: object, protocol: Any, missing: str) -> str:
    cls = owner if isinstance(owner, type) else type(owner)
    close = next((name for name, member, _ in _near(cls, (protocol,)) if member == missing), None)
    return f'; did you mean it by "{close}"?' if close is not None else ""


@cache
def _near(cls: type, protocols: tuple[Any, ...]) -> list[tuple[str, str, Any]]:
    """(name, member, protocol) of each public name of *cls* that is close to a member, and is none itself."""
    by_letter: dict[str, list[tuple[str, str, bool, Any]]] = {}
    known: set[str] = set()
    for protocol in protocols:
        methods, attributes, _ = _members(protocol)
        known.update(methods, attributes)
        for member in (*methods, *attributes):
            by_letter.setdefault(member[0], []).append((member, _letters(member), member in methods, protocol))
    found = []
    names = {name: value for base in reversed(cls.__mro__[:-1]) for name, value in vars(base).items()}
    for name, value in names.items():
        if name[0] == "_" or name in known or (near := by_letter.get(name[0].lower())) is None:
            continue
        method = isinstance(value, (FunctionType, classmethod, staticmethod))
        letters = _letters(name)
        found += [(name, one[0], one[3]) for one in near if one[2] is method and _close(letters, one[1])]
    return found


def _letters(name: str) -> str:
    return name.replace("_", "").lower()


def _close(name: str, member: str) -> bool:
    """True when *name* is *member* misspelt: a letter more, less or wrong, or two exchanged; never the first.

    A ratio of equal letters, as difflib gives, calls ``closed`` closer to ``close`` than ``detatch`` to ``detach``.
    """
    if abs(len(name) - len(member)) > 2:
        return False
    if name == member:
        return True
    start = 0
    while start < min(len(name), len(member)) and name[start] == member[start]:
        start += 1
    end = 0
    while end < min(len(name), len(member)) - start and name[-1 - end] == member[-1 - end]:
        end += 1
    here, there = name[start : len(name) - end], member[start : len(member) - end]
    if not start or (not there and not end and here in INFLECTIONS):
        return False
    if len(here) + len(there) == 1 or (len(here) == 2 and here == there[::-1]):
        return len(member) >= 4
    longest = max(len(here), len(there))
    return (longest == 1 and len(member) >= 6) or (longest == 2 and len(member) >= LONG and end > 0)
