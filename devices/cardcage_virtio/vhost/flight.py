"""Which requests are in flight with a vhost-user back end that keeps no note of them.

(One that does has VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD; qemu-storage-daemon 7.2 has not.) The next back end begins at
the available ring's entry that has the used ring's index, and takes one for each request that is in flight. When they
end in another order than they began, those entries name other requests: some would be served twice and others never. So
it is counted how often each head was made available and used, and before another back end begins, the entries are made
to name what is in flight. The driver never reads its available ring, and writes only behind its index.

The accelerator counts where it sees the guest read the used ring (``foreign-rings``). Elsewhere the back end's
interrupts come by a thread here, which counts at each; a driver that uses more than a whole ring without one is not
followed.
"""

from __future__ import annotations

import os
from threading import Lock
from typing import TYPE_CHECKING, Any

from cardcage.errors import HostError

from cardcage_virtio.vhost.calls import CallThread

if TYPE_CHECKING:
    from cardcage.device import Slot
    from cardcage.memory import GuestMemory

    from cardcage_virtio.virtio import Queue

__all__ = ["Flight", "RingCount"]


class RingCount:
    """Counts a split ring's requests. Thread-safe.

    Args:
        memory: with the rings of *queue*, in which nothing is in flight.
    """

    def __init__(self, memory: GuestMemory, queue: Queue) -> None:
        self._size = queue.size
        self._avail = memory.view(queue.driver, 6 + 2 * queue.size).cast("H")
        self._used16 = memory.view(queue.device, 4).cast("H")
        self._used = memory.view(queue.device + 4, 8 * queue.size).cast("I")
        self._made = self._seen = self._used16[1]
        self._counts = [0] * queue.size
        self._exact = True
        self._lock = Lock()

    def look(self) -> None:
        """Count what was made available and used since the last look."""
        size, counts = self._size, self._counts
        with self._lock:
            now, made = self._used16[1], self._avail[1]  # in this order: what is used was available before
            if max(now - self._seen & 0xFFFF, made - self._made & 0xFFFF) > size:
                self._exact = False
            while self._exact and self._made != made:
                head = self._avail[2 + self._made % size]
                if head < size:
                    counts[head] += 1
                self._made = self._made + 1 & 0xFFFF
            while self._exact and self._seen != now:
                head = self._used[2 * (self._seen % size)]
                if head < size:
                    counts[head] -= 1
                self._seen = self._seen + 1 & 0xFFFF

    def heads(self) -> tuple[int, list[int]]:
        """The available index up to which was counted, and the heads in flight. Raises HostError: that is not known."""
        self.look()
        if not self._exact:
            raise HostError(
                "the driver used more than a whole ring without an interrupt: what is in flight is not known"
            )
        return self._made, [head for head, count in enumerate(self._counts) if count == 1]


class Flight:
    """The requests that a device's back end has in flight, ring by ring."""

    def __init__(self, slot: Slot) -> None:
        self._slot, self._vm = slot, slot.interrupts.vm
        self._thread = CallThread(self._called, f"{slot.id}-flight")
        self._rings: dict[int, tuple[Queue, int | RingCount]] = {}
        self._calls: dict[int, tuple[int, int]] = {}

    def follow(self, index: int, queue: Queue, call: int, number: int | None) -> int:
        """Follow ring *index*, with nothing in flight; returns the eventfd that the back end is given to call by.

        Args:
            call: the eventfd that interrupts the guest. number: of the ring, where the accelerator counts.
        """
        if number is not None:
            self._rings[index] = queue, number
            return call
        self._rings[index] = queue, RingCount(self._slot.memory, queue)
        if index in self._calls:
            return self._calls[index][0]
        told = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._calls[index] = told, call
        self._thread.add(told, index)
        return told

    def _called(self, index: int) -> None:
        count = self._rings[index][1]
        if isinstance(count, RingCount):
            count.look()
        os.eventfd_write(self._calls[index][1], 1)

    def settle(self, index: int) -> None:
        """Have the available ring name what is in flight from the used index on. Raises HostError: it is not known."""
        if index not in self._rings:
            return
        queue, count = self._rings[index]
        vm: Any = self._vm
        made, heads = count.heads() if isinstance(count, RingCount) else vm.foreign_ring_heads(count)
        memory, size = self._slot.memory, queue.size
        used = memory.view(queue.device, 4).cast("H")[1]
        avail = memory.view(queue.driver, 6 + 2 * size).cast("H")
        if len(heads) != made - used & 0xFFFF:
            raise HostError(f"{len(heads)} requests are in flight, but the rings say {made - used & 0xFFFF}")
        last = {avail[2 + (made - back) % size]: -back for back in range(size, 0, -1)}  # the latest entry of each head
        heads.sort(key=lambda head: last.get(head, -size - 1))  # the oldest first, whose entries were taken by others
        for at, head in enumerate(heads):
            avail[2 + (used + at) % size] = head
        memory.written(queue.driver, 6 + 2 * size)

    def stop(self) -> None:
        """Follow nothing any more. Idempotent."""
        for told, _ in self._calls.values():
            self._thread.remove(told)
            os.close(told)
        self._calls.clear()
        self._rings.clear()
