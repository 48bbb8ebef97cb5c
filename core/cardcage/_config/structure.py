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
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin

import attrs

from cardcage._config.places import HostPath, PlacedTable, PlacedText, beside
from cardcage.errors import CardcageError, CardError, ConfigError, in_words, near, place_of_error
from cardcage.units import Duration, Size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from cattrs import Converter

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
        return _converter().structure(dict(table), cls)
    except ConfigError:
        raise
    except Exception as error:  # cattrs raises groups of whatever the hooks and validators raised
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
    kind = getattr(error, "type_", None)
    if kind is not None:
        what = f"no value of a configuration becomes a {_word(kind)}: expected bool, int, str, an attrs class, ..."
        return f"{cls.__name__}: {what}{_written(cls, getattr(kind, '__name__', ''))}"
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


def unstructure(value: Any) -> Any:
    """The inverse of :func:`structure`: tables, lists and plain values (bytes stay bytes)."""
    return _converter().unstructure(value)


def _shape(kind: Any) -> Any:
    """The generic's origin (``list`` of ``list[int]``), or the type itself."""
    return str if kind == HostPath else get_origin(kind) or kind


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


def _mismatch(kind: Any, value: object) -> ValueError:
    return ValueError(f"expected {_word(kind)}, got {_got(value)}")


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


@cache
def _converter() -> Converter:
    """The one converter: made when the first table is structured, because cattrs is slow to import."""
    from cattrs import Converter
    from cattrs.gen import make_dict_structure_fn

    converter = Converter(forbid_extra_keys=True, detailed_validation=True)

    def plain(value: Any, kind: Any) -> Any:
        if not _fits(kind, value):
            raise _mismatch(kind, value)
        if kind is Path or kind == HostPath:
            return _shape(kind)(beside(value) if isinstance(value, str) else value)
        return value if kind is str else kind(value)  # text keeps its place

    def union(value: Any, kind: Any) -> Any:
        for one in get_args(kind):
            if _fits(one, value):
                return None if one is NoneType else converter.structure(value, one)
        raise _mismatch(kind, value)

    def choice(value: Any, kind: Any) -> Any:
        if not _fits(kind, value):
            known = [one.value for one in kind] if _is_enum(kind) else list(get_args(kind))
            hint = near(value, [one for one in known if isinstance(one, str)]) if isinstance(value, str) else ""
            raise ValueError(f"expected one of {', '.join(_got(one) for one in known)}, got {_got(value)}.{hint}")
        return kind(value) if _is_enum(kind) else value

    def sequence(value: Any, kind: Any) -> Any:
        if not _fits(kind, value):
            raise _mismatch(kind, value)
        origin, arguments = _shape(kind), get_args(kind)
        kinds: list[Any] = [arguments[0] if arguments else Any] * len(value)
        if origin is tuple and arguments and arguments[-1] is not Ellipsis:
            if len(arguments) != len(value):
                raise ValueError(f"expected a list of {len(arguments)}, got {len(value)}")
            kinds = list(arguments)
        return origin([_inside(converter, one, value[at], f"[{at}]") for at, one in enumerate(kinds)])

    def mapping(value: Any, kind: Any) -> Any:
        if not _fits(kind, value):
            raise _mismatch(kind, value)
        keys, values = get_args(kind) or (str, Any)
        made = {converter.structure(at, keys): _inside(converter, values, one, str(at)) for at, one in value.items()}
        return PlacedTable(made, value.place) if isinstance(value, PlacedTable) else made

    def table(kind: Any) -> Any:
        inner: Any = make_dict_structure_fn(kind, converter, _cattrs_forbid_extra_keys=True)

        def hook(value: Any, target: Any) -> Any:
            if isinstance(value, _shape(kind)):
                return value
            if not _fits(kind, value):
                raise _mismatch(kind, value)
            return inner(value, target)

        return hook

    shapes = (list, tuple, set, frozenset)
    for kind in (bool, int, float, str, Path, Size, Duration):
        converter.register_structure_hook(kind, plain)
    converter.register_structure_hook_factory(_is_class, table)
    converter.register_structure_hook_func(lambda kind: _shape(kind) in (Union, UnionType), union)
    converter.register_structure_hook_func(lambda kind: _shape(kind) is Literal, choice)
    converter.register_structure_hook_func(_is_enum, choice)
    converter.register_structure_hook_func(lambda kind: kind in (Any, object), lambda value, _: value)
    converter.register_structure_hook_func(lambda kind: _shape(kind) in shapes, sequence)
    converter.register_structure_hook_func(lambda kind: _shape(kind) is dict, mapping)
    converter.register_structure_hook_func(lambda kind: kind == HostPath, plain)
    return converter


class _Inside(Exception):
    """A problem below an index or key."""

    def __init__(self, at: str) -> None:
        self.at = at


def _inside(converter: Converter, kind: Any, value: Any, at: str) -> Any:
    try:
        return converter.structure(value, kind)
    except Exception as error:  # whatever the inner hook raised, it gets its place here
        raise _Inside(at) from error


def _explain(error: BaseException) -> tuple[str, str, BaseException]:
    """The key path and the problem of the first error in what cattrs raised, and that error itself."""
    from cattrs.errors import ClassValidationError, ForbiddenExtraKeysError

    if isinstance(error, _Inside) and error.__cause__ is not None:
        path, problem, cause = _explain(error.__cause__)
        return _join(error.at, path), problem, cause
    if isinstance(error, ClassValidationError):
        named, others = error.group_exceptions()
        # An unknown key is named first: a missing key is often the same word, misspelt.
        for other in others:
            if isinstance(other, ForbiddenExtraKeysError):
                known = list(getattr(other.cl, "__dataclass_fields__", ())) or [
                    one.name for one in attrs.fields(other.cl)
                ]
                wrong = min(other.extra_fields)
                hint = near(wrong, known) or f" Known: {', '.join(sorted(known)) or 'none'}."
                return wrong, f"no such key.{hint}", ValueError()
        if named:
            inner, note = named[0]
            if isinstance(inner, KeyError) and (inner.__traceback__ is None or inner.__traceback__.tb_next is None):
                return note.name, f"missing: expected {_word(note.type)}", ValueError()  # a deeper one is the card's
            path, problem, cause = _explain(inner)
            return _join(note.name, path), problem, cause
        return _explain(others[0])
    # attrs validators say "'cpus' must be >= 1: 0", some with the attribute and the value as further arguments.
    text = str(error.args[0]) if error.args else str(error)
    named_first = re.match(r"'(\w+)' (.+)", text, re.DOTALL) if isinstance(error, (TypeError, ValueError)) else None
    return (named_first[1], named_first[2], error) if named_first else ("", text, error)


def _join(head: str, tail: str) -> str:
    return head + tail if not tail or tail.startswith("[") else f"{head}.{tail}"
