"""The machine's loop thread, and the guest clock with its timers on it."""

from __future__ import annotations

import ctypes
import heapq
import itertools
import os
import select
import threading
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

CLOCK_MONOTONIC = 1
TFD_NONBLOCK, TFD_CLOEXEC, TFD_TIMER_ABSTIME = 0o4000, 0o2000000, 1
BURST = 256  # timers that fire before others may have the lock: one that is armed for the past is always due


class Owned:
    """A callback of a device (``None``: of the kernel, and runs others); a reader since a *turn* of the loop."""

    __slots__ = ("callback", "device", "turn")

    def __init__(self, callback: Callable[[], None], device: str | None, turn: int = 0) -> None:
        self.callback, self.device, self.turn = callback, device, turn

    def __call__(self) -> None:
        self.callback()


class EventLoop:
    """A thread that waits for descriptors and runs callbacks.

    It is a plain epoll loop: what asyncio does between two events is a good part of a packet's latency. Code written
    with asyncio runs in a loop of its own and comes in by :meth:`call_soon`.

    Args:
        name: of the thread, for debuggers.
        locked: runs a callback, which may be an :class:`Owned`, under the machine's lock, and sees to what it raises.
    """

    def __init__(self, name: str, locked: Callable[[Callable[[], None]], None]) -> None:
        self.locked, self._name = locked, name
        self._readers: dict[int, Owned] = {}
        self._turn = 0
        self._posts: deque[Callable[[], None]] = deque()
        self.waking = threading.RLock()  # who has parked the machine holds it, and posts
        self.start()

    def start(self) -> None:
        """Begin, or begin anew after :meth:`close`, with descriptors of its own: this may be a forked process."""
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._woken = self._ending = False
        for fd in (self._wake, *self._readers):
            self._epoll.register(fd, select.EPOLLIN)
        self.thread = threading.Thread(target=self._main, name=f"{self._name}-loop", daemon=True)
        self.thread.start()

    def _main(self) -> None:
        self._ident = threading.get_ident()
        wait, locked, wake, posts = self._epoll.poll, self.locked, self._wake, self._posts
        while not self._ending:
            self._turn += 1
            for fd, _ in wait(0 if posts else None):
                if fd == wake:
                    os.eventfd_read(wake)
                    self._woken = False  # before the posts are looked at: a later one writes again
                elif (reader := self._readers.get(fd)) is not None and reader.turn != self._turn:
                    locked(reader)  # of this turn it is not: the event may be of another file with its number
            for _ in range(len(posts)):
                posts.popleft()()

    @property
    def here(self) -> bool:
        """Whether this is the loop thread."""
        return threading.current_thread() is self.thread

    def post(self, callback: Callable[[], None]) -> None:
        """Run *callback*, which raises nothing, on the loop thread without the machine's lock.

        Thread-safe; nothing once closed.
        """
        self._posts.append(callback)
        if not self._woken and not self.here:  # it looks before it waits
            with self.waking:
                if not self._ending:  # else the descriptor may be another file's by now
                    self._woken = True
                    os.eventfd_write(self._wake, 1)

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Run *callback* on the loop thread under the machine's lock. Thread-safe; nothing once closed."""
        self.post(lambda: self.locked(callback))

    def add_reader(self, fd: int, callback: Callable[[], None], device: str | None = "") -> None:
        """Call *callback* of *device* under the machine's lock whenever *fd* is readable, replacing an earlier one.

        Any thread. Raises OSError for what cannot be waited for (a regular file).
        """
        if not self._ending:  # else it begins anew with it, or never
            with suppress(FileExistsError):  # the earlier one's
                self._epoll.register(fd, select.EPOLLIN)
        self._drop(fd)
        self._readers[fd] = Owned(callback, device, self._turn)

    def remove_reader(self, fd: int) -> None:
        """No more calls for *fd*, which may be closed at once. Under the machine's lock, on any thread."""
        if self._drop(fd) and not self._ending:
            with suppress(OSError):  # closed already: epoll has forgotten it
                self._epoll.unregister(fd)

    def _drop(self, fd: int) -> bool:
        if (reader := self._readers.pop(fd, None)) is None:
            return False
        reader.callback = lambda: None  # it may be about to run
        return True

    def close(self) -> None:
        """Stop the thread and wait for it. Idempotent; not on the loop thread."""
        if not self._ending:
            self.post(self._end)
            self.thread.join()
            self._epoll.close()
            os.close(self._wake)

    def _end(self) -> None:
        with self.waking:
            self._ending = True


