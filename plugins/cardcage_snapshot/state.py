"""State that outlives a process: vCPUs and devices of a machine, as versioned attrs classes and as JSON.

A card's state class may carry ``version: ClassVar[int]`` (1 without one) and follows one rule: fields are only added,
with a default. So an older state loads into a newer card; a state with a field or version that this card does not know
is refused, rather than loaded in part. RAM is not in here: :mod:`cardcage_snapshot.creating` keeps it in a file.
"""

from __future__ import annotations

import json
import sys
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Protocol, get_args
from weakref import WeakKeyDictionary

import attrs
from attrs import Factory, define
from cardcage.abilities import has
from cardcage.errors import FAULTS, CardcageError, CardError, ConfigError, StateError, UsageError, in_words
from cardcage.security import OPERATOR, Act
from cardcage.x86 import VCpuState

from cardcage_snapshot.places import printable
from cardcage_snapshot.processors import check_features, features_of, known_msrs
from cardcage_snapshot.tables import ids_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cardcage.machine import Machine
    from cattrs import Converter

__all__ = ["VERSION", "DeviceState", "MachineState", "capture", "dumps", "fits", "loads", "restore", "warm"]

VERSION = 1
MOST_TURNS = 5
"""Of making what turns states into plain values, until nothing is made anew."""
_classes: WeakKeyDictionary[type, type] = WeakKeyDictionary()
"""Of the states that devices of a class save."""


class KeepsChips(Protocol):
    """A VM with a full irqchip whose interrupt controllers outlive it."""

    def save_chips(self) -> bytes:
        """All of them."""

    def load_chips(self, data: bytes, /) -> None:
        """Put them back, before the vCPUs' states. Raises UsageError for what they cannot hold."""


@define
class DeviceState:
    """One device's state: the card it belongs to, the version of its class, and its fields as plain values."""

    type: str
    version: int
    fields: Any


@define
class MachineState:
    """All of a machine but its RAM.

    Attributes:
        cpu, features, irqchip, memory: the machine must be made with the same; memory in bytes.
        clock: guest time, nanoseconds.
        vcpus: in the order of their numbers. devices: by id, those that have state.
        cpuid: words of features that the guest was told of (:mod:`cardcage_snapshot.processors`), empty where unknown.
        chips: the accelerator's own interrupt controllers, with irqchip ``full``.
    """

    cpu: str
    irqchip: str
    memory: int
    clock: int
    vcpus: list[VCpuState]
    devices: dict[str, DeviceState]
    features: dict[str, bool] = Factory(dict)
    version: int = VERSION
    cpuid: list[int] = Factory(list)
    chips: bytes = b""


@cache
def _converter() -> Converter:
    from cattrs.gen import make_dict_unstructure_fn, override
    from cattrs.preconf.json import make_converter

    made = make_converter(forbid_extra_keys=True)
    without = make_dict_unstructure_fn(MachineState, made, chips=override(omit_if_default=True))  # as others know it
    made.register_unstructure_hook(MachineState, without)
    return made


@cache
def _loader(kind: type) -> Callable[[Any, type], Any]:
    """What makes a *kind* of plain values. Kept here: cattrs makes it anew for each class once it has met another."""
    return _converter().get_structure_hook(kind)


def capture(machine: Machine) -> MachineState:
    """The state of a machine that is built, paused or stopped.

    Raises StateError while it runs, CardError for a device.
    """
    if machine.state == "running":
        raise StateError("pause the machine before its state is saved")
    if machine.irqchip == "full" and not has(machine.vm, KeepsChips):
        raise StateError(f"{_whose(machine)} cannot be saved")
    machine.mediator.check(Act(OPERATOR, machine.label, "machine", ("save",), {"machine": machine.name}))
    devices = {}
    with machine.lock:
        for plugged in machine.devices.values():
            if "state" not in plugged.abilities:
                continue
            state = plugged.device.save()
            if not attrs.has(type(state)):
                raise CardError(f"{plugged.who}: save() returned {type(state).__name__}, expected an attrs instance")
            version = getattr(type(state), "version", 1)
            devices[plugged.id] = DeviceState(plugged.type, version, _converter().unstructure(state))
        clock = machine.clock.now()
    wanted = machine.config.machine
    vcpus = [vcpu.get_state() for vcpu in machine.vcpus]
    features, cpuid = dict(wanted.features), features_of(machine.vm)
    chips = machine.vm.save_chips() if has(machine.vm, KeepsChips) else b""
    return MachineState(
        wanted.cpu, machine.irqchip, wanted.memory, clock, vcpus, devices, features=features, cpuid=cpuid, chips=chips
    )


def _whose(machine: Machine) -> str:
    return f'the interrupt controllers of the accelerator "{machine.accelerator.name}"'


def warm(machine: Machine) -> None:
    """Make what turns states into plain values, which takes some 50 ms once in a process: a guest that stands still
    should not wait for it. No device is touched: the classes are those named ``...State`` in the packages of devices.
    """
    packages = {type(one.device).__module__.partition(".")[0] for one in machine.devices.values()}
    kinds = {MachineState, DeviceState, VCpuState}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in packages:
            kinds |= {one for key, one in vars(module).items() if key.endswith("State") and isinstance(one, type)}
    converter, left, seen = _converter(), list(kinds), set(kinds)
    while left:
        kind = left.pop()
        if attrs.has(kind):
            inner = {one for field in attrs.fields(attrs.resolve_types(kind)) for one in _classes_in(field.type)}
            left += inner - seen
            seen |= inner
    converter.unstructure([{"": (b"", "", 0, 0.0, None, True)}])  # what a state is made of otherwise
    hooks: dict[type, Any] = {}
    for _ in range(MOST_TURNS):  # one that is made may have cattrs forget those that were made before
        made = {kind: converter.get_unstructure_hook(kind) for kind in seen if attrs.has(kind)}
        if made == hooks:
            break
        hooks = made


