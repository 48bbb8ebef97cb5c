"""The parts of a machine: one typed schema for TOML, Python and the command line.

A :class:`Draft` collects fragments (a TOML file, keyword arguments, flags, ``--set key=value``), remembers where each
value came from, and becomes a :class:`Config`. The tables: ``[machine]``, ``[memory]``, ``[boot]``, ``[[device]]``,
``[accel.NAME]``, ``[policy]`` and ``[security]``; docs/config.md describes each key.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from attrs import evolve, field, fields
from attrs.validators import and_, ge, le

from cardcage._config.places import HostPath, Place, PlacedText, Spec, beside, placed
from cardcage._config.structure import structure
from cardcage._config.toml import DEEPEST, check_bounds, parse_toml
from cardcage.errors import ConfigError, near
from cardcage.files import read_file
from cardcage.ram import Placement
from cardcage.units import Duration, Size
from cardcage.values import frozen

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = [
    "Assignment",
    "Config",
    "DeviceConfig",
    "Draft",
    "HostPath",
    "MachineConfig",
    "MemoryConfig",
    "Place",
    "Spec",
    "assign",
    "beside",
    "spec_table",
    "specs_of",
]

MOST = 1 << 20
"""Bytes of a configuration file."""
TABLES = ("accel", "boot", "device", "machine", "memory", "policy", "security")


def spec_table(spec: Any, *, file: str | None = None, key: str | None = None) -> tuple[str, dict[str, Any] | str]:
    """Split a spec into its type and the rest: ``"file:log.txt"`` -> ("file", "log.txt"), ``{type="file", path=...}``.

    Raises ConfigError when it is neither text nor a table with ``type``.
    """
    if isinstance(spec, str):
        name, colon, rest = spec.partition(":")
        if isinstance(spec, PlacedText):
            rest = PlacedText(rest, spec.place)
        return (name, rest) if colon else (name, {})
    if isinstance(spec, dict) and isinstance(spec.get("type"), str):
        return spec["type"], {name: value for name, value in spec.items() if name != "type"}
    raise ConfigError(f'expected text such as "stdio" or a table with "type", got {spec!r}', file=file, key=key)


def assign(table: dict[str, Any], path: Sequence[str], value: Any, key: str) -> None:
    """Set the value at *path* in *table*, making tables on the way. Raises ConfigError about ``--set`` *key*."""
    for part in path[:-1]:
        inner = table[part] = table.get(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{part} is a value, not a table", file="--set", key=key)
        table = inner
    table[path[-1]] = value


def specs_of(value: Any, place: Place) -> tuple[Spec, ...]:
    """A spec or a list of specs (``policy.memory``, ``security.checkers``). Raises ConfigError."""
    found = []
    for at, one in enumerate(value if isinstance(value, list | tuple) else [value]):
        here = place.below(f"[{at}]") if isinstance(value, list | tuple) else place
        found.append(Spec(*spec_table(one, file=here.file, key=here.key), here))
    return tuple(found)


@frozen
class MachineConfig:
    """``[machine]``.

    Attributes:
        name: for listings, logs and MAC addresses; a number is added while another machine of the account has it.
        accel: accelerators to try: the first that is usable and fast, else the first usable; by default all that are
            installed.
        memory: RAM, at least 1M.
        cpus: number of vCPUs, 1 to 255.
        irqchip: ``auto`` picks ``split``; see :class:`~cardcage.accelerator.VmSpec`.
        cpu: CPU model: ``max``, ``host`` or ``x86-64-v2``.
        features: CPU features switched on or off, such as ``{ avx2 = true }``.
        platform: which card chooses the default devices; ``none`` gives a bare machine.
        console: where the console goes besides the buffer that ``vm.console`` reads: a char back end's spec.
        priority: -100 to 100: when the host runs short, who has the lowest gives first, and is ended first.
        on_reset: what a reset that the guest asked for does.
        on_triple_fault: what a triple fault of the guest does.
        on_panic: what a guest's report of its own panic does; ``ignore`` for one that goes on in a crash kernel.
        stop_timeout: seconds in which a guest that hears its power button has to power off, before it is stopped hard.
        label: security label of the machine; by default the security card gives one, else its name is its label.
    """

    name: str = "machine"
    accel: tuple[str, ...] = ()
    memory: Size = field(default=Size("512M"))
    cpus: int = field(default=1, validator=and_(ge(1), le(255)))
    irqchip: Literal["auto", "none", "split", "full"] = "auto"
    cpu: str = "max"
    features: dict[str, bool] = field(factory=dict)
    platform: str = "pc"
    console: str | dict[str, Any] = "none"
    priority: int = field(default=0, validator=and_(ge(-100), le(100)))
    on_reset: Literal["reset", "stop"] = "reset"
    on_triple_fault: Literal["stop", "reset"] = "stop"
    on_panic: Literal["stop", "ignore"] = "stop"
    stop_timeout: Duration = field(default=Duration("30s"))
    label: str | None = None


@frozen
class DeviceConfig:
    """One ``[[device]]`` table: the machine's keys, and the card's own ``options``.

    Attributes:
        type: the name a card offers.
        id: unique in the machine; by default the type, with a number from the second on.
        port, address: base of its first (or each) port or memory range; on a bus such as PCI, ``address`` is its place.
        irq: global system interrupt, 0 to 23.
        bus: id of the device that carries it, where more than one could.
        label: security label; by default the security card gives one, else its type is its label.
        options: what is left, not yet structured.
        place: where it stands.
    """

    type: str
    id: str | None = None
    port: int | list[int] | None = None
    address: int | list[int] | str | None = None
    irq: int | None = None
    bus: str | None = None
    label: str | None = None
    options: dict[str, Any] = field(factory=dict)
    place: Place = field(default=Place())

    @classmethod
    def from_table(cls, table: Mapping[str, Any], place: Place) -> DeviceConfig:
        """Take the machine's keys off *table*. Raises ConfigError."""
        known = {"type", "id", "port", "address", "irq", "bus", "label"}
        if "type" not in table:
            raise place.error('missing key "type": expected the name of a device card')
        keys = {name: value for name, value in table.items() if name in known}
        own = {name: value for name, value in table.items() if name not in known}
        device = structure(keys, cls, file=place.file, key=place.key)
        if device.irq is not None and not 0 <= device.irq < 24:
            raise place.below("irq").error(f"expected 0 to 23, got {device.irq}")
        return evolve(device, options=own, place=place)


