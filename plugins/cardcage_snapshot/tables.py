"""A machine's configuration as plain tables, and back."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from attrs import NOTHING, evolve, fields
from cardcage.config import Assignment, Config, Draft, beside
from cardcage.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cardcage.machine import Machine

__all__ = ["config_of", "ids_of", "tables_of"]

DEVICE_KEYS = ("id", "port", "address", "irq", "bus", "label")
LEFT_OUT = {"name", "console", "label"}
"""Of ``[machine]``: told anew by who restores."""


def ids_of(machine: Machine) -> list[str]:
    """The ids of the configured devices, in the order of the configuration: also of those that it gives none."""
    configured = machine.config.devices
    given = {one.id for one in configured}
    left: dict[str, list[str]] = {}
    for plugged in machine.devices.values():
        if plugged.id not in given:
            left.setdefault(plugged.type, []).append(plugged.id)
    for type, ids in left.items():  # the platform's come first
        del ids[: len(ids) - sum(one.type == type and one.id is None for one in configured)]
    return [one.id or left[one.type].pop(0) for one in configured]


def tables_of(config: Config, ids: Sequence[str] = ()) -> dict[str, Any]:
    """The tables that :meth:`cardcage.config.Draft.add` takes, as JSON has them; *ids* are those of the devices.

    Paths of files that are there become absolute. Raises ConfigError for what is no value of JSON.
    """
    machine = {
        one.name: _plain(value)
        for one in fields(type(config.machine))
        if one.name not in LEFT_OUT and (value := getattr(config.machine, one.name)) != _default(one)
    }
    machine["memory"] = int(config.machine.memory)
    memory = {
        one.name: _plain(value)
        for one in fields(type(config.memory))
        if one.name != "options" and (value := getattr(config.memory, one.name)) != _default(one)
    }
    tables: dict[str, Any] = {
        "machine": machine,
        "memory": {**memory, **_plain(config.memory.options)},
        "device": [
            {
                "type": str(one.type),  # without the place in its file, which makes no copies
                **{key: _plain(value) for key in DEVICE_KEYS if (value := getattr(one, key)) is not None},
                **({"id": ids[at]} if ids else {}),
                **_plain(one.options),
            }
            for at, one in enumerate(config.devices)
        ],
        "accel": _plain(config.accel),
        "policy": _plain(config.policy),
        "security": _plain(config.guards),
        "defaults": [[str(one.device), list(one.path), _plain(one.value)] for one in config.defaults],
    }
    if config.security:
        tables["security"]["checkers"] = [_spec(one.name, one.options) for one in config.security]
    if config.boot:
        tables["boot"] = _plain(config.boot)
    return tables


def _default(attribute: Any) -> Any:
    default = attribute.default
    return default.factory() if default is not NOTHING and hasattr(default, "factory") else default


def _spec(name: str, options: Any) -> Any:
    if isinstance(options, str):
        return f"{name}:{options}"
    return {"type": str(name), **_plain(options)}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, str):
        return _path(value)
    if isinstance(value, bool | None):
        return value
    if isinstance(value, os.PathLike):
        return os.path.abspath(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, int):
        return int(value)
    raise ConfigError(f"{value!r:.80} of the machine's configuration cannot be written down: expected a value of TOML")


def _path(text: str) -> str:
    """*text*; made absolute if it looks like the path of a file, relative to its own file or to this process."""
    whole = beside(text)
    if "\0" in whole or os.path.isabs(text) or not text:
        return str(text)
    looks = whole != text or "/" in text or "." in text
    return os.path.abspath(whole) if looks and os.path.lexists(whole) else str(text)


def config_of(tables: Mapping[str, Any], where: str) -> Config:
    """The configuration in *tables*. Raises ConfigError that names *where*."""
    rest = {name: value for name, value in tables.items() if name != "defaults" and value}
    draft = Draft()
    draft.add(rest, origin=where)
    config = draft.config()
    found = []
    listed = tables.get("defaults", [])
    for one in listed if isinstance(listed, list) else [None]:
        match one:
            case [str(device), [*path], value] if path and all(isinstance(part, str) for part in path):
                found.append(Assignment(device, path, value, f"device.{device}.{'.'.join(path)}"))
            case _:
                raise ConfigError("expected lists of a device, a path and a value", file=where, key="config.defaults")
    return evolve(config, defaults=tuple(found))
