"""Network namespaces, a slot with a real event loop, and a cable between two back ends: what the network tests need."""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
from typing import TYPE_CHECKING, Any, TypeVar, cast

from cardcage._machine.eventloop import EventLoop, MachineClock
from cardcage.host import Host
from cardcage_testing import TestSlot

if TYPE_CHECKING:
    from collections.abc import Callable

CLONE_NEWNET = 0x40000000
T = TypeVar("T")


class Namespace:
    """A network namespace of the test's own, with only loopback; gone when it is closed."""

    def __init__(self) -> None:
        self._holder = subprocess.Popen(
            ["unshare", "-n", "sh", "-c", "ip link set lo up && echo up && exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"up\n"
        self.pid = self._holder.pid
        self._fd = os.open(f"/proc/{self.pid}/ns/net", os.O_RDONLY)

    def run(self, act: Callable[[], T]) -> T:
        """Call *act* on a thread inside the namespace; processes and sockets that it makes belong there."""
        found: list[T] = []
        failed: list[BaseException] = []

        def inside() -> None:
            try:
                if ctypes.CDLL(None, use_errno=True).setns(self._fd, CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
                found.append(act())
            except BaseException as error:  # raised again on the caller's thread
                failed.append(error)

        thread = threading.Thread(target=inside)
        thread.start()
        thread.join()
        if failed:
            raise failed[0]
        return found[0]

    def shell(self, *commands: str) -> str:
        """Run shell commands inside."""
        return self.run(
            lambda: (
                subprocess.run(["sh", "-ec", "\n".join(commands)], check=True, capture_output=True, text=True).stdout
            )
        )

    def popen(self, *words: str, **options: Any) -> subprocess.Popen[str]:
        return self.run(lambda: subprocess.Popen(words, text=True, **options))

    def close(self) -> None:
        os.close(self._fd)
        self._holder.communicate()


def outside_world() -> Namespace:
    """A namespace with an interface that has an address, 192.0.2.2, and a default route, which lead to nothing."""
    made = Namespace()
    made.shell(
        "ip link add out0 type veth peer name nowhere",
        "ip addr add 192.0.2.2/24 dev out0",
        "ip link set out0 up",
        "ip link set nowhere up",
        "ip route add default via 192.0.2.1",
    )
    return made


class Slot(TestSlot):
    """A slot with a real loop and clock, and the shares of *host*."""

    def __init__(self, host: Host | None = None) -> None:
        super().__init__()
        self.loop.close()
        self.lock = threading.RLock()
        self.failures: list[BaseException] = []
        self.events = EventLoop("net-test", self._locked)
        self.loop, self.clock = cast(Any, self.events), cast(Any, MachineClock(self.events))
        with self.lock:
            cast(Any, self.clock).resume()
        self.host.share = (host or Host(installed=False)).share  # type: ignore[method-assign]  # as in one process

    @property
    def said(self) -> list[tuple[str, dict[str, Any]]]:
        """Entries of the log."""
        return [(event, values) for _, event, values in self.log.entries]

    def _locked(self, callback: Callable[[], None]) -> None:
        with self.lock:
            try:
                callback()
            except BaseException as error:  # the test looks at it
                self.failures.append(error)

    def close(self) -> None:
        super().close()
        cast(Any, self.clock).close()
        assert not self.failures, self.failures


class Guest:
    """The device's side of a back end: collects frames, and can have no room for them."""

    def __init__(self, slot: Slot, backend: Any) -> None:
        self.slot, self.backend = slot, backend
        self.frames: list[bytes] = []
        self.room = 1 << 30
        self._came = threading.Condition()
        with slot.lock:
            backend.start(self._received)

    def _received(self, queue: int, frame: bytes | memoryview) -> bool:
        with self._came:
            if len(self.frames) >= self.room:
                return False
            self.frames.append(bytes(frame))
            self._came.notify_all()
        return True

    def send(self, *parts: bytes) -> None:
        with self.slot.lock:
            self.backend.send(0, [memoryview(part) for part in parts])

    def expect(self, wanted: Callable[[bytes], bool], timeout: float = 20) -> bytes:
        """The first frame that is *wanted*."""
        with self._came:
            found = self._came.wait_for(lambda: [one for one in self.frames if wanted(one)], timeout)
        assert found, f"no such frame among {len(self.frames)}"
        return found[0]

    def count(self, number: int, timeout: float = 20) -> list[bytes]:
        """At least *number* frames."""
        with self._came:
            assert self._came.wait_for(lambda: len(self.frames) >= number, timeout), len(self.frames)
            return list(self.frames)

    def give_room(self, room: int) -> None:
        self.room = room
        with self.slot.lock:
            self.backend.resume(0)

    def close(self) -> None:
        with self.slot.lock:
            self.backend.close()


def frame(number: int = 0, size: int = 64, to: bytes = b"\xff" * 6, by: bytes = b"\x02\0\0\0\0\1") -> bytes:
    """An Ethernet frame of an experimental type."""
    return (to + by + b"\x88\xb5" + number.to_bytes(4, "big")).ljust(size, b"\x5a")


class Cable:
    """Joins two plain back ends of one slot: what one receives the other sends."""

    def __init__(self, slot: Slot, left: Any, right: Any) -> None:
        self._slot, self._ends = slot, (left, right)

        def towards(end: Any) -> Callable[[int, bytes], bool]:
            def received(queue: int, data: bytes) -> bool:
                end.send(0, [data])
                return True

            return received

        with slot.lock:
            left.start(towards(right))
            right.start(towards(left))

    def close(self) -> None:
        with self._slot.lock:
            for end in self._ends:
                end.close()