@frozen
class MemoryConfig(Placement):
    """``[memory]``: where the guest's RAM comes from. ``machine.memory`` is its size.

    Attributes:
        type: the name of a memory back end.
        preallocate: take all of it from the host at once; else each page when it is first used.
        huge_pages: advice to the kernel about transparent huge pages; ``default`` gives none.
        nodes: NUMA nodes of the host that it may come from; empty for wherever the host likes.
        numa: how the nodes are used: ``bind`` only these, ``preferred`` these first, ``interleave`` by turns.
        options: what is left: the back end's own.
    """

    type: str = "anonymous"
    options: dict[str, Any] = field(factory=dict)

    @classmethod
    def from_table(cls, table: Mapping[str, Any], file: str | None = None) -> MemoryConfig:
        """Take the keys of all back ends off *table*. Raises ConfigError."""
        known = {one.name for one in fields(cls)} - {"options"}
        keys = {name: value for name, value in table.items() if name in known}
        own = {name: value for name, value in table.items() if name not in known}
        return evolve(structure(keys, cls, file=file, key="memory"), options=own)


class Assignment(NamedTuple):
    """A ``--set`` for a device that is not configured: it may be one of the platform's own, by id or type."""

    device: str
    path: Sequence[str]
    value: Any
    key: str


@frozen
class Config:
    """A checked configuration. Options of cards are plain tables until the card that takes them is known."""

    machine: MachineConfig = MachineConfig()
    memory: MemoryConfig = MemoryConfig()
    boot: dict[str, Any] | None = None
    devices: tuple[DeviceConfig, ...] = ()
    accel: dict[str, dict[str, Any]] = field(factory=dict)
    policy: dict[str, Any] = field(factory=dict)
    guards: dict[str, Any] = field(factory=dict)
    """``[security]``, but for ``checkers``."""
    security: tuple[Spec, ...] = ()
    origins: dict[str, str | None] = field(factory=dict)
    defaults: tuple[Assignment, ...] = ()

    def place(self, key: str) -> Place:
        """Where *key* was set: the origin of the longest known part of its path."""
        part = key
        while part and part not in self.origins:
            part = part[: max(part.rfind("."), part.rfind("["), 0)]
        return Place(self.origins.get(part), key)