def _classes_in(type_: Any) -> Iterator[type]:
    """The classes that a type's annotation names."""
    if isinstance(type_, type) and not get_args(type_):
        yield type_
    for one in get_args(type_):
        yield from _classes_in(one)


def restore(machine: Machine, state: MachineState, *, any_cpu: bool = False) -> None:
    """Give *machine* (built or paused, its RAM already in place) the *state*.

    ``start(boot=False)`` or ``resume`` then goes on from it, and no device does anything before that; a later reset
    boots. Checks all before any change. With *any_cpu* the processor may lack features that the guest was told of.
    Raises StateError while it runs, ConfigError when the machines differ or a device refuses its state.
    """
    if machine.state not in ("built", "paused"):
        raise StateError(f"cannot load a state: the machine is {machine.state}")
    machine.mediator.check(Act(OPERATOR, machine.label, "machine", ("load",), {"machine": machine.name}))
    with machine.lock:
        ready = fits(machine, state, any_cpu=any_cpu)
        if machine.state == "built":  # else a queue with requests in it would be served at once
            for plugged in machine.devices.values():
                if "pause" in plugged.abilities:
                    plugged.device.pause()
        machine.clock.set(state.clock)  # first: devices find their next alarms by it
        for id, device, loaded in ready:
            _told(f'the state of device "{id}"', partial(device.load, loaded))
    if has(machine.vm, KeepsChips):
        _told(f"the state of {_whose(machine)}", partial(machine.vm.load_chips, state.chips))
    elif state.chips:
        raise ConfigError(f"{_whose(machine)} cannot be loaded")
    for vcpu, registers in zip(machine.vcpus, state.vcpus, strict=True):
        _told(f"the state of vCPU {vcpu.index}", partial(vcpu.set_state, known_msrs(vcpu, registers, any_cpu=any_cpu)))


def fits(machine: Machine, state: MachineState, *, any_cpu: bool = False) -> list[tuple[str, Any, Any]]:
    """The devices that have a *state* to load, which is not done yet: id, device, and the state. Under its lock.

    Raises ConfigError when the machines differ.
    """
    wanted = machine.config.machine
    for what, theirs, ours in (
        ("version", state.version, VERSION),
        ("CPU model", state.cpu, wanted.cpu),
        ("CPU features", state.features, wanted.features),
        ("irqchip", state.irqchip, machine.irqchip),
        ("memory", state.memory, int(wanted.memory)),
        ("number of vCPUs", len(state.vcpus), len(machine.vcpus)),
        ("devices with state", sorted(state.devices), sorted(_expected(machine, state))),
    ):
        if theirs != ours:
            raise ConfigError(f"the saved machine's {what} is {printable(str(theirs))[:500]}, this one's {ours}")
    if not any_cpu:
        check_features(state.cpuid, machine.vm)
    stateful = _stateful(machine)
    return [(id, stateful[id], _device_state(machine, id, one)) for id, one in state.devices.items()]


def _told(what: str, load: Callable[[], None]) -> None:
    """Raise ConfigError for what does not take its state: a state is a file's, and the file may be anybody's."""
    try:
        load()
    except (ConfigError, UsageError) as error:
        raise ConfigError(f"{what} does not fit: {printable(str(error))[:500]}") from error
    except CardcageError:
        raise
    except FAULTS as error:
        raise ConfigError(f"{what} does not fit: {printable(in_words(error))[:500]}") from error


def _expected(machine: Machine, state: MachineState) -> set[str]:
    """The devices that the state has to have: not those that a later release's platform has besides; a guest that was
    never told of one leaves it as it is after power-up."""
    configured = set(ids_of(machine))
    return {id for id in _stateful(machine) if id in state.devices or id in configured}


def _stateful(machine: Machine) -> dict[str, Any]:
    return {one.id: one.device for one in machine.devices.values() if "state" in one.abilities}


def _device_state(machine: Machine, id: str, saved: DeviceState) -> Any:
    plugged = machine.devices[id]
    cls = _classes.get(type(plugged.device))
    if cls is None:
        cls = _classes[type(plugged.device)] = type(plugged.device.save())
    known = getattr(cls, "version", 1)
    if saved.type != plugged.type or saved.version > known:
        raise ConfigError(
            f'the state of device "{id}" is of {printable(saved.type)[:100]} version {saved.version}; '
            f"this machine has {plugged.type} version {known}"
        )
    try:
        return _loader(cls)(saved.fields, cls)
    except Exception as error:  # cattrs raises groups of whatever did not fit
        from cattrs import transform_error

        why = printable("; ".join(transform_error(error)))[:500]
        raise ConfigError(f'the state of device "{id}" does not fit: {why}') from error


def dumps(state: MachineState) -> str:
    """As JSON text."""
    return json.dumps(_converter().unstructure(state))


def loads(text: str) -> MachineState:
    """From JSON text. Raises ConfigError for what is no state, or has fields that this version does not know."""
    try:
        made: MachineState = _loader(MachineState)(json.loads(text), MachineState)
        return made
    except Exception as error:  # a damaged file can be wrong in every way that json and cattrs know
        from cattrs import transform_error

        plain = isinstance(error, json.JSONDecodeError | RecursionError)
        what = str(error) if plain else "; ".join(transform_error(error))
        raise ConfigError(f"not a machine state: {printable(what)[:500]}") from error
