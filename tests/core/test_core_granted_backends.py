"""Granted back ends: revoked, they let through what is known to be harmless, and nothing else."""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import pytest
from cardcage.backends import BlockInfo, NetFeatures
from cardcage.device import Pio, Slot
from cardcage.errors import Denied
from cardcage.hookspecs import hookimpl
from cardcage.machine import Machine
from cardcage.registry import Registry
from guarded import Back, Guard, machine


def test_back_ends_are_revoked_and_restored() -> None:
    """A back end is shut while anything that it was granted is refused: bytes are lost in both directions."""
    guard = Guard()
    with machine(guard, devices=[{"type": "unit", "char": "back"}]) as vm:
        back: Any = vm.devices["unit"].device.back
        (behind,) = Back.made[-1:]
        seen: list[bytes] = []
        back.start(seen.append)
        for refused in (("image", "write"), ("backend", "open")):
            guard.now(refused)
            back.write(b"lost")
            behind.received(b"lost")
        guard.now(("image", "write"), ("backend", "open"))
        guard.now(("image", "write"))
        back.write(b"lost")
        guard.now()
        back.write(b"kept")
        behind.received(b"kept")
        assert behind.written == seen == [b"kept"]


class Odd:
    """A stranger's back end of any kind, with more than its protocol; its calls have their own names as results."""

    info, features = BlockInfo(512), NetFeatures()
    secret = "text"
    made: ClassVar[list[Odd]] = []

    def __init__(self, slot: Slot) -> None:
        self.slot, self.received, self.looked = slot, lambda *_: None, 0
        self.made.append(self)

    @property
    def counted(self) -> int:
        self.looked += 1
        return self.looked

    def start(self, received: Callable[..., Any], /) -> None:
        self.received = received

    def readv(self, offset: int, buffers: Any, /) -> Any:
        return "readv"

    def try_readv(self, offset: int, buffers: Any, /) -> Any:
        return "try_readv"

    def writev(self, offset: int, buffers: Any, /) -> Any:
        return "writev"

    def flush(self) -> Any:
        return "flush"

    def discard(self, offset: int, length: int, /) -> Any:
        return "discard"

    def write_zeroes(self, offset: int, length: int, /, *, unmap: bool) -> Any:
        return "write_zeroes"

    def write(self, data: bytes, /) -> Any:
        return "write"

    def send(self, queue: int, parts: Any, /) -> Any:
        return "send"

    def resume(self, queue: int, /) -> Any:
        return "resume"

    def set_offloads(self, offloads: frozenset[str], vnet_header: int, /) -> Any:
        return "set_offloads"

    def close(self) -> Any:
        return "close"

    def peek(self, at: int = 0, *, deep: bool = False) -> Any:
        """No protocol has it."""
        return "peek"

    def open(self, name: str = "") -> Any:
        """A word that a gate might have, too."""
        return "open"

    before = shut = switch = open


class OddCards:
    @hookimpl
    def cardcage_register(self, registry: Registry) -> None:
        for kind in ("char", "block", "net"):
            registry.backend(kind, "odd", Odd)


CALLS: dict[str, dict[str, tuple[Any, ...]]] = {
    "block": {"readv": (0, []), "try_readv": (0, []), "writev": (0, []), "flush": (), "discard": (0, 512)},
    "char": {"write": (b"x",)},
    "net": {"send": (0, [b"x"])},
}
"""What each kind of back end is for, with arguments."""

UNLISTED = ("peek", "open", "before", "shut", "switch")


def opened(vm: Machine, kind: str) -> Any:
    return vm.devices["unit"].slot.host.open(kind, "odd")


