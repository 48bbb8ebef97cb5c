"""Parts of a machine made from its configuration: each builder returns what it made, or raises and leaves nothing."""

from __future__ import annotations

import os
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from attrs import evolve

from cardcage._config.places import Place, beside
from cardcage._memory.limits import check_ram
from cardcage.abilities import has, require, tell_near_misses
from cardcage.accelerator import VM, Accelerator, Probe, VmSpec, check_vm
from cardcage.boot import BootImage, BootLoader
from cardcage.config import DeviceConfig, assign
from cardcage.device import RamSpan
from cardcage.errors import FAULTS, CardcageError, CardError, ConfigError, HostError, in_words, near
from cardcage.memory import RamRange
from cardcage.ram import Anonymous, MemoryBackend, RamBlock
from cardcage.registry import AcceleratorOffer, BootOffer, MemoryOffer, PlatformOffer, PolicyKeyOffer
from cardcage.security import HOST, OPERATOR, Act, Closable, Mediator
from cardcage.values import frozen

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import ExitStack

    from cardcage._host.log import Log
    from cardcage.accelerator import AcceleratedVm
    from cardcage.config import Config
    from cardcage.device import Platform
    from cardcage.host import Host


@frozen
class Choice:
    """The accelerator that was chosen, and one line that says why."""

    name: str
    accelerator: Accelerator
    probe: Probe
    why: str


class Bare:
    """The platform ``none``: no device, and RAM from address 0 on."""

    reserved: Sequence[tuple[int, int]] = ()

    def devices(self, config: Config, /) -> list[dict[str, Any]]:
        return []

    def ram(self, size: int, /) -> Sequence[RamSpan]:
        return (RamSpan(0, size, 0),)


def probe_of(offer: AcceleratorOffer) -> tuple[Accelerator | None, Probe]:
    """Make and probe an accelerator. One that cannot be made, or whose probe breaks, is not usable and says why."""
    try:
        accelerator = require(offer.load()(), Accelerator, offer.who)
        return accelerator, accelerator.probe()
    except CardcageError as error:
        return None, Probe(False, reason=str(error))
    except FAULTS as error:  # a card's bug must not keep the other accelerators from being tried
        return None, Probe(False, reason=f"broken: {in_words(error)}")


def choose_accelerator(host: Host, config: Config) -> Choice:
    """Pick the first of ``machine.accel`` that is usable and fast, else the first usable; by default, of all.

    An ``emulated`` accelerator is picked over a faster one only when it is asked for alone. Raises ConfigError for a
    name that nobody offers, HostError with every reason when none is usable.
    """
    place = config.place("machine.accel")
    named = [
        host.registry.get(AcceleratorOffer, name, file=place.file, key=f"{place.key}[{at}]")
        for at, name in enumerate(config.machine.accel)
    ]
    probed: list[tuple[str, Accelerator, Probe]] = []
    lines: list[str] = []
    for offer in named or host.registry.offers(AcceleratorOffer):
        accelerator, probe = probe_of(offer)
        if accelerator is not None and probe.usable:
            probed.append((offer.name, accelerator, probe))
            if probe.speed != "emulated":
                break
        lines.append(f"{offer.name}: {probe.reason or probe.speed}")
    if not probed:
        raise HostError(
            f"no accelerator is usable here ({'; '.join(lines) or 'no card offers one'}); see cardcage doctor"
        )
    name, accelerator, probe = min(probed, key=lambda one: one[2].speed == "emulated")
    others = [line for line in lines if not line.startswith(f"{name}: ")]
    why = f"{name}: {probe.reason}" if probe.reason else f"{name}: {probe.speed}"
    return Choice(name, accelerator, probe, f"{why} ({'; '.join(others)})" if others else why)


def create_vm(
    host: Host, config: Config, mediator: Mediator, label: str, choice: Choice, log: Log
) -> tuple[AcceleratedVm, str]:
    """Create the VM; return it and its irqchip. Raises ConfigError, Denied or AcceleratorError."""
    wanted = config.machine
    for name in config.accel:
        place = config.place(f"accel.{name}")
        host.registry.get(AcceleratorOffer, name, file=place.file, key=place.key)
    place = config.place(f"accel.{choice.name}")
    offer = host.registry.get(AcceleratorOffer, choice.name)
    options = host.options(offer, config.accel.get(choice.name, {}), file=place.file, key=place.key)
    acts = ("map", "execmem") if choice.probe.executable else ("map",)
    mediator.check(Act(label, label, "memory", acts, {"machine": wanted.name, "accelerator": choice.name}))
    irqchip = "split" if wanted.irqchip == "auto" else wanted.irqchip
    vm = choice.accelerator.create_vm(VmSpec(wanted.cpus, irqchip, wanted.cpu, dict(wanted.features), options))
    try:
        check_vm(vm, offer.who)
    except CardError:
        if has(vm, Closable):
            vm.close()
        raise
    tell_near_misses(vm, VM, offer.who, log)
    if irqchip == "full" and "irqchip-full" not in vm.capabilities:
        vm.close()
        raise config.place("machine.irqchip").error(f'accelerator "{choice.name}" has no full irqchip; use "split"')
    return vm, irqchip


# security


