"""vhost-user front ends: a virtio device whose queues another process serves, over shared guest memory.

The back end listens (``qemu-storage-daemon``, ``virtiofsd``); guest memory must be shared
(``memory.type = "memfd"``). Notifications and interrupts are eventfds that need not pass through this process.
When the back end dies the guest's requests wait in their rings; this device connects again until one answers, gives it
the note of requests in flight, and goes on. A back end may be slow, or silent: it is talked to on another thread, and
where the guest, a pause or a reset has to wait for it, they wait :data:`PATIENCE` or :data:`ENDING` s and hang up.

While security bars the back end, requests of disks and shares are answered with an error here; of other devices, whose
requests this process does not understand, they wait.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, ClassVar

from attrs import define, field
from cardcage.errors import ConfigError, HostError
from cardcage.security import Needs

from cardcage_virtio.vhost.channel import (
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    P_INFLIGHT,
    SET_FEATURES,
    Channel,
    host_address,
    memory_regions,
)
from cardcage_virtio.vhost.flight import Flight
from cardcage_virtio.vhost.link import PATIENCE, Link
from cardcage_virtio.vhost.log import WriteLog
from cardcage_virtio.vhost.standin import StandIn

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.device import Slot

    from cardcage_virtio.queue.request import Request
    from cardcage_virtio.vhost.channel import MemoryRegion
    from cardcage_virtio.vhost.kinds import VhostUserBlkOptions, VhostUserFsOptions, VhostUserOptions
    from cardcage_virtio.virtio import Virtio

__all__ = ["VhostUser", "VhostUserState"]

F_INDIRECT, F_EVENT_IDX, F_VERSION_1 = 1 << 28, 1 << 29, 1 << 32
NOT_FOR_GUESTS = F_PROTOCOL_FEATURES | 1 << 26 | 1 << 34 | 1 << 40 | 1 << 33  # LOG_ALL, packed, queue reset, IOMMU
ENDING = 10.0
"""The same to end its requests when no note is kept of them: what it has not ended when we hang up is lost."""


@define
class VhostUserState:
    """Where in each running queue the back end was to go on; what is in it is the back end's own to keep."""

    version: ClassVar[int] = 1
    bases: dict[int, int] = field(factory=dict)