class Draft:
    """Fragments of a configuration, merged in the order they came: tables merge, devices append, all else replaces."""

    def __init__(self) -> None:
        self._tables: dict[str, Any] = {}
        self._origins: dict[str, str | None] = {}
        self._defaults: list[Assignment] = []

    def add_file(self, path: str | Path) -> None:
        """Add a TOML file; paths in it are relative to its folder. Raises ConfigError with file, line and column."""
        data = read_file(path, MOST, "configuration")
        try:
            table = parse_toml(data.decode())
        except UnicodeDecodeError as error:
            raise ConfigError(f"configuration cannot be read: not UTF-8 text: {error}", file=str(path)) from error
        except ValueError as error:
            raise ConfigError(f"not TOML: {error}", file=str(path)) from error
        folder = os.path.dirname(os.path.abspath(path))
        self.add(placed(table, Place(str(path), folder=folder)), origin=str(path))

    def add(self, table: Mapping[str, Any], *, origin: str | None = None) -> None:
        """Add a fragment. *origin* is named in errors: a file, ``command line``, or None for Python."""
        try:
            check_bounds(table)
        except ValueError as error:
            raise ConfigError(str(error), file=origin) from error
        for name, value in table.items():
            if name not in TABLES:
                hint = near(name, TABLES) or f" Known: {', '.join(TABLES)}."
                raise ConfigError(f"no such table.{hint}", file=origin, key=name)
            if name == "device":
                self._add_devices(value, origin)
            elif name == "security" and isinstance(value, str | list):
                self._merge(self._tables.setdefault(name, {}), {"checkers": value}, name, origin)
            elif not isinstance(value, dict):
                raise ConfigError(f"expected a table, got {value!r}", file=origin, key=name)
            else:
                self._merge(self._tables.setdefault(name, {}), value, name, origin)

    def _add_devices(self, value: Any, origin: str | None) -> None:
        if not isinstance(value, (list, tuple)) or not all(isinstance(one, dict) for one in value):
            raise ConfigError("expected a list of tables: write [[device]]", file=origin, key="device")
        devices = self._tables.setdefault("device", [])
        for at, one in enumerate(value):
            # The number is the one in its own source, which is what a person looks up there.
            self._origins[f"device[{len(devices)}]"] = origin
            devices.append((f"device[{at}]", dict(one)))

    def _merge(self, into: dict[str, Any], table: Mapping[str, Any], path: str, origin: str | None) -> None:
        for name, value in table.items():
            key = f"{path}.{name}"
            self._origins[key] = origin
            if isinstance(value, dict) and isinstance(into.get(name), dict):
                self._merge(into[name], value, key, origin)
            else:
                into[name] = dict(value) if isinstance(value, dict) else value

    def set(self, text: str) -> None:
        """Add one ``key=value`` of the command line.

        ``machine.cpus=4``, ``device.root.readonly=true``, ``device[0].irq=5``: devices are named by id, type or number;
        one that is not configured is looked for among the platform's when the machine is built.
        The value is TOML where it parses (numbers, true, lists, tables), else text. Raises ConfigError.
        """
        key, equals, raw = text.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f'"{text}": expected key=value, such as machine.cpus=2', file="--set")
        try:
            value = parse_toml(f"value = {raw}")["value"]
        except tomllib.TOMLDecodeError:
            value = raw
        except ValueError as error:
            raise ConfigError(str(error), file="--set", key=key.partition(".")[0]) from error
        head, *rest = key.split(".", DEEPEST)
        if head == "device" or head.startswith("device["):
            name = head[7:-1] if head.startswith("device[") else rest.pop(0) if rest else ""
            if not rest:
                raise ConfigError("expected a key of a device, such as device.net0.mac=...", file="--set", key=key)
            found = self._device(name, key)
            if found is None:
                self._defaults.append(Assignment(name, rest, value, key))
            else:
                self._set(found[0], rest, value, f"device[{found[1]}]", key)
            return
        if head not in TABLES:
            raise ConfigError(f"no such table.{near(head, TABLES)}", file="--set", key=key)
        if not rest:
            raise ConfigError(f"expected a key inside the table, such as {head}.name=value", file="--set", key=key)
        self._set(self._tables.setdefault(head, {}), rest, value, head, key)

    def _device(self, name: str, key: str) -> tuple[dict[str, Any], int] | None:
        devices = [one for _, one in self._tables.get("device", [])]
        if name.isascii() and name.isdigit():
            if int(name) >= len(devices):
                raise ConfigError(f'no device "{name}" is configured.', file="--set", key=key)
            return devices[int(name)], int(name)
        for wanted in ("id", "type"):
            for at, one in enumerate(devices):
                if one.get(wanted) == name:
                    return one, at
        return None

    def _set(self, table: dict[str, Any], path: list[str], value: Any, at: str, key: str) -> None:
        assign(table, path, value, key)
        self._origins[".".join((at, *path))] = "--set"

    def config(self) -> Config:
        """Check and type what was added. Raises ConfigError."""
        tables = dict(self._tables)
        machine = dict(tables.get("machine", {}))
        if isinstance(machine.get("accel"), str):
            machine["accel"] = [machine["accel"]]
        for name in machine:  # one by one, so that an error names the source of its own key
            origin = self._origins.get(f"machine.{name}")
            structure({name: machine[name]}, MachineConfig, file=origin, key="machine")
        memory = tables.get("memory", {})
        for name in memory:
            MemoryConfig.from_table({name: memory[name]}, self._origins.get(f"memory.{name}"))
        for name, table in tables.get("accel", {}).items():
            if not isinstance(table, dict):
                raise ConfigError("expected a table", file=self._origins.get(f"accel.{name}"), key=f"accel.{name}")
        devices = [
            DeviceConfig.from_table(one, Place(self._origins.get(f"device[{at}]"), key))
            for at, (key, one) in enumerate(tables.get("device", []))
        ]
        return Config(
            machine=structure(machine, MachineConfig, key="machine"),
            memory=MemoryConfig.from_table(memory),
            boot=tables.get("boot"),
            devices=tuple(devices),
            accel=tables.get("accel", {}),
            policy={key: value for key, value in tables.get("policy", {}).items() if key != "security"},
            guards={key: value for key, value in tables.get("security", {}).items() if key != "checkers"},
            security=self.security(),
            origins=self._origins,
            defaults=tuple(self._defaults),
        )

    def security(self) -> tuple[Spec, ...]:
        """The cards that ``[security] checkers`` and ``policy.security`` name. Raises ConfigError."""
        table = self._tables.get("security", {})
        for name in table:
            if name != "checkers" and (hint := near(name, ["checkers"])):
                key = f"security.{name}"
                raise ConfigError(f"no such key.{hint}", file=self._origins.get(key), key=key)
        found: list[Spec] = []
        for key, value in (
            ("security.checkers", table.get("checkers")),
            ("policy.security", self._tables.get("policy", {}).get("security")),
        ):
            if value is not None:
                found += specs_of(value, Place(self._origins.get(key), key))
        return tuple(found)

    @classmethod
    def of(cls, *fragments: Mapping[str, Any], assignments: Iterable[str] = ()) -> Draft:
        """A draft of Python fragments and ``key=value`` assignments."""
        draft = cls()
        for one in fragments:
            draft.add(one)
        for text in assignments:
            draft.set(text)
        return draft
