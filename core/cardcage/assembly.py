"""Putting a machine together from its configuration: the accelerator and devices."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from attrs import frozen

from cardcage.abilities import abilities_of
from cardcage.accelerator import Probe, VmSpec
from cardcage.config import Config, DeviceConfig, Place
from cardcage.errors import CardcageError, CardError, ConfigError, HostError, in_words
from cardcage.security import HOST, OPERATOR, Mediator
from cardcage.slot import DeviceSlot, PluggedDevice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from contextlib import ExitStack

    from cardcage.accelerator import AcceleratedVm, Accelerator
    from cardcage.host import Host
    from cardcage.machine import Machine
    from cardcage.registry import Offer

__all__ = [
    "Choice",
    "allow_end",
    "allow_files",
    "blamed",
    "choose_accelerator",
    "create_vm",
    "mediate",
    "plug",
    "plug_all",
    "probe_of",
]


RANK = {"native": 0, "translated": 1, "emulated": 2}


@frozen
class Choice:
    """The accelerator that was chosen, and one line that says why."""

    name: str
    accelerator: Accelerator
    probe: Probe
    why: str


def probe_of(offer: Offer) -> tuple[Accelerator | None, Probe]:
    """Make and probe an accelerator. One that cannot be made, or whose probe breaks, is not usable and says why."""
    try:
        accelerator: Accelerator = offer.load()()
        return accelerator, accelerator.probe()
    except CardcageError as error:
        return None, Probe(False, reason=str(error))
    except Exception as error:  # a card's bug must not keep the other accelerators from being tried
        return None, Probe(False, reason=f"broken: {type(error).__name__}: {error}")


def choose_accelerator(host: Host, config: Config) -> Choice:
    """Pick the first of ``machine.accel`` that is usable and fast, else the first usable.

    An ``emulated`` one is picked over a faster only when it is asked for alone. Raises ConfigError for a name that
    nobody offers, HostError with every reason when none is usable.
    """
    names = config.machine.accel
    place = config.place("machine.accel")
    if not names:
        raise place.error("expected at least one accelerator")
    probed: list[tuple[str, Accelerator, Probe]] = []
    lines: list[str] = []
    for at, name in enumerate(names):
        offer = host.registry.get("accelerator", name, file=place.file, key=f"{place.key}[{at}]")
        accelerator, probe = probe_of(offer)
        if accelerator is not None and probe.usable:
            probed.append((name, accelerator, probe))
            if probe.speed != "emulated":
                break
        lines.append(f"{name}: {probe.reason or probe.speed}")
    if not probed:
        raise HostError(f"no accelerator is usable here ({'; '.join(lines)})")
    name, accelerator, probe = min(probed, key=lambda one: RANK[one[2].speed] > 1)
    others = [line for line in lines if not line.startswith(f"{name}: ")]
    why = f"{name}: {probe.reason}" if probe.reason else f"{name}: {probe.speed}"
    return Choice(name, accelerator, probe, f"{why} ({'; '.join(others)})" if others else why)


def create_vm(machine: Machine) -> tuple[Choice, AcceleratedVm, str]:
    """Create the VM: the accelerator, the VM and its irqchip. Raises ConfigError, Denied or AcceleratorError."""
    host, config, wanted = machine.host, machine.config, machine.config.machine
    choice = choose_accelerator(host, config)
    for name in config.accel:
        place = config.place(f"accel.{name}")
        host.registry.get("accelerator", name, file=place.file, key=place.key)
    place = config.place(f"accel.{choice.name}")
    offer = host.registry.get("accelerator", choice.name)
    options = host.options(offer, config.accel.get(choice.name, {}), file=place.file, key=place.key)
    acts = ("map", "execmem") if choice.probe.executable else ("map",)
    facts = {"machine": machine.name, "accelerator": choice.name}
    machine.mediator.check(machine.label, machine.label, "memory", acts, facts)
    irqchip = "split" if wanted.irqchip == "auto" else wanted.irqchip
    vm = choice.accelerator.create_vm(VmSpec(wanted.cpus, irqchip, wanted.cpu, dict(wanted.features), options))
    if irqchip == "full" and "irqchip-full" not in vm.capabilities:
        vm.close()
        raise config.place("machine.irqchip").error(f'accelerator "{choice.name}" has no full irqchip; use "split"')
    return choice, vm, irqchip


def allow_files(machine: Machine, table: Mapping[str, Any], *permissions: str) -> None:
    """Ask about the files that a table of the configuration names: each text in it that is the path of one."""
    mediator = machine.mediator
    if not mediator.checkers:
        return
    facts = {"machine": machine.name, "readonly": "write" not in permissions}
    for key, value in table.items():
        for text in value if isinstance(value, list) else [value]:
            # A module of multiboot is a path, then its own command line.
            for path in {text, text.partition(" ")[0]} if isinstance(text, str) else ():
                if path and (key == "path" or os.path.lexists(path)):
                    mediator.ask(machine.label, machine.label, "image", path, permissions, facts)


def mediate(machine: Machine, cleanup: ExitStack) -> None:
    """Give *machine* its checkers (the host's, and those that only it has) and its label; may it be created?"""
    config, host = machine.config, machine.host
    own = []
    for spec in config.security:
        if spec not in host.security:
            own.append(checker := host.make("security", spec))
            cleanup.callback(getattr(checker, "close", lambda: None))
    machine.mediator = Mediator((*host.mediator.checkers, *own), deliver=machine.deliver, log=machine.log)
    cleanup.callback(machine.mediator.close)
    machine.mediator.follow()
    facts = {"machine": machine.name}
    machine.label = config.machine.label or machine.mediator.label(
        OPERATOR, HOST, "machine", machine.name, ("create",), facts
    )
    cleanup.callback(machine.mediator.release, machine.label, "machine")
    machine.mediator.check(OPERATOR, machine.label, "machine", ("create",), facts)


def allow_end(machine: Machine) -> None:
    """May the operator destroy *machine*, with its devices? Raises Denied. One that is closed is not asked about."""
    if machine._closed:
        return
    facts = {"machine": machine.name}
    machine.mediator.check(OPERATOR, machine.label, "machine", ("destroy",), facts)
    for one in machine.devices.values():
        machine.mediator.check(machine.label, one.slot.label, "device", ("detach",), {**facts, "device": one.id})


def platform_devices(machine: Machine) -> list[DeviceConfig]:
    """The device tables that the platform card adds, as configurations."""
    name = machine.config.machine.platform
    if name == "none":
        return []
    place = machine.config.place("machine.platform")
    offer = machine.host.registry.get("platform", name, file=place.file, key=place.key)
    tables: Iterable[dict[str, Any]] = offer.load()(machine.config)
    return [
        DeviceConfig.from_table(table, Place(f"platform {name}", f"device[{at}]")) for at, table in enumerate(tables)
    ]


def plug_all(machine: Machine) -> None:
    """Plug the platform's devices and the configured ones: a device after the bus that carries it."""
    waiting = [*platform_devices(machine), *machine.config.devices]
    while waiting:
        later = [one for one in waiting if not _bus_ready(machine, one)]
        if len(later) == len(waiting):
            offer = offer_of(machine, later[0])
            wanted = f'bus "{later[0].bus}"' if later[0].bus else f"a {offer.bus} bus"
            raise later[0].place.error(f'"{offer.name}" needs {wanted}, which this machine does not have')
        for config in waiting:
            if not any(config is one for one in later):
                plug(machine, config)
        waiting = later
    if machine.config.machine.console != "none":
        machine.open_console(machine.config.machine.console)


def offer_of(machine: Machine, config: DeviceConfig) -> Any:
    """The device card's offer. Raises ConfigError with near matches."""
    place = config.place
    return machine.host.registry.get("device", config.type, file=place.file, key=place.below("type").key)


def _bus_ready(machine: Machine, config: DeviceConfig) -> bool:
    offer = offer_of(machine, config)
    return offer.bus == "system" or _carrier(machine, config, offer.bus) is not None


def _carrier(machine: Machine, config: DeviceConfig, bus: str) -> Any:
    for plugged in machine.devices.values():
        if "bus" in plugged.abilities and plugged.device.bus_type == bus and config.bus in (None, plugged.id):
            return plugged.device
    return None


def plug(machine: Machine, config: DeviceConfig) -> PluggedDevice:
    """Make a device and plug it in; on failure nothing of it stays.

    The order: options, ``factory(options)``, its regions are mapped, its bus attaches it, ``plug(slot)``.
    """
    host, place = machine.host, config.place
    offer = offer_of(machine, config)
    taken = machine.devices
    name = config.id or next(name for at in range(len(taken) + 1) if (name := f"{config.type}{at or ''}") not in taken)
    if name in taken:
        raise place.error(f'the id "{name}" is taken by another device ({taken[name].type})')
    facts = {"machine": machine.name, "device": name, "type": offer.name, "card": offer.card}
    label = config.label or machine.mediator.label(
        machine.label, offer.label, "device", offer.name, ("attach", "configure"), facts
    )
    machine.mediator.check(machine.label, label, "device", ("attach", "configure"), facts)
    options = host.options(offer, config.options, file=place.file, key=place.key)
    slot = DeviceSlot(machine, config, offer, name, label)
    who = f'device "{name}" (card {offer.card}, {offer.distribution})'
    device = carrier = None
    try:
        device = blamed(who, place, lambda: offer.load()(options) if options is not None else offer.load()())
        abilities = abilities_of(device, who)
        slot.bind(device)
        if offer.bus != "system":
            address = config.address if isinstance(config.address, str) else None
            carrier = _carrier(machine, config, offer.bus)
            blamed(who, place, lambda: carrier.attach(device, slot, address))
        if "plug" in abilities:
            blamed(who, place, lambda: device.plug(slot))
    except BaseException:
        if carrier is not None and hasattr(carrier, "detach"):
            carrier.detach(device)
        slot.close()
        raise
    plugged = PluggedDevice(device, slot, abilities)
    machine.devices[name] = plugged
    return plugged


def blamed(who: str, place: Place, act: Callable[[], Any]) -> Any:
    """Do *act*, a card's code: its own errors get their place, its faults its name."""
    try:
        return act()
    except ConfigError as error:
        if error.file not in (None, place.file):  # of a file that is named here, such as a disk image
            if place.file is None:
                raise
            raise ConfigError(str(error), file=place.file, key=place.key) from error
        if (error.file is None and place.file is not None) or error.key is None:
            key = f"{place.key}.{error.key}" if place.key and error.key else error.key or place.key
            raise ConfigError(error.problem, file=error.file or place.file, key=key) from error
        raise
    except CardcageError:
        raise
    except Exception as error:  # a stranger's code: whatever it raises is the card's fault, and named so
        raise CardError(f"{who}: {in_words(error)}") from error