class VhostUser:
    """The front end of one back end.

    Args:
        queues: of the virtio device, all kinds together. read_config: gives what the guest sees as configuration space.
        refuse: answers a request with an error, where that can be done for this kind of device.
    """

    def __init__(
        self,
        options: VhostUserOptions | VhostUserBlkOptions | VhostUserFsOptions,
        device_id: int,
        queues: int,
        read_config: Callable[[Channel], bytes],
        refuse: Callable[[Request], None] | None = None,
    ) -> None:
        self.options, self.device_id = options, device_id
        self._refuse = refuse
        self.queue_sizes = (options.queue_size,) * queues
        self.link = Link(options.socket, queues, read_config, self._returned)
        self.features = self.ring_features = 0
        self._regions: list[MemoryRegion] = []
        self._events: list[tuple[int, int]] = []
        self._inflight: tuple[int, bytes] | None = None
        self._started: list[int] = []
        self._foreign: dict[int, int] = {}
        self._told: dict[int, int] = {}
        self._bases: dict[int, int] = {}
        self._log: WriteLog | None = None
        self._slot: Slot
        self._io: Virtio
        self._stand_in: StandIn

    def plug(self, slot: Slot) -> None:
        self._slot = slot
        self.link.plug(slot)
        self._flight = Flight(slot)
        where = f"unix:{self.options.socket}"
        slot.host.ask("socket", where, ("connect",), lambda: self._bar(where), lambda: self.link.admit(where))
        memory = slot.host.shared_memory(lambda: self._bar("memory"), lambda: self.link.admit("memory"))
        try:
            self._regions = memory_regions(memory)
            channel = self.link.open()
        except HostError as error:
            raise ConfigError(f"{slot.id}: {error}") from error
        except OSError as error:
            why = error.strerror or error
            raise ConfigError(f"{slot.id}: no vhost-user back end at {self.options.socket}: {why}") from error
        self.features, self.ring_features = channel.features & ~NOT_FOR_GUESTS, F_VERSION_1
        flags = os.EFD_NONBLOCK | os.EFD_CLOEXEC
        self._events = [(os.eventfd(0, flags), os.eventfd(0, flags)) for _ in self.queue_sizes]
        if "dirty-log" in getattr(slot.interrupts.vm, "capabilities", ()):
            slot.interrupts.vm.add_writer(self)

    def plug_virtio(self, io: Virtio) -> None:
        self._io, self._stand_in = io, StandIn(io, self._refuse)

    def needs(self) -> Needs:
        """A back end that went away is called again."""
        return Needs(sockets=("unix",))

    def unplug(self) -> None:
        if "dirty-log" in getattr(self._slot.interrupts.vm, "capabilities", ()):
            self._slot.interrupts.vm.remove_writer(self)
        self.link.unplug()
        if self._log is not None:
            self._log.close()
            self._log = None
        for kick, call in self._events:
            os.close(kick)
            os.close(call)
        self._events = []

    def config(self) -> bytes:
        return self.link.config

    def config_written(self, offset: int, data: bytes) -> None:
        channel = self.link.free()
        try:
            if channel is not None and offset + len(data) <= len(self.link.config):
                with channel.within(PATIENCE):
                    channel.set_config(offset, data)
                    self.link.config = self.link.read_config(channel)
        except (OSError, HostError) as error:
            self.link.died(str(error))

    # life of the rings

    def notified(self, index: int) -> None:
        """After a drain the rings go on; between the death of a back end and the next, requests wait in them."""
        if self._stand_in.active:
            if self.link.barred:
                self._stand_in.answer(index)
        elif self._bases:
            self._begin(fresh=True)

    def start(self) -> None:
        self._started = [at for at, ring in enumerate(self._io.rings) if ring is not None]
        vm = self._slot.interrupts.vm
        if "foreign-rings" in getattr(vm, "capabilities", ()):
            for index in self._started:
                queue = self._io.queues[index]
                self._foreign[index] = vm.add_foreign_ring(queue.size, queue.table, queue.driver, queue.device)
        if self.link.barred and self._refuse is not None:
            self._bases = {index: self._bases.get(index, 0) for index in self._started}
            self._take_over()
            return
        for index in self._started:
            self._io.transport.connect(index, *self._events[index])
        self._begin(fresh=True)

    def _begin(self, *, fresh: bool) -> None:
        """Hand memory and rings to the back end: all anew, or as they stand after the last one died."""
        channel = self.link.channel
        if channel is None:
            return
        if fresh and not channel.protocol & P_INFLIGHT:
            for index in self._started:
                call, number = self._events[index][1], self._foreign.get(index)
                self._told[index] = self._flight.follow(index, self._io.queues[index], call, number)
        try:
            rings = [self._ring(index, fresh) for index in self._started]
        except HostError as error:
            self._io.break_down(str(error))
            return
        self._bases.clear()
        features = self._io.features | channel.features & F_PROTOCOL_FEATURES
        self.link.listen(channel, False)
        self.link.say(
            channel,
            lambda: self._hand_over(channel, features, rings, fresh),
            lambda: self.link.listen(channel, True),
        )

    def _hand_over(self, channel: Channel, features: int, rings: list[tuple[int, ...]], fresh: bool) -> None:
        if self._log is not None and self._log.follow(channel):
            features |= F_LOG_ALL
        channel.send(SET_FEATURES, struct.pack("<Q", features))
        channel.set_memory(self._regions)
        if fresh:
            self._drop_inflight()
        if self._inflight is None:
            self._inflight = channel.new_inflight(len(self.queue_sizes), max(self.queue_sizes))
        if self._inflight is not None:
            channel.set_inflight(self._inflight)
        for index, size, base, table, used, avail in rings:
            kick, call = self._events[index]
            log = self._io.queues[index].device if self._log is not None else None
            channel.set_ring(index, size, base, table, used, avail, kick, self._told.get(index, call), log)
            if base or not fresh:
                os.eventfd_write(kick, 1)  # what came while nobody listened
                os.eventfd_write(call, 1)

    def _ring(self, index: int, fresh: bool) -> tuple[int, ...]:
        """Number, size, where to go on, and our addresses of table, used and available ring."""
        queue = self._io.queues[index]
        table, avail, used = (
            host_address(self._regions, queue.table, 16 * queue.size),
            host_address(self._regions, queue.driver, 6 + 2 * queue.size),
            host_address(self._regions, queue.device, 6 + 8 * queue.size),
        )
        base = self._bases.get(index, 0)
        if not fresh:  # go on behind what was used; the back end adds what it noted as in flight
            self._settle(index)
            base = self._used(index)
        return index, queue.size, base, table, used, avail

    def _settle(self, index: int) -> None:
        """Without a note, the available ring itself says what is in flight. Raises HostError where it is not known."""
        if self._inflight is None:
            self._flight.settle(index)

    def _used(self, index: int) -> int:
        return self._slot.memory.view(self._io.queues[index].device, 4).cast("H")[1]

    def drain(self) -> None:
        """The back end stops and has no request in flight when it has answered."""
        channel = self.link.free()
        if channel is None:
            return
        try:
            with channel.within(ENDING if self._inflight is None else PATIENCE):
                for index in self._started:
                    if index not in self._bases:
                        self._bases[index] = channel.stop_ring(index)
        except (OSError, HostError) as error:
            self.link.died(str(error))

    def stop(self) -> None:
        for index in () if self._stand_in.active else self._started:
            self._io.transport.disconnect(index)
        self._stand_in.active = False
        self._flight.stop()
        self._told.clear()
        foreign, self._foreign = self._foreign, {}
        for number in foreign.values():
            self._slot.interrupts.vm.remove_foreign_ring(number)
        self._started = []
        self._bases.clear()
        self._drop_inflight()

    def save(self) -> VhostUserState:
        """After a drain; without a back end, from what was used."""
        if self._stand_in.active:
            self._bases = self._stand_in.places(self._started)
        for index in self._started:
            if index not in self._bases:
                self._settle(index)
        return VhostUserState({index: self._bases.get(index, self._used(index)) for index in self._started})

    def load(self, state: VhostUserState) -> None:
        self._bases = dict(state.bases)

    def _drop_inflight(self) -> None:
        if self._inflight is not None:
            os.close(self._inflight[0])
            self._inflight = None

    # what the back end writes (:class:`cardcage.accelerator.ForeignWriter`)

    def log_writes(self, on: bool, /) -> None:
        """Rings that run stop for a moment, to go on with the log, or without."""
        self.link.free()
        if self._log is not None:
            self._log.close()
        self._log = WriteLog(self._regions) if on else None
        if self._started and not self._bases:
            self.drain()
            self._begin(fresh=True)

    def collect_writes(self) -> list[tuple[int, int]]:
        if self._log is None:
            return []
        channel = self.link.free()
        try:
            if channel is None or not self._started:
                return self._log.take(None)
            with channel.within(PATIENCE):
                return self._log.take(channel)
        except (OSError, HostError) as error:
            self.link.died(str(error))
            return self._log.take(None)

    # death and return of the back end

    def _bar(self, why: str) -> None:
        """Security revoked the socket or the memory: hang up. What the back end has mapped stays with it."""
        first = not self.link.barred
        self.link.barred.add(why)
        if not first:
            return
        if self._stand_in.active:  # and no back end has come since: what waited for it is refused now
            self.link.died("revoked by the security policy")
            for index in self._started:
                self._io.kick(index)
            return
        self.drain()
        stopped = self.link.channel is not None
        self.link.died("revoked by the security policy")
        # Of a back end that was gone, or did not stop, nobody knows which requests it has answered: they wait.
        if stopped and self._refuse is not None:
            for index in self._started:
                self._io.transport.disconnect(index)
            self._take_over()

    def _take_over(self) -> None:
        """Answer requests here from where the back end stopped."""
        places = {index: (self._bases[index], self._used(index)) for index in self._started}
        self._bases.clear()
        self._stand_in.take_over(places)

    def _hand_back(self) -> None:
        self._bases, self._stand_in.active = self._stand_in.places(self._started), False
        for index in self._started:
            self._io.transport.connect(index, *self._events[index])
        self._begin(fresh=True)
        for index in self._started:
            os.eventfd_write(self._events[index][0], 1)  # what came since the last answer here

    def _returned(self, channel: Channel, config: bytes) -> None:
        self.features = channel.features & ~NOT_FOR_GUESTS
        self._io.offered = self.ring_features | self.features  # which a driver reads after its next reset
        missing = self._io.features & ~self._io.offered
        forgets = self._inflight is not None and not channel.protocol & P_INFLIGHT
        if missing or forgets:
            channel.close()
            lacks = (
                f"lacks features {missing:#x}" if missing else "keeps no note of requests in flight, as the last did"
            )
            self._io.break_down(f"the new vhost-user back end {lacks}")
            self.link.later()  # once the driver has reset the device it will do
            return
        self.link.adopt(channel, config)
        self._slot.log.info("vhost-user back end is back", socket=self.options.socket)
        if self._stand_in.active:
            self._hand_back()
        elif self._started:
            self._begin(fresh=False)
