"""Worker threads that take requests from a device's rings: for devices whose requests may wait for the host.

The vCPU that notifies only wakes a worker. While a worker serves, the driver need not notify. One worker serves a queue
as long as the host answers at once: two would only wait for each other and for the interpreter. Where requests have to
wait, each worker takes a request at a time and wakes the next for the rest.
"""

from __future__ import annotations

import signal
from functools import partial
from queue import SimpleQueue
from threading import Condition, Lock, Thread
from time import monotonic as now
from typing import TYPE_CHECKING

from cardcage.memory import GuestMemoryError

from cardcage_virtio.queue.lane import EMPTY, MORE, OTHER
from cardcage_virtio.queue.request import RingError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage_virtio.queue.request import Request, Ring
    from cardcage_virtio.virtio import Virtio

__all__ = ["Workers"]

BATCH = 16
"""Requests that a worker takes at once."""
QUICK = 3
"""Requests that the notifying thread serves: Linux makes two of a transfer of 1 MiB."""
LINGER = 0.0005
"""Seconds that a served request may wait for others of its batch before the driver hears of it. A request that takes
longer had to wait for the host."""
SLOW, SHARED = 3, 32
"""After so many requests in a row that had to wait, workers share the next so many."""

OTHERS = signal.valid_signals() - {
    *(signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS, signal.SIGABRT)
}
"""Signals that are not for a worker: a handler of the program would break off its system calls (EINTR for the guest),
and SIGXFSZ and SIGPIPE, which the kernel sends to the thread that writes, would end a program that has them as the
system has them by default."""


