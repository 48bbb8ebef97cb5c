"""Plain tables to typed attrs classes, strictly, with errors a person can act on.

Nothing is guessed: no "no" -> True, no 1.9 -> 1, no unknown key. What TOML can say maps to: ``bool int float str``,
``list tuple set dict``, attrs classes (tables), ``X | Y``, ``Literal``, enums (by value), ``pathlib.Path`` (from text),
:class:`~cardcage.units.Size` and :class:`~cardcage.units.Duration`. ``Any`` and ``object`` take anything.
"""

from __future__ import annotations

import re
from enum import Enum
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import attrs

from cardcage._config.places import HostPath, PlacedTable, PlacedText, beside
from cardcage.errors import CardcageError, CardError, ConfigError, in_words, near, place_of_error
from cardcage.units import Duration, Size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

T = TypeVar("T")

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    tuple: "a list",
    dict: "a table",
    NoneType: "nothing",
    Size: 'a size such as "512M"',
    Duration: 'a time such as "250ms"',
    Path: "a path",
}
_KINDS = {*_WORDS, set, frozenset, Literal, Union, UnionType, Any, object} - {NoneType}


def structure(
    table: Mapping[str, Any], cls: type[T], *, file: str | None = None, key: str | None = None, who: str = ""
) -> T:
    """Make a *cls* (an attrs class) of *table*.

    Args:
        file, key: where the table stands, for the error.
        who: whose class it is, for the error.

    Raises :exc:`~cardcage.errors.ConfigError` with the key path, what was expected and near matches, and CardError for
    what is wrong with *cls*.
    """
    try:
        made: T = _made(dict(table), cls)
        return made
    except ConfigError:
        raise
    except Exception as error:  # whatever converters and validators raised
        path, problem, cause = _explain(error)
        if not isinstance(cause, (ValueError, TypeError, CardcageError)):
            raise CardError(f"{who or cls.__name__}: {_fault(cause, cls)}") from error
        raise ConfigError(problem, file=file, key=(_join(key, path) if key else path) or None) from error


def check_options(cls: Any, taken: Iterable[str], who: str) -> None:
    """Hold a card's options class to what :func:`structure` takes. Raises CardError that names *who*.

    Args:
        taken: keys beside the options, which never reach the card.
    """
    if not _is_class(cls):
        what = "an attrs class (@attrs.frozen above it)"
        raise CardError(f"{who}: options: expected {what}, got {getattr(cls, '__name__', cls)}{_written(cls)}")
    for name in taken:
        if name in cls.__annotations__ or name in vars(cls):
            what = "expected another name, because that key is the machine's own"
            raise CardError(f'{who}: option "{name}" of {cls.__name__}: {what}{_written(cls, name)}')


def _is_class(kind: Any) -> bool:
    """True for what a table is made into: an attrs class, or a dataclass."""
    return isinstance(kind, type) and (attrs.has(kind) or hasattr(kind, "__dataclass_fields__"))


def _fault(error: BaseException, cls: type) -> str:
    """What is wrong with an options class, from what its use raised."""
    if isinstance(error, NameError) and error.name and not place_of_error(error, outside=True):
        what = "does not resolve: expected a name that its module has"
        return f'{cls.__name__}: the annotation "{error.name}" {what}{_written(cls, error.name)}'
    if isinstance(error, _NoValue):
        what = (
            f"no value of a configuration becomes a {_word(error.kind)}: expected bool, int, str, an attrs class, ..."
        )
        return f"{cls.__name__}: {what}{_written(cls, getattr(error.kind, '__name__', ''))}"
    return f"{cls.__name__}: {in_words(error)}"


def _written(cls: Any, word: str = "") -> str:
    """`` (FILE:LINE)`` of a class: of the first annotated name in its file in whose line *word* is, else its own."""
    import inspect

    try:
        lines, at = inspect.getsourcelines(cls)
        whole = inspect.getsource(inspect.getmodule(cls) or cls).splitlines()
        file = inspect.getsourcefile(cls)
    except (OSError, TypeError):  # made by a program
        return ""
    for text, start in ((lines, at), (whole, 1)):
        for number, line in enumerate(text, start) if word else ():
            if re.match(rf"\s+\w+\s*:.*\b{re.escape(word)}\b|\s+{re.escape(word)}\s*:", line):
                return f" ({file}:{number})"
    return f" ({file}:{at})"


def _shape(kind: Any) -> Any:
    """The generic's origin (``list`` of ``list[int]``), or the type itself."""
    kind = _bare(kind)
    return str if kind == HostPath else get_origin(kind) or kind


def _bare(kind: Any) -> Any:
    """The type beneath NewType and Annotated; text that is a path stays that."""
    kind = getattr(kind, "__supertype__", kind)
    return _bare(get_args(kind)[0]) if get_origin(kind) is Annotated and kind != HostPath else kind


def _is_enum(kind: Any) -> Any:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _word(kind: Any) -> str:
    origin = _shape(kind)
    if _is_class(origin):
        return "a table"
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_word(one) for one in get_args(kind) if one is not NoneType))
    return _WORDS.get(origin, getattr(origin, "__name__", str(origin)))


