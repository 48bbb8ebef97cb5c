"""A command's signature as QMP's schema (docs/devel/qapi-code-gen.rst, "Client JSON Protocol introspection").

What a function's annotations say is checked when a peer calls it and told when a peer asks: there is no second list.
"""

from __future__ import annotations

import inspect
from functools import cached_property
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    NotRequired,
    Required,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from cardcage.errors import FAULTS, CardcageError, CardError, in_words
from cardcage.values import frozen

from cardcage_qmp import QmpCommand, QmpEvent
from cardcage_qmp.errors import QmpError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.host import Host

__all__ = ["Command", "Parameter", "Table", "check", "table_of"]

BUILTIN: dict[Any, tuple[str, str]] = {
    str: ("str", "string"),
    int: ("int", "int"),
    float: ("number", "number"),
    bool: ("bool", "boolean"),
    Any: ("any", "value"),
    object: ("any", "value"),
    NoneType: ("null", "null"),
}
WORDS = {str: "string", int: "integer", float: "number", bool: "boolean", dict: "object", list: "array"}
"""QEMU's words for what was expected."""


@frozen
class Parameter:
    """An argument: its name in QMP and in Python, its type, and whether it may be left out."""

    name: str
    python: str
    type: Any
    optional: bool


@frozen
class Command:
    """A command that was loaded: its offer, function, arguments, and what it returns."""

    offer: QmpCommand
    function: Callable[..., Any]
    parameters: tuple[Parameter, ...]
    returns: Any
    boxed: Any = None
    """The type of all the arguments as one object, where the function takes them so."""
    is_open: bool = False
    """It takes arguments that the schema does not list, as they are."""

    def bind(self, arguments: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The function's arguments, by place and by keyword. Raises QmpError in QEMU's words."""
        if self.boxed is not None:
            check(arguments, self.boxed, "")
            return (arguments,), {}
        known = {one.name: one for one in self.parameters}
        for name in arguments:
            if name not in known and not self.is_open:
                raise QmpError(f"Parameter '{name}' is unexpected")
        for one in self.parameters:
            if not one.optional and one.name not in arguments:
                raise QmpError(f"Parameter '{one.name}' is missing")
        found, rest = {}, {}
        for name, value in arguments.items():
            if name in known:
                check(value, known[name].type, name)
                found[known[name].python] = value
            else:
                rest[name] = value
        return ((rest,) if self.is_open else ()), found


def loaded(offer: QmpCommand) -> Command:
    """Import the command, and read its signature. Raises CardError."""
    function = offer.load()
    try:
        hints = get_type_hints(function)
        _, *rest = inspect.signature(function).parameters.values()
        parameters: list[Parameter] = []
        whole = [hints[one.name] for one in rest if one.kind is one.POSITIONAL_ONLY]
        is_open = whole == [dict[str, Any]]
        boxed = None if is_open or not whole else whole[0]
        if len(whole) > 1 or (boxed is not None and (len(rest) > 1 or not tables_of(boxed))):
            raise TypeError("expected one parameter before the slash, of a TypedDict or dict[str, Any]")
        for one in rest:
            if one.kind is one.POSITIONAL_ONLY:
                continue
            if one.kind not in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY):
                raise TypeError(f"*{one.name}: expected a parameter with a name")
            kind = _without_none(hints[one.name])
            name = one.name.rstrip("_").replace("_", "-")
            parameters.append(Parameter(name, one.name, kind, one.default is not one.empty))
        made = Command(offer, function, tuple(parameters), hints.get("return", NoneType), boxed, is_open)
        Schema().add_command(made)
        return made
    except FAULTS as error:
        raise CardError(f"{offer.who}: its annotations are no schema: {in_words(error)}") from error


def _without_none(kind: Any) -> Any:
    left = [one for one in get_args(kind) if one is not NoneType]
    if get_origin(kind) in (Union, UnionType) and len(left) == 1:
        return left[0]
    return kind


def members_of(kind: Any) -> list[tuple[str, Any, bool]]:
    """A ``TypedDict``'s members: name, type, and whether it may be left out."""
    hints = get_type_hints(kind)
    # not by __required_keys__, to which an annotation that is text says nothing
    marks = {name: get_origin(hint) for name, hint in get_type_hints(kind, include_extras=True).items()}
    total = kind.__total__
    return [
        (name, hint, marks[name] is NotRequired or not (total or marks[name] is Required))
        for name, hint in hints.items()
    ]


def tables_of(kind: Any) -> list[Any]:
    """The ``TypedDict`` types in *kind*: itself, or those of a union."""
    found = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return [one for one in found if is_typeddict(one)]


def tag_of(tables: list[Any]) -> tuple[str, dict[str, Any]]:
    """What tells *tables* apart: a member of each, a ``Literal`` of other texts in each; and the tables by those texts.

    Raises TypeError where there is none.
    """
    hints = [get_type_hints(one) for one in tables]
    for name in hints[0]:
        kinds = [one.get(name) for one in hints]
        if all(get_origin(kind) is Literal for kind in kinds):
            words = [(word, table) for kind, table in zip(kinds, tables, strict=True) for word in get_args(kind)]
            if len(dict(words)) == len(words):
                return name, dict(words)
    raise TypeError(f"{[one.__name__ for one in tables]}: no Literal member tells them apart")


def _check_union(value: Any, kind: Any, name: str) -> None:
    """One of a union: the one of the value's own JSON type; a table by what tells tables apart."""
    tables = tables_of(kind)
    if isinstance(value, dict) and tables:
        chosen = tables[0]
        if len(tables) > 1:
            tag, known = tag_of(tables)
            word = value.get(tag)
            at = f"{name}.{tag}" if name else tag
            if tag not in value:
                raise QmpError(f"Parameter '{at}' is missing")
            if not isinstance(word, str):
                raise QmpError(f"Invalid parameter type for '{at}', expected: string")
            if word not in known:
                raise QmpError(f"Parameter '{at}' does not accept value '{word:.100}'")
            chosen = known[word]
        check(value, chosen, name)
        return
    for one in get_args(kind):
        base = get_origin(one) or one
        found = not is_typeddict(one) and isinstance(value, (int, float) if base is float else base)
        if found and isinstance(value, bool) is (one is bool):
            check(value, one, name)
            return
    words = " | ".join("object" if is_typeddict(one) else getattr(one, "__name__", str(one)) for one in get_args(kind))
    raise QmpError(f"Invalid parameter type for '{name}', expected: {words}")


def check(value: Any, kind: Any, name: str) -> None:
    """Hold an argument's *value* to its type. Raises QmpError in QEMU's words.

    Args:
        name: of the argument, empty for all of them.
    """
    origin = get_origin(kind)
    if kind in (Any, object):
        return
    if origin is Literal:
        if not isinstance(value, str):
            raise QmpError(f"Invalid parameter type for '{name}', expected: string")
        if value not in get_args(kind):
            raise QmpError(f"Parameter '{name}' does not accept value '{value:.100}'")
    elif origin is list:
        if not isinstance(value, list):
            raise QmpError(f"Invalid parameter type for '{name}', expected: array")
        for at, one in enumerate(value):
            check(one, get_args(kind)[0], f"{name}[{at}]")
    elif is_typeddict(kind):
        if not isinstance(value, dict):
            raise QmpError(f"Invalid parameter type for '{name}', expected: object")
        members = {member: (hint, optional) for member, hint, optional in members_of(kind)}
        prefix = f"{name}." if name else ""
        for member in value:
            if member not in members:
                raise QmpError(f"Parameter '{prefix}{member}' is unexpected")
        for member, (hint, optional) in members.items():
            if member in value:
                check(value[member], hint, f"{prefix}{member}")
            elif not optional:
                raise QmpError(f"Parameter '{prefix}{member}' is missing")
    elif origin in (Union, UnionType):
        _check_union(value, kind, name)
    else:
        wanted = (int, float) if kind is float else kind
        if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
            raise QmpError(f"Invalid parameter type for '{name}', expected: {WORDS.get(kind, kind)}")
        if kind is int and not -(1 << 63) <= value < 1 << 64:
            raise QmpError(f"Parameter '{name}' expects an integer of 64 bits")


class Schema:
    """Entities of the schema, each once."""

    def __init__(self) -> None:
        self.entities: dict[str, dict[str, Any]] = {}

    def add_command(self, command: Command) -> None:
        members = [(one.name, one.type, one.optional) for one in command.parameters]
        name = command.offer.name
        if command.boxed is not None:
            arguments = self.type(command.boxed)
        else:
            arguments = self._object(f"q_obj_{name}-arg", members) if members else self._empty()
        self.entities[name] = {
            "name": name,
            "meta-type": "command",
            "arg-type": arguments,
            "ret-type": self.type(command.returns) if command.returns is not NoneType else self._empty(),
            "allow-oob": False,
        }

    def add_event(self, name: str, data: Any) -> None:
        what = self.type(data) if data is not None else self._empty()
        self.entities[name] = {"name": name, "meta-type": "event", "arg-type": what}

    def _empty(self) -> str:
        return self._object("q_empty", [])

    def _object(self, name: str, members: list[tuple[str, Any, bool]]) -> str:
        if name not in self.entities:
            made: dict[str, Any] = {"name": name, "meta-type": "object", "members": []}
            self.entities[name] = made  # before its members: they may hold it
            for member, kind, optional in members:
                one = {"name": member, "type": self.type(kind)}
                made["members"].append({**one, "default": None} if optional else one)
        return name

    def type(self, kind: Any) -> str:
        """The name of a type, which is added. Raises TypeError for what QMP has no type for."""
        origin, inner = get_origin(kind), get_args(kind)
        if origin is Required:
            return self.type(inner[0])
        if kind in BUILTIN:
            name, json_type = BUILTIN[kind]
            self.entities[name] = {"name": name, "meta-type": "builtin", "json-type": json_type}
            return name
        if origin is list:
            element = self.type(inner[0])
            name = f"[{element}]"
            self.entities[name] = {"name": name, "meta-type": "array", "element-type": element}
            return name
        if origin is Literal and all(isinstance(one, str) for one in inner):
            name = f"q_enum_{'_'.join(inner)}"
            members = [{"name": one} for one in inner]
            self.entities[name] = {"name": name, "meta-type": "enum", "members": members, "values": list(inner)}
            return name
        if origin in (Union, UnionType):
            tables = tables_of(kind)
            if len(tables) == len(inner):
                return self._union(tables)
            names = [self.type(one) for one in inner if one not in tables]
            names += [self._union(tables) if len(tables) > 1 else self.type(one) for one in tables[:1]]
            name = f"q_alt_{'_'.join(names)}"
            self.entities[name] = {"name": name, "meta-type": "alternate", "members": [{"type": one} for one in names]}
            return name
        if is_typeddict(kind):
            return self._object(name_of(kind), members_of(kind))
        raise TypeError(f"{kind!r}: QMP has no such type")

    def _union(self, tables: list[Any]) -> str:
        """An object whose tag says which of *tables* its other members are."""
        tag, known = tag_of(tables)
        name = f"q_union_{'_'.join(name_of(one) for one in tables)}"
        if name not in self.entities:
            self._object(name, [(tag, Literal[tuple(known)], False)])
            self.entities[name]["tag"] = tag
            variants: list[dict[str, str]] = []
            self.entities[name]["variants"] = variants
            for word, table in known.items():
                members = [one for one in members_of(table) if one[0] != tag]
                variants.append({"case": word, "type": self._object(f"{name_of(table)}-variant", members)})
        return name


def name_of(table: Any) -> str:
    """The name of a ``TypedDict`` in the schema."""
    module = table.__module__.partition(".")[0]
    return str(table.__name__) if module == "cardcage_qmp" else f"{module}-{table.__name__}"


class Table:
    """The commands and events of a host: a broken one is told of, and not there."""

    def __init__(self, host: Host) -> None:
        self.commands: dict[str, Command] = {}
        self.events: dict[str, Any] = {}
        for command in sorted(host.registry.offers(QmpCommand), key=lambda one: one.name):
            try:
                self.commands[command.name] = loaded(command)
            except CardcageError as error:
                host.log.error("a QMP command is broken and was left out", why=str(error))
        for event in sorted(host.registry.offers(QmpEvent), key=lambda one: one.name):
            try:
                data = event.load()
                if data is not None and not is_typeddict(data):
                    raise CardError(f"{event.who}: expected a TypedDict, got {data!r}")
                self.events[event.name] = data
            except CardcageError as error:
                host.log.error("a QMP event is broken and was left out", why=str(error))

    @cached_property
    def schema(self) -> list[dict[str, Any]]:
        """The answer to ``query-qmp-schema``."""
        schema = Schema()
        for command in self.commands.values():
            schema.add_command(command)
        for name, data in self.events.items():
            schema.add_event(name, data)
        return list(schema.entities.values())


def table_of(host: Host) -> Table:
    """The table of *host*, made once."""
    found: Table = host.share("qmp:table", lambda: Table(host))
    return found