class Workers:
    """Threads that serve the queues of *io*.

    Args:
        process: serves one request and returns the bytes it wrote, or None when it cannot be served now: it is kept
            until :meth:`retry`. RingError puts the device in NEEDS_RESET.
        threads: how many. name: of the threads, for debuggers.
        quick: serves a request on the notifying thread if that takes no waiting, else returns None with nothing done.
            Used for the first requests of a notification while all workers are idle: waking a worker costs more than a
            read from the host's page cache.
        bulk: likewise serves all that it can of a ring, which nobody else takes from meanwhile, and tells why it
            stopped (:mod:`.lane`); the caller signals.

    A device with workers calls :meth:`notify` in ``notified``, :meth:`drain` in ``drain``, :meth:`close` in ``unplug``
    and ``park``, :meth:`start` in ``unpark``.
    """

    def __init__(
        self,
        io: Virtio,
        process: Callable[[Request], int | None],
        threads: int,
        name: str,
        quick: Callable[[Request], int | None] | None = None,
        bulk: Callable[[Ring], int] | None = None,
    ) -> None:
        self._io, self._process, self._quick, self._bulk = io, process, quick, bulk
        self._wake: SimpleQueue[int | None] = SimpleQueue()
        self._scheduled = [False] * len(io.queues)
        self._tried = [False] * len(io.queues)  # the next request is not for bulk: whoever notified has seen that
        self._waited = [0] * len(io.queues)
        self._shared = [0] * len(io.queues)
        self._locks = [Lock() for _ in io.queues]
        self._kept: list[list[Request]] = [[] for _ in io.queues]
        self._again: list[list[Request]] = [[] for _ in io.queues]
        self._idle = Condition()
        self.active = 0
        self._draining = False
        self._count, self._name = threads, name
        self._threads: list[Thread] = []
        self.start()

    def start(self) -> None:
        """Start the threads, or start them anew after :meth:`close`."""
        names = (f"{self._name}-{at}" for at in range(self._count))
        self._threads = [Thread(target=self._work, name=name, daemon=True) for name in names]
        for thread in self._threads:
            thread.start()

    def notify(self, index: int) -> None:
        """The driver, or whoever drained, says that there is work in queue *index*."""
        self._draining = False
        if (
            self._quick is None
            or self.active
            or self._again[index]
            or self._scheduled[index]
            or not self._serve_quickly(index, self._quick)
        ):
            self._schedule(index)

    def _serve_quickly(self, index: int, quick: Callable[[Request], int | None]) -> bool:
        """Serve a few requests here; whether the ring is empty now."""
        ring, lock = self._io.rings[index], self._locks[index]
        if ring is None or not lock.acquire(blocking=False):
            return False
        done: list[tuple[Request, int]] = []
        try:
            if self._bulk is not None:
                if (why := self._bulk(ring)) != OTHER:
                    return why == EMPTY
                self._tried[index] = True
            while len(done) < QUICK and (request := ring.pop()) is not None:
                written = quick(request)
                if written is None:
                    ring.unpop(request)
                    return False
                done.append((request, written))
            return not ring.rearm()
        finally:
            if done:
                ring.push_many(done)
            lock.release()
            ring.signal()

    def _schedule(self, index: int) -> None:
        """Wake a worker, unless one is on its way to this queue."""
        if not self._scheduled[index]:
            self._scheduled[index] = True
            self._wake.put(index)

    def drain(self) -> None:
        """Wait until no worker is inside a request; none begins before the next notification."""
        with self._idle:
            self._draining = True
            self._idle.wait_for(lambda: not self.active)

    @property
    def kept(self) -> int:
        """Requests that could not be served yet."""
        return sum(not one.ring.dead for lists in (self._kept, self._again) for some in lists for one in some)

    def retry(self) -> None:
        """Serve what was kept, from the next notification on, before anything else. While no worker is active."""
        for index, kept in enumerate(self._kept):
            self._again[index] += kept
            self._kept[index] = []

    def _keep(self, request: Request) -> None:
        """Keep a request that cannot be served now. Raises RingError for more than a driver can wait for."""
        with self._locks[request.ring.index]:
            kept = self._kept[request.ring.index] = [one for one in self._kept[request.ring.index] if not one.ring.dead]
            if len(kept) >= request.ring.size:
                raise RingError(f"more than {request.ring.size} requests at once")
            kept.append(request)

    def close(self) -> None:
        """End the threads, after what they are doing. Idempotent."""
        for _ in self._threads:
            self._wake.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _work(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, OTHERS)
        while (index := self._wake.get()) is not None:
            with self._idle:
                self._scheduled[index] = False
                if self._draining:
                    continue  # whoever drains notifies again
                self.active += 1
            ring = self._io.rings[index]
            try:
                if ring is not None and self._io.live:
                    self._serve(ring)
            except (RingError, GuestMemoryError) as error:
                self._broken(ring, f"queue {index}: {error}")
            except BaseException as error:  # a fault of the device's: it stops the machine, not only this thread
                self._io.slot.loop.call_soon(partial(_raise, error))
            finally:
                with self._idle:
                    self.active -= 1
                    if not self.active:
                        self._idle.notify_all()

    def _broken(self, ring: Ring | None, why: str) -> None:
        def act() -> None:
            if ring is not None and self._io.rings[ring.index] is ring:  # it may have been reset meanwhile
                self._io.break_down(why)

        self._io.slot.loop.call_soon(act)

    def _serve(self, ring: Ring) -> None:
        index, pop, push, process = ring.index, ring.pop, ring.push_many, self._process
        lock, shared = self._locks[index], self._shared
        while not self._draining:
            batch: list[Request] = []
            most = 1 if shared[index] else BATCH
            with lock:
                ring.silence()
                tried, self._tried[index] = self._tried[index], False
                if self._bulk is not None and not tried and not self._again[index] and most > 1:
                    why = self._bulk(ring)
                    ring.signal()
                    if why == EMPTY:
                        return
                    if why == MORE:
                        continue
                if self._again[index]:
                    batch = [one for one in self._again[index][:most] if one.ring is ring]
                    del self._again[index][:most]
                while len(batch) < most and (request := pop()) is not None:
                    batch.append(request)
                if not batch and not self._again[index] and not ring.rearm():
                    return
                more = most == 1 and (ring.more() or bool(self._again[index]))
            if more:
                self._schedule(index)
            done: list[tuple[Request, int]] = []
            began = before = now()
            try:
                for request in batch:
                    written = process(request)
                    if written is None:
                        self._keep(request)
                        continue
                    done.append((request, written))
                    after = now()
                    self._judge(index, after - before > LINGER)
                    if after - began > LINGER:
                        push(done)
                        ring.signal()
                        done, began = [], now()
                    before = now()
            finally:
                push(done)
                ring.signal()

    def _judge(self, index: int, waited: bool) -> None:
        """A request of queue *index* had to wait for the host, or not."""
        if waited:
            self._waited[index] += 1
            if self._waited[index] >= SLOW and len(self._threads) > 1:
                self._shared[index] = SHARED
        else:
            self._waited[index] = 0
            if self._shared[index]:
                self._shared[index] -= 1


def _raise(error: BaseException) -> None:
    raise error