def _got(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    return "a table" if isinstance(value, dict) else "a list" if isinstance(value, (list, tuple)) else repr(value)


def _fits(kind: Any, value: object) -> bool:
    """Whether *value* has the TOML shape that *kind* is written in."""
    origin = _shape(kind)
    if origin in (Any, object):
        return True
    if _is_class(origin) or origin is dict:
        return isinstance(value, (dict, origin))
    if origin in (list, tuple, set, frozenset):
        return isinstance(value, (list, tuple))
    if origin is Literal:
        return value in get_args(kind)
    if origin is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if origin in (Size, Duration):
        return isinstance(value, (int, float, str)) and not isinstance(value, bool)
    if origin is Path:
        return isinstance(value, (str, Path))
    if _is_enum(origin):
        return any(value == one.value for one in origin)
    return type(value) is origin or (origin is str and isinstance(value, PlacedText))


def _made(value: Any, kind: Any) -> Any:
    """Make a *kind* of *value*. Raises whatever tells what is wrong, in :class:`_Inside` for each step down to it."""
    kind, shape = _bare(kind), _shape(kind)
    if shape in (Union, UnionType):
        for one in get_args(kind):
            if _fits(one, value):
                return None if one is NoneType else _made(value, one)
    if not (_is_class(shape) or _is_enum(shape) or shape in _KINDS):
        raise _NoValue(kind)
    if not _fits(kind, value):
        if shape is not Literal and not _is_enum(shape):
            raise ValueError(f"expected {_word(kind)}, got {_got(value)}")
        known = [one.value for one in kind] if _is_enum(shape) else list(get_args(kind))
        hint = near(value, [one for one in known if isinstance(one, str)]) if isinstance(value, str) else ""
        raise ValueError(f"expected one of {', '.join(_got(one) for one in known)}, got {_got(value)}.{hint}")
    if _is_class(shape):
        return value if isinstance(value, shape) else _table(value, shape)
    if shape in (list, tuple, set, frozenset):
        return shape(_inside(f"[{at}]", value[at], one) for at, one in enumerate(_kinds(shape, get_args(kind), value)))
    if shape is dict:
        keys, values = get_args(kind) or (str, Any)
        made = {_made(at, keys): _inside(str(at), one, values) for at, one in value.items()}
        return PlacedTable(made, value.place) if isinstance(value, PlacedTable) else made
    if shape is Path or kind == HostPath:
        return shape(beside(value) if isinstance(value, str) else value)
    return value if shape in (Any, object, Literal, str) else shape(value)  # text keeps its place


def _kinds(shape: Any, kinds: tuple[Any, ...], value: Any) -> Sequence[Any]:
    """The type of each element of a list."""
    if shape is not tuple or not kinds or kinds[-1] is Ellipsis:
        return [kinds[0] if kinds else Any] * len(value)
    if len(kinds) != len(value):
        raise ValueError(f"expected a list of {len(kinds)}, got {len(value)}")
    return kinds


def _table(table: dict[str, Any], cls: Any) -> Any:
    """A *cls* of a table. An unknown key is named first: a missing key is often the same word, misspelt."""
    known = _fields(cls)
    if unknown := table.keys() - known.keys():
        wrong = min(map(str, unknown))
        hint = near(wrong, known) or f" Known: {', '.join(sorted(known)) or 'none'}."
        raise _Inside(wrong) from ValueError(f"no such key.{hint}")
    for name, (_, kind, needed) in known.items():
        if needed and name not in table:
            raise _Inside(name) from ValueError(f"missing: expected {_word(kind)}")
    return cls(**{known[name][0]: _inside(name, value, known[name][1]) for name, value in table.items()})


@cache
def _fields(cls: Any) -> dict[str, tuple[str, Any, bool]]:
    """By key: the argument of *cls*, its type, and whether there has to be one."""
    hints = get_type_hints(cls, include_extras=True)
    if attrs.has(cls):
        found = [
            (one.name, one.alias or one.name, one.default is attrs.NOTHING) for one in attrs.fields(cls) if one.init
        ]
    else:
        from dataclasses import MISSING, fields

        plain = [one for one in fields(cls) if one.init]
        found = [(one.name, one.name, one.default is one.default_factory is MISSING) for one in plain]
    return {name: (alias, hints.get(name, Any), needed) for name, alias, needed in found}


class _NoValue(Exception):
    """No value of a configuration becomes a *kind*."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind


class _Inside(Exception):
    """A problem below an index or key."""

    def __init__(self, at: str) -> None:
        self.at = at


def _inside(at: str, value: Any, kind: Any) -> Any:
    try:
        return _made(value, kind)
    except Exception as error:  # whatever was raised, it gets its place here
        raise _Inside(at) from error


def _explain(error: BaseException) -> tuple[str, str, BaseException]:
    """The key path and the problem, and the error itself."""
    if isinstance(error, _Inside) and error.__cause__ is not None:
        path, problem, cause = _explain(error.__cause__)
        return _join(error.at, path), problem, cause
    # attrs validators say "'cpus' must be >= 1: 0", some with the attribute and the value as further arguments.
    text = str(error.args[0]) if error.args else str(error)
    named_first = re.match(r"'(\w+)' (.+)", text, re.DOTALL) if isinstance(error, (TypeError, ValueError)) else None
    return (named_first[1], named_first[2], error) if named_first else ("", text, error)


def _join(head: str, tail: str) -> str:
    return head + tail if not tail or tail.startswith("[") else f"{head}.{tail}"