def mediate(
    host: Host, config: Config, log: Log, deliver: Callable[[Callable[[], None]], None], end: ExitStack
) -> tuple[Mediator, str]:
    """Make the machine's mediator (the host's checkers, and those that only it has) and its label; ask for ``create``.

    What is to be ended goes to *end*. Raises ConfigError, CardError or Denied.
    """
    own, name = [], config.machine.name
    for spec in config.security:
        if spec not in host.security:
            own.append(checker := host.make_checker(spec))
            if has(checker, Closable):
                end.callback(checker.close)
    mediator = Mediator((*host.mediator.checkers, *own), deliver=deliver, log=log)
    end.callback(mediator.close)
    mediator.follow()
    act = Act(OPERATOR, HOST, "machine", ("create",), {"machine": name})
    label = config.machine.label or mediator.label(act, name)
    end.callback(mediator.release, label, "machine")
    mediator.check(evolve(act, target=label))
    return mediator, label


def allow_files(mediator: Mediator, name: str, label: str, table: Mapping[str, Any], *permissions: str) -> None:
    """Ask about the files that a table of the configuration names: each text in it that is the path of one."""
    if not mediator.checkers:
        return
    facts = {"machine": name, "readonly": "write" not in permissions}
    for key, value in table.items():
        for text in value if isinstance(value, list) else [value]:
            # A module of multiboot is a path, then its own command line.
            if not isinstance(text, str):
                continue
            whole = beside(text)
            for path in {whole, whole.removesuffix(text[len(text.partition(" ")[0]) :])}:
                if path and (key == "path" or os.path.lexists(path)):
                    mediator.ask(Act(label, label, "image", permissions, facts), path)


def check_policy_keys(host: Host, config: Config) -> None:
    """Refuse a key of ``[policy]`` or ``[security]`` that no card reads, with a ConfigError: nobody would heed it."""
    for key in (*config.policy, *(f"security.{one}" for one in config.guards)):
        place = config.place(key if key.startswith("security.") else f"policy.{key}")
        host.registry.get(PolicyKeyOffer, key, file=place.file, key=place.key)


# memory


def make_platform(host: Host, config: Config) -> Platform:
    """The platform that ``machine.platform`` names. Raises ConfigError or CardError."""
    name, place = config.machine.platform, config.place("machine.platform")
    if name == "none":
        return Bare()
    offer = host.registry.get(PlatformOffer, name, file=place.file, key=place.key)
    made: Platform = place.blamed(offer.who, lambda: offer.load()())
    return made


def platform_devices(platform: Platform, config: Config) -> list[DeviceConfig]:
    """The device tables that the platform adds, as configurations, with what ``--set`` says of them."""
    where = f"platform {config.machine.platform}"
    tables = [(deepcopy(one), Place(where, f"device[{at}]")) for at, one in enumerate(platform.devices(config))]
    for name, path, value, key in config.defaults:
        found = (at for wanted in ("id", "type") for at, one in enumerate(tables) if one[0].get(wanted) == name)
        if (index := next(found, None)) is None:
            names = [*(one.id or one.type for one in config.devices), *(str(one["type"]) for one, _ in tables)]
            raise ConfigError(f'this machine has no device "{name}".{near(name, names)}', file="--set", key=key)
        assign(tables[index][0], path, value, key)
        tables[index] = tables[index][0], Place("--set", f"device.{name}")
    return [DeviceConfig.from_table(table, place) for table, place in tables]


def make_memory_backend(host: Host, config: Config, mediator: Mediator, label: str, log: Log) -> MemoryBackend:
    """What ``[memory]`` names. The default is the kernel's own, so that a machine needs no card for it."""
    chosen, place, name = config.memory, config.place("memory.type"), config.machine.name
    if chosen.type == "anonymous" and not chosen.options:
        return Anonymous()
    offer = host.registry.get(MemoryOffer, chosen.type, file=place.file, key="memory.type")
    mediator.ask(Act(label, label, "backend", ("open",), {"machine": name}), f"memory:{chosen.type}")
    allow_files(mediator, name, label, chosen.options, "open", "read", "write", "create")
    options = host.options(offer, chosen.options, file=place.file, key="memory")
    who = f'memory "{offer.name}" (card {offer.card}, {offer.distribution})'
    factory = offer.load()
    made: Any = Place(place.file, "memory").blamed(who, lambda: factory(options) if options is not None else factory())
    tell_near_misses(made, (MemoryBackend,), who, log)
    return require(made, MemoryBackend, who)


def allocate_ram(backend: MemoryBackend, config: Config) -> RamBlock:
    """One block for all of the machine's RAM; errors get the place of the key that is to blame."""
    try:
        size = check_ram(config.machine.memory, limited=backend.takes_ram)
        return RamBlock(size, "ram", backend, config.memory)
    except ConfigError as error:
        key = f"memory.{error.key}" if error.key else "machine.memory"
        raise config.place(key).error(error.problem) from error


def ranges_of(block: RamBlock, spans: Sequence[RamSpan]) -> list[RamRange]:
    """Where *block* shows in the address space."""
    return [RamRange(one.address, one.size, block, offset=one.offset) for one in spans]


# booting


def open_boot(host: Host, config: Config, mediator: Mediator, label: str) -> BootImage | None:
    """Read and check what ``[boot]`` names; None without one. Raises ConfigError that names the file or key."""
    table = dict(config.boot or {})
    if not table:
        return None
    place = config.place("boot")
    file = next((config.place(f"boot.{key}").file for key in table), None)
    name = table.pop("protocol", "auto")
    offer = host.registry.get(BootOffer, str(name), file=file, key="boot.protocol")
    options = host.options(offer, table, file=file, key="boot")
    allow_files(mediator, config.machine.name, label, table, "open", "read")
    try:
        factory = offer.load()
        loader = require(factory(options) if options is not None else factory(), BootLoader, offer.who)
        image = require(loader.open(), BootImage, offer.who)
    except ConfigError as error:
        if error.file is not None:  # the kernel's own path says more than the key does
            raise
        raise ConfigError(error.problem, file=file, key=error.key or place.key) from error
    return image
