"""Putting devices into a machine: the platform's and the configured ones, each in a slot of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attrs import evolve

from cardcage._machine.abilities import ABILITIES, abilities_of
from cardcage._machine.asking import Asking
from cardcage._machine.life import Power, State
from cardcage._machine.messages import DeviceInterrupts
from cardcage._machine.opening import DeviceHost
from cardcage._machine.plugged import PluggedDevice
from cardcage._machine.ranges import DeviceRanges
from cardcage._machine.slot import DeviceClock, DeviceLoop, DeviceSlot
from cardcage.abilities import has, tell_near_misses
from cardcage.config import DeviceConfig
from cardcage.device import DetachingBus, HotplugBus
from cardcage.errors import ConfigError, StateError
from cardcage.registry import DeviceOffer
from cardcage.security import Act

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cardcage._machine.board import Board
    from cardcage._machine.wiring import Wiring
    from cardcage.device import Plugged
    from cardcage.host import Host
    from cardcage.interrupts import Line
    from cardcage.memory import PhysicalMemory


class _Reach:
    """The board as platform cards see it; satisfies :class:`~cardcage.device.Board`."""

    def __init__(self, board: Board) -> None:
        self.devices: dict[str, Plugged] = board.devices  # type: ignore[assignment]  # each PluggedDevice is Plugged
        self.lines: Sequence[Line] = board.lines
        self.controllers: Wiring = board.wiring
        self.memory: PhysicalMemory = board.memory
        self.change_memory, self.unplug = board.change_memory, board.unplug


class Plugging:
    """Plugs devices into one board."""

    def __init__(self, host: Host, board: Board) -> None:
        self._host, self._board = host, board
        self._reach = _Reach(board)

    def plug_all(self, platform: Sequence[DeviceConfig], configured: Sequence[DeviceConfig]) -> None:
        """Plug all of them, a device after the bus that carries it. Raises ConfigError, CardError or Denied."""
        waiting = [*platform, *configured]
        while waiting:
            later = [one for one in waiting if not self._bus_ready(one)]
            if len(later) == len(waiting):
                offer = self._offer(later[0])
                wanted = f'bus "{later[0].bus}"' if later[0].bus else f"a {offer.bus} bus"
                raise later[0].place.error(f'"{offer.name}" needs {wanted}, which this machine does not have')
            for config in waiting:
                if not any(config is one for one in later):
                    self.plug(config)
            waiting = later

    def _offer(self, config: DeviceConfig) -> DeviceOffer:
        """The device card's offer. Raises ConfigError with near matches."""
        place = config.place
        return self._host.registry.get(DeviceOffer, config.type, file=place.file, key=place.below("type").key)

    def _bus_ready(self, config: DeviceConfig) -> bool:
        offer = self._offer(config)
        return offer.bus == "system" or self._board.carrier(offer.bus, config.bus) is not None

    def plug(self, config: DeviceConfig) -> PluggedDevice:
        """Make a device and plug it in; on failure nothing of it stays. Under the machine's lock.

        The order: options, ``factory(options)``, its regions are mapped, its bus attaches it, ``plug(slot)``.
        """
        board, place, offer, taken = self._board, config.place, self._offer(config), self._board.devices
        name = config.id or next(at for n in range(len(taken) + 1) if (at := f"{config.type}{n or ''}") not in taken)
        if name in taken:
            raise place.error(f'the id "{name}" is taken by another device ({taken[name].type})')
        facts = {"machine": board.name, "device": name, "type": offer.name, "card": offer.card}
        act = Act(board.label, offer.label, "device", ("attach", "configure"), facts)
        label = config.label or board.mediator.label(act, offer.name)
        board.mediator.check(evolve(act, target=label))
        options = self._host.options(offer, config.options, file=place.file, key=place.key)
        address = config.address if isinstance(config.address, str) else None
        carrier = board.carrier(offer.bus, config.bus) if offer.bus != "system" else None
        if late := board.life.state is not State.BUILT:
            if not has(carrier, HotplugBus):
                raise StateError(f'type "{offer.name}" is added before the machine starts: no guest is told')
            place.blamed(offer.who, lambda: carrier.check_arrival(address))
        slot = self._slot(config, offer, name, label)
        slot.host.sealed = self._host.sealed if late else slot.host.sealed
        who = f'device "{name}" (card {offer.card}, {offer.distribution})'
        factory, device, attached = offer.load(), None, False
        try:
            device = place.blamed(who, lambda: factory(options) if options is not None else factory())
            abilities = abilities_of(device, who)
            tell_near_misses(device, ABILITIES.values(), who, board.log)
            slot.ranges.bind(device, config, offer)
            if attached := carrier is not None:
                place.blamed(who, lambda: carrier.attach(device, slot, address))
            if "plug" in abilities:
                place.blamed(who, lambda: device.plug(slot))
        except BaseException:
            if attached and has(carrier, DetachingBus):
                carrier.detach(device)
            slot.close()
            raise
        plugged = PluggedDevice(device, slot, offer.name, who, abilities, config, carrier)
        board.devices[name] = plugged
        if late:
            if board.life.state is State.PAUSED and "pause" in abilities:
                device.pause()
            carrier.arrived(device)  # type: ignore[union-attr]  # it is a HotplugBus, or nothing had been made
        return plugged

    def _slot(self, config: DeviceConfig, offer: DeviceOffer, id: str, label: str) -> DeviceSlot:
        board, life, log = self._board, self._board.life, self._board.log.bind(device=id)
        asking = Asking(board.mediator, board.name, board.label, id, label)
        number, place = config.irq, config.place
        ranges = DeviceRanges(asking, board.pio, board.mmio, board.occupant, self._refuse_ram)
        slot = DeviceSlot(
            asking,
            board.memory,
            DeviceClock(life.clock, id),
            log,
            Power(life, asking.device),
            DeviceInterrupts(asking, board.lines, board.vm, board.irqchip, number, place, log, ranges.owns),
            ranges,
            DeviceLoop(life.loop, id, lambda: life.outcome is not None or life.failure is not None),
            self._reach,
        )
        slot.host = DeviceHost(asking, self._host, board.memory, board.services, life.console, place, slot)
        return slot

    def _refuse_ram(self, name: str, address: int, size: int) -> None:
        """Later the guest may place a BAR over RAM: RAM wins, as on a PC, and nothing is refused."""
        if self._board.life.state is not State.BUILT:
            return
        for slot in self._board.memory.slots:
            if address < slot.address + slot.size and slot.address < address + size:
                raise ConfigError(
                    f"{name}: memory {address:#x}-{address + size - 1:#x} overlaps RAM at "
                    f"{slot.address:#x}-{slot.address + slot.size - 1:#x}"
                )


def restate(machine: Any) -> None:
    """Have the machine's configuration list what is there now, by id and place: one built from it is the same. None:
    it is gone."""
    if machine is not None and machine._standard is not None:
        there = [one for one in machine.devices.values() if not any(one.config is own for own in machine._standard)]
        places = [one.carrier.place_of(one.device) if has(one.carrier, HotplugBus) else None for one in there]
        found = [(one.config, one.id, at or one.config.address) for one, at in zip(there, places, strict=True)]
        machine.config = evolve(machine.config, devices=tuple(evolve(one, id=id, address=at) for one, id, at in found))
