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

    def bind(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The function's keyword arguments. Raises QmpError in QEMU's words."""
        known = {one.name: one for one in self.parameters}
        for name in arguments:
            if name not in known:
                raise QmpError(f"Parameter '{name}' is unexpected")
        for one in self.parameters:
            if not one.optional and one.name not in arguments:
                raise QmpError(f"Parameter '{one.name}' is missing")
        found = {}
        for name, value in arguments.items():
            check(value, known[name].type, name)
            found[known[name].python] = value
        return found


def loaded(offer: QmpCommand) -> Command:
    """Import the command, and read its signature. Raises CardError."""
    function = offer.load()
    try:
        hints = get_type_hints(function)
        _, *rest = inspect.signature(function).parameters.values()
        parameters = []
        for one in rest:
            if one.kind not in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY):
                raise TypeError(f"*{one.name}: expected a parameter with a name")
            kind = _without_none(hints[one.name])
            name = one.name.rstrip("_").replace("_", "-")
            parameters.append(Parameter(name, one.name, kind, one.default is not one.empty))
        made = Command(offer, function, tuple(parameters), hints.get("return", NoneType))
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
    return [(name, hint, name not in kind.__required_keys__) for name, hint in hints.items()]


def check(value: Any, kind: Any, name: str) -> None:
    """Hold an argument's *value* to its type. Raises QmpError in QEMU's words."""
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
        for member in value:
            if member not in members:
                raise QmpError(f"Parameter '{name}.{member}' is unexpected")
        for member, (hint, optional) in members.items():
            if member in value:
                check(value[member], hint, f"{name}.{member}")
            elif not optional:
                raise QmpError(f"Parameter '{name}.{member}' is missing")
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
        self.entities[name] = {
            "name": name,
            "meta-type": "command",
            "arg-type": self._object(f"q_obj_{name}-arg", members) if members else self._empty(),
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
            names = [self.type(one) for one in inner]
            name = f"q_alt_{'_'.join(names)}"
            self.entities[name] = {"name": name, "meta-type": "alternate", "members": [{"type": one} for one in names]}
            return name
        if is_typeddict(kind):
            module = kind.__module__.partition(".")[0]
            name = kind.__name__ if module == "cardcage_qmp" else f"{module}-{kind.__name__}"
            return self._object(name, members_of(kind))
        raise TypeError(f"{kind!r}: QMP has no such type")


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