class MachineTimer(Owned):
    """A one-shot alarm on a :class:`MachineClock`; see :class:`~cardcage.clock.Timer`. Called, it fires."""

    __slots__ = ("__weakref__", "_clock", "when")

    def __init__(self, clock: MachineClock, callback: Callable[[], None], device: str) -> None:
        super().__init__(callback, device)
        self._clock = clock
        self.when: int | None = None

    def arm(self, when: int, /) -> None:
        """Fire once the clock reaches *when* (nanoseconds). Under the machine's lock."""
        self.when = when
        self._clock._push(when, self)

    def cancel(self) -> None:
        """Do not fire."""
        self.when = None

    def __call__(self) -> None:
        self.when = None
        self.callback()


class _TimerSpec(ctypes.Structure):
    """``struct itimerspec`` (timerfd_settime(2))."""

    _fields_ = (("interval", ctypes.c_long * 2), ("value", ctypes.c_long * 2))


class MachineClock:
    """Guest time in nanoseconds: stands still until :meth:`resume` and from :meth:`pause` on.

    Timers wait in a heap behind one timerfd, which any thread can set with one system call and which is exact to
    microseconds where the loop's own timeouts are whole milliseconds. All of it is used under the machine's lock.
    """

    def __init__(self, events: EventLoop) -> None:
        self._libc = ctypes.PyDLL(None, use_errno=True)  # which keeps the GIL: nothing here waits
        self._settime = self._libc.timerfd_settime
        self._events = events
        self._heap: list[tuple[int, int, MachineTimer]] = []
        self._order = itertools.count()
        self._stood = 0
        self._base: int | None = None
        self._alarm: int | None = None
        self.start()

    def start(self) -> None:
        """Make the descriptor, or make it anew after :meth:`close`."""
        self._armed, self._fd = False, self._libc.timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self._events.add_reader(self._fd, self._expired, None)

    def now(self) -> int:
        """Nanoseconds of guest time."""
        base = self._base
        return self._stood if base is None else time.monotonic_ns() - base

    def set(self, now: int) -> None:
        """Continue from *now* (a snapshot's time). The machine is paused."""
        self._stood = now

    def timer(self, callback: Callable[[], None], /, device: str = "") -> MachineTimer:
        """A timer of *device*; *callback* runs on the loop thread under the machine's lock."""
        return MachineTimer(self, callback, device)

    def resume(self) -> None:
        """Let time run."""
        if self._base is None:
            self._base = time.monotonic_ns() - self._stood
            self._set_alarm()

    def pause(self) -> None:
        """Let time stand still."""
        if self._base is not None:
            self._stood, self._base = time.monotonic_ns() - self._base, None
            self._write_alarm(0)

    def _push(self, when: int, timer: MachineTimer) -> None:
        heapq.heappush(self._heap, (when, next(self._order), timer))
        if len(self._heap) > 64:  # re-armed and cancelled timers leave their old entries behind
            live = {id(one): (at, number, one) for at, number, one in self._heap if one.when == at}
            self._heap = sorted(live.values())
        if self._base is not None and (self._alarm is None or when < self._alarm):
            self._set_alarm()

    def _set_alarm(self) -> None:
        heap = self._heap
        while heap and heap[0][2].when != heap[0][0]:
            heapq.heappop(heap)
        self._alarm = heap[0][0] if heap else None
        if self._base is not None:
            self._write_alarm(0 if self._alarm is None else max(self._alarm + self._base, 1))

    def _write_alarm(self, at: int) -> None:
        if at or self._armed:
            at, self._armed = min(at, (1 << 63) - 1), bool(at)  # a guest may ask for the end of time
            spec = _TimerSpec((0, 0), divmod(at, 1_000_000_000))
            self._settime(self._fd, TFD_TIMER_ABSTIME, ctypes.byref(spec), None)

    def _expired(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:  # set anew between the wake-up and now
            return
        self._alarm = None
        try:
            for _ in range(BURST):
                heap = self._heap
                if self._base is None or not heap or heap[0][0] > self.now():
                    break
                when, _, timer = heapq.heappop(heap)
                if timer.when == when:
                    self._events.locked(timer)
        finally:  # a callback that was denied something must not keep the other timers from firing
            self._set_alarm()

    def close(self) -> None:
        """Give the descriptor back, after the loop thread has ended. Idempotent."""
        if self._fd >= 0:
            self._events.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