@pytest.mark.parametrize("kind", ["block", "char", "net"])
def test_what_a_back_end_has_beside_its_protocol_is_refused(kind: str) -> None:
    """Revoked, a method or attribute that no protocol knows raises Denied, EACCES for a device; it is back after."""
    guard = Guard()
    with machine(guard, OddCards(), devices=[{"type": "unit"}]) as vm:
        back = opened(vm, kind)
        kept = [getattr(back, name) for name in UNLISTED]
        for _ in range(2):
            assert [call() for call in kept] == ["peek", "open", "open", "open", "open"]
            assert (back.peek(1, deep=True), back.secret) == ("peek", "text")
            guard.now(("backend", "open"))
            for call in (*kept, *(partial(getattr, back, name) for name in (*UNLISTED, "secret", "slot", "counted"))):
                with pytest.raises(PermissionError) as caught:
                    call()
                assert isinstance(caught.value, Denied)
                assert caught.value.errno == errno.EACCES
            guard.now()
        assert Odd.made[-1].looked == 0
        assert back.counted == 1


@pytest.mark.parametrize("kind", ["block", "char", "net"])
def test_a_kept_call_of_a_back_end_is_revoked(kind: str) -> None:
    """What the device fetched from its back end before the revocation is refused, or lost, after it."""
    guard = Guard()
    with machine(guard, OddCards(), devices=[{"type": "unit"}]) as vm:
        back = opened(vm, kind)
        kept = {name: getattr(back, name) for name in CALLS[kind]}
        assert [kept[name](*values) for name, values in CALLS[kind].items()] == list(CALLS[kind])
        guard.now(("backend", "open"))
        for name, values in CALLS[kind].items():
            if kind == "block":
                with pytest.raises(PermissionError):
                    kept[name](*values)
            else:
                assert kept[name](*values) is None
        guard.now()
        assert [kept[name](*values) for name, values in CALLS[kind].items()] == list(CALLS[kind])


def test_what_is_harmless_passes_a_revoked_back_end() -> None:
    """Geometry, features, the end, and what a back end has to know once it is open again are not refused."""
    guard = Guard()
    with machine(guard, OddCards(), devices=[{"type": "unit"}]) as vm:
        char, block, net = (opened(vm, kind) for kind in ("char", "block", "net"))
        guard.now(("backend", "open"))
        assert (block.info, net.features) == (Odd.info, Odd.features)
        assert (net.resume(0), net.set_offloads(frozenset(), 0)) == ("resume", "set_offloads")
        assert [one.close() for one in (char, block, net)] == ["close"] * 3
        heard: list[Any] = []
        net.start(lambda *values: heard.append(values))
        assert Odd.made[-1].received(0, b"lost") is True
        assert not heard


def test_an_optional_call_that_a_back_end_lacks_is_absent() -> None:
    """A device that looks for try_readv or any other name finds what is there, whether revoked or not."""
    guard = Guard()
    with machine(guard, OddCards(), devices=[{"type": "unit"}]) as vm:
        back = opened(vm, "block")
        for refused in ((), (("backend", "open"),)):
            guard.now(*refused)
            assert hasattr(back, "try_readv")
            assert not hasattr(back, "try_writev")
            assert not hasattr(back, "nothing")


def test_a_refused_call_in_a_guests_access_is_harmless() -> None:
    """A stranger's device that uses its revoked back end when the guest reads it does not stop the machine."""

    class Peeks:
        def plug(self, slot: Slot, /) -> None:
            self.back = slot.host.open("block", "odd")

        def read(self, offset: int, size: int, /) -> int:
            return len(self.back.flush()) + len(self.back.peek())

        def write(self, offset: int, size: int, value: int, /) -> None: ...

    class Card:
        @hookimpl
        def cardcage_register(self, registry: Registry) -> None:
            registry.device("peeks", Peeks, regions=(Pio(4, 0x300),))

    guard = Guard()
    with machine(guard, OddCards(), Card(), devices=[{"type": "peeks"}]) as vm:
        vm.start()
        assert vm._board.ops.pio_read(0x300, 1) == 9
        guard.now(("backend", "open"))
        assert vm._board.ops.pio_read(0x300, 1) == 0xFF
        vm.pause()
        assert vm.state == "paused"
