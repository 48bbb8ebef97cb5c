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

from cardcage_virtio.vhost_channel import (
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    P_INFLIGHT,
    SET_FEATURES,
    Channel,
    memory_regions,
)
from cardcage_virtio.vhost_flight import Flight
from cardcage_virtio.vhost_log import WriteLog
from cardcage_virtio.vhost_talk import Talk

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.clock import Timer
    from cardcage.device import Slot

    from cardcage_virtio.request import Request
    from cardcage_virtio.vhost_channel import MemoryRegion
    from cardcage_virtio.vhost_kinds import VhostUserBlkOptions, VhostUserFsOptions, VhostUserOptions
    from cardcage_virtio.virtio import Virtio

__all__ = ["VhostUser", "VhostUserState"]

F_INDIRECT, F_EVENT_IDX, F_VERSION_1 = 1 << 28, 1 << 29, 1 << 32
NOT_FOR_GUESTS = F_PROTOCOL_FEATURES | 1 << 26 | 1 << 34 | 1 << 40 | 1 << 33  # LOG_ALL, packed, queue reset, IOMMU
RETRY = 100_000_000
"""Nanoseconds between two attempts to reach a back end that died."""
PATIENCE = 2.0
"""Seconds that a back end may keep waiting who holds the machine's lock."""
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
        self.options, self.device_id, self._read_config = options, device_id, read_config
        self._refuse, self._refusing = refuse, False
        self.queue_sizes = (options.queue_size,) * queues
        self.features = self.ring_features = 0
        self.channel: Channel | None = None
        self._config = b""
        self._regions: list[MemoryRegion] = []
        self._events: list[tuple[int, int]] = []
        self._inflight: tuple[int, bytes] | None = None
        self._started: list[int] = []
        self._foreign: dict[int, int] = {}
        self._told: dict[int, int] = {}
        self._bases: dict[int, int] = {}
        self._barred: set[str] = set()
        self._log: WriteLog | None = None
        self._talk: Talk | None = None
        self._slot: Slot
        self._io: Virtio
        self._timer: Timer

    def plug(self, slot: Slot) -> None:
        self._slot, self._timer = slot, slot.clock.timer(self._retry)
        self._flight = Flight(slot)
        where = f"unix:{self.options.socket}"
        slot.ask("socket", where, ("connect",), lambda: self._bar(where), lambda: self._admit(where))
        memory = slot.shared_memory(lambda: self._bar("memory"), lambda: self._admit("memory"))
        try:
            self._regions = memory_regions(memory)
            channel, config = self._connect(Channel(self.options.socket))
        except HostError as error:
            raise ConfigError(f"{slot.id}: {error}") from error
        except OSError as error:
            why = error.strerror or error
            raise ConfigError(f"{slot.id}: no vhost-user back end at {self.options.socket}: {why}") from error
        self._adopt(channel, config)
        self.features, self.ring_features = channel.features & ~NOT_FOR_GUESTS, F_VERSION_1
        flags = os.EFD_NONBLOCK | os.EFD_CLOEXEC
        self._events = [(os.eventfd(0, flags), os.eventfd(0, flags)) for _ in self.queue_sizes]
        if "dirty-log" in getattr(slot.vm, "capabilities", ()):
            slot.vm.add_writer(self)

    def plug_virtio(self, io: Virtio) -> None:
        self._io = io

    def unplug(self) -> None:
        if "dirty-log" in getattr(self._slot.vm, "capabilities", ()):
            self._slot.vm.remove_writer(self)
        self._timer.cancel()
        self._close()
        if self._log is not None:
            self._log.close()
            self._log = None
        for kick, call in self._events:
            os.close(kick)
            os.close(call)
        self._events = []

    def _connect(self, channel: Channel) -> tuple[Channel, bytes]:
        """Open *channel*, and read the configuration space."""
        try:
            channel.open()
            if channel.queues is not None and channel.queues < len(self.queue_sizes):
                raise HostError(f"the back end serves {channel.queues} queues, {len(self.queue_sizes)} are wanted")
            return channel, self._read_config(channel)
        except BaseException:
            channel.close()
            raise

    def _adopt(self, channel: Channel, config: bytes) -> None:
        self.channel, self._config = channel, config
        self._slot.add_reader(channel.fileno(), self._spoke)

    # talking

    def _say(self, channel: Channel, say: Callable[[], None], then: Callable[[], None]) -> None:
        """Have *say* talk on a thread, and do *then*, under the machine's lock, when all was answered."""
        self._then = then

        def heard(talk: Talk) -> None:
            self._slot.call_soon(lambda: self._heard(talk))

        self._talk = Talk(channel, say, heard, f"{self._slot.id}-vhost")

    def _heard(self, talk: Talk) -> None:
        if talk is not self._talk:
            return  # it was cut, or somebody waited for its end
        self._talk = None
        if talk.error is None:
            self._then()
        else:
            talk.channel.close()
            self._died(str(talk.error))

    def _free(self) -> Channel | None:
        """The back end, if there is one, once what was being said to it is answered."""
        talk = self._talk
        if self.channel is not None and talk is not None:
            if talk.over(PATIENCE):
                self._heard(talk)
            else:
                self._died("does not answer")
        return self.channel

    def config(self) -> bytes:
        return self._config

    def config_written(self, offset: int, data: bytes) -> None:
        channel = self._free()
        try:
            if channel is not None and offset + len(data) <= len(self._config):
                with channel.within(PATIENCE):
                    channel.set_config(offset, data)
                    self._config = self._read_config(channel)
        except (OSError, HostError) as error:
            self._died(str(error))

    # life of the rings

    def notified(self, index: int) -> None:
        """After a drain the rings go on; between the death of a back end and the next, requests wait in them."""
        ring = self._io.rings[index]
        if self._refusing and self._barred and self._refuse is not None and ring is not None:
            while (request := ring.pop()) is not None or ring.rearm():
                if request is not None:
                    self._refuse(request)
        elif self._bases and not self._refusing:
            self._begin(fresh=True)

    def start(self) -> None:
        self._started = [at for at, ring in enumerate(self._io.rings) if ring is not None]
        vm = self._slot.vm
        if "foreign-rings" in getattr(vm, "capabilities", ()):
            for index in self._started:
                queue = self._io.queues[index]
                self._foreign[index] = vm.add_foreign_ring(queue.size, queue.table, queue.driver, queue.device)
        if self._barred and self._refuse is not None:
            self._bases = {index: self._bases.get(index, 0) for index in self._started}
            self._take_over()
            return
        for index in self._started:
            self._io.transport.connect(index, *self._events[index])
        self._begin(fresh=True)

    def _begin(self, *, fresh: bool) -> None:
        """Hand memory and rings to the back end: all anew, or as they stand after the last one died."""
        channel = self.channel
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
        self._slot.remove_reader(channel.fileno())  # what comes now are answers

        def begun() -> None:
            self._slot.add_reader(channel.fileno(), self._spoke)

        self._say(channel, lambda: self._hand_over(channel, features, rings, fresh), begun)

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
            self._host(queue.table, 16 * queue.size),
            self._host(queue.driver, 6 + 2 * queue.size),
            self._host(queue.device, 6 + 8 * queue.size),
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

    def _host(self, address: int, size: int) -> int:
        for region in self._regions:
            found = region.host_address(address, size)
            if found is not None:
                return found
        raise HostError(f"ring at {address:#x} is not in shared memory")

    def drain(self) -> None:
        """The back end stops and has no request in flight when it has answered."""
        channel = self._free()
        if channel is None:
            return
        try:
            with channel.within(ENDING if self._inflight is None else PATIENCE):
                for index in self._started:
                    if index not in self._bases:
                        self._bases[index] = channel.stop_ring(index)
        except (OSError, HostError) as error:
            self._died(str(error))

    def stop(self) -> None:
        for index in () if self._refusing else self._started:
            self._io.transport.disconnect(index)
        self._refusing = False
        self._flight.stop()
        self._told.clear()
        foreign, self._foreign = self._foreign, {}
        for number in foreign.values():
            self._slot.vm.remove_foreign_ring(number)
        self._started = []
        self._bases.clear()
        self._drop_inflight()

    def save(self) -> VhostUserState:
        """After a drain; without a back end, from what was used."""
        if self._refusing:
            self._bases = self._refused()
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
        self._free()
        if self._log is not None:
            self._log.close()
        self._log = WriteLog(self._regions) if on else None
        if self._started and not self._bases:
            self.drain()
            self._begin(fresh=True)

    def collect_writes(self) -> list[tuple[int, int]]:
        if self._log is None:
            return []
        channel = self._free()
        try:
            if channel is None or not self._started:
                return self._log.take(None)
            with channel.within(PATIENCE):
                return self._log.take(channel)
        except (OSError, HostError) as error:
            self._died(str(error))
            return self._log.take(None)

    # death and return of the back end

    def _spoke(self) -> None:
        """The socket is readable: an answer that another thread has read meanwhile, or the end of the back end."""
        if self._talk is None and self.channel is not None and self.channel.ended():
            self._died("hung up")

    def _close(self) -> None:
        talk, self._talk = self._talk, None
        if self.channel is not None:
            self._slot.remove_reader(self.channel.fileno())
        if talk is not None:
            talk.cut()
            talk.channel.close()
        if self.channel is not None:
            self.channel.close()
            self.channel = None

    def _died(self, why: str) -> None:
        known = self.channel is not None
        self._close()
        if known:
            self._slot.log.warning(
                "vhost-user back end is gone, waiting for another", why=why, socket=self.options.socket
            )
        self._timer.arm(self._slot.clock.now() + RETRY)

    def _bar(self, why: str) -> None:
        """Security revoked the socket or the memory: hang up. What the back end has mapped stays with it."""
        first = not self._barred
        self._barred.add(why)
        if not first:
            return
        if self._refusing:  # and no back end has come since: what waited for it is refused now
            self._died("revoked by the security policy")
            for index in self._started:
                self._io.kick(index)
            return
        self.drain()
        stopped = self.channel is not None
        self._died("revoked by the security policy")
        # Of a back end that was gone, or did not stop, nobody knows which requests it has answered: they wait.
        if stopped and self._refuse is not None:
            for index in self._started:
                self._io.transport.disconnect(index)
            self._take_over()

    def _admit(self, why: str) -> None:
        self._barred.discard(why)
        if not self._barred and self.channel is None and self._talk is None:
            self._retry()

    def _take_over(self) -> None:
        """Answer requests here from where the back end stopped."""
        self._refusing = True
        for index in self._started:
            ring = self._io.rings[index]
            if ring is not None:
                ring.load((self._bases[index], self._used(index), 0, 0))
                self._io.kick(index)
        self._bases.clear()

    def _refused(self) -> dict[int, int]:
        """How far each ring was answered here."""
        return {index: ring.save()[0] for index in self._started if (ring := self._io.rings[index]) is not None}

    def _hand_back(self) -> None:
        self._bases, self._refusing = self._refused(), False
        for index in self._started:
            self._io.transport.connect(index, *self._events[index])
        self._begin(fresh=True)
        for index in self._started:
            os.eventfd_write(self._events[index][0], 1)  # what came since the last answer here

    def _retry(self) -> None:
        self._timer.cancel()
        if self._barred:
            self._timer.arm(self._slot.clock.now() + RETRY)
            return
        channel = Channel(self.options.socket)
        found: list[tuple[Channel, bytes]] = []
        self._say(channel, lambda: found.append(self._connect(channel)), lambda: self._returned(*found[0]))

    def _returned(self, channel: Channel, config: bytes) -> None:
        missing = self._io.features & ~(channel.features | F_VERSION_1)
        forgets = self._inflight is not None and not channel.protocol & P_INFLIGHT
        if missing or forgets:
            channel.close()
            lacks = (
                f"lacks features {missing:#x}" if missing else "keeps no note of requests in flight, as the last did"
            )
            self._io.break_down(f"the new vhost-user back end {lacks}")
            self._timer.arm(self._slot.clock.now() + RETRY)  # once the driver has reset the device it may do
            return
        self._adopt(channel, config)
        self._slot.log.info("vhost-user back end is back", socket=self.options.socket)
        if self._refusing:
            self._hand_back()
        elif self._started:
            self._begin(fresh=False)
