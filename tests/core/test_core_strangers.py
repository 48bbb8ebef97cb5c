"""What a stranger's card may get wrong, and what its user then sees."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
from attrs import field, frozen
from cardcage._machine.bus import Bus, Claim
from cardcage._machine.eventloop import EventLoop, MachineClock
from cardcage.backends import BlockInfo, NetFeatures
from cardcage.errors import CardcageError, CardError, ConfigError, Denied
from cardcage.hookspecs import hookimpl
from cardcage.host import CardInfo, Host
from cardcage.machine import Machine
from cardcage.pairs import parse_pairs
from cardcage_cli.running import describe, threads_watched
from scripted import Scripted

if TYPE_CHECKING:
    from pathlib import Path

    from cardcage.device import Slot
    from cardcage.registry import Registry


@frozen
class BackOptions:
    size: int = 512
    mistake: str = ""


class Disk:
    """A block back end with as many mistakes as its options say."""

    def __init__(self, slot: Slot, options: BackOptions) -> None:
        self.closed, self.mistake = False, options.mistake
        if options.mistake == "raises":
            raise RuntimeError("no such luck")
        self.info: Any = "much" if options.mistake == "info" else BlockInfo(options.size)
        if options.mistake == "keyword":
            self.write_zeroes = self.flush_three  # type: ignore[method-assign, assignment]  # the mistake
        if options.mistake == "try":
            self.try_readv = self.flush

    def readv(self, offset: int, buffers: Any, /) -> None: ...
    def writev(self, offset: int, buffers: Any, /) -> None: ...
    def flush(self) -> None: ...
    def flush_three(self, first: int, second: int, /) -> None: ...
    def discard(self, offset: int, length: int, /) -> None: ...
    def write_zeroes(self, offset: int, length: int, /, *, unmap: bool) -> None: ...

    def close(self) -> None:
        self.closed = True
        if self.mistake == "close":
            raise RuntimeError("cannot close")


class Deaf:
    """A net back end that lacks `resume`."""

    def __init__(self, slot: Slot) -> None:
        self.features = NetFeatures()

    def start(self, received: Any, /) -> None: ...
    def send(self, queue: int, parts: Any, /) -> None: ...
    def set_offloads(self, offloads: Any, header: int, /) -> None: ...
    def close(self) -> None: ...


class Shout:
    """A char back end that cannot start."""

    def __init__(self, slot: Slot) -> None: ...
    def start(self, received: Any, /) -> None:
        raise RuntimeError("bad start")

    def write(self, data: bytes, /) -> None: ...
    def close(self) -> None: ...


@frozen
class UserOptions:
    drive: Any = None
    net: Any = None
    ports: list[Any] = field(factory=list)
    own: bool = False
    console: bool = False
    mistake: str = ""


class User:
    """A device that opens what its options name."""

    pci: Any = None

    def __init__(self, options: UserOptions) -> None:
        self.options = options

    def plug(self, slot: Slot, /) -> None:
        self.slot = slot
        if self.options.console:
            slot.host.open("char", "console").start(lambda data: None)
        self.opened = [
            slot.host.open(kind, spec)
            for kind, spec in (("block", self.options.drive), ("net", self.options.net))
            if spec is not None
        ]
        self.opened += [slot.host.open("block", spec) for spec in self.options.ports]
        if self.options.mistake == "plug":
            raise RuntimeError("bad plug")

    def unplug(self) -> None:
        if self.options.mistake == "unplug":
            raise RuntimeError("bad unplug")


class Rack:
    """A bus that may lose a device again."""

    bus_type = "rack"

    def __init__(self) -> None:
        self.there: list[Any] = []

    def attach(self, device: Any, slot: Slot, address: str | None, /) -> None:
        self.there.append(device)

    def detach(self, device: Any, /) -> None:
        self.there.remove(device)


def shorthand(text: str) -> Any:
    if text == "raises":
        raise LookupError("no word")
    return {"nothing": None, "list": []}.get(text, {"size": text})


@frozen
class Cards:
    @hookimpl
    def cardcage_register(self, registry: Registry) -> None:
        registry.backend("block", "disk", Disk, options=BackOptions, shorthand=shorthand)
        registry.backend("net", "deaf", Deaf)
        registry.backend("char", "shout", Shout)
        registry.device("user", User, options=UserOptions)
        registry.device("carried", User, options=UserOptions, bus="rack")
        registry.device("rack", Rack)


def machine(**more: Any) -> Machine:
    host = Host(cards=[Scripted([]), Cards()], installed=False)
    more.setdefault("machine", {"platform": "none"})
    return Machine(memory="2M", accel="scripted", host=host, **more)


WHO = 'block back end "disk" of device "user" (card Cards, given to Host)'


@pytest.mark.parametrize(
    ("keys", "kind", "said"),
    [
        (
            {"drive": {"type": "disk", "mistake": "raises"}},
            CardError,
            f"{WHO}: RuntimeError: no such luck (in __init__",
        ),
        ({"drive": {"type": "disk", "size": -1}}, CardError, "BlockInfo.size: expected a whole number from 0, got -1"),
        ({"drive": {"type": "disk", "mistake": "info"}}, CardError, f"{WHO}: info: expected a cardcage.backends.Bl"),
        ({"drive": {"type": "disk", "mistake": "keyword"}}, CardError, f"{WHO}: write_zeroes(first: 'int', second: "),
        ({"drive": {"type": "disk", "mistake": "try"}}, CardError, f"{WHO}: try_readv() -> 'None' does not take 2"),
        ({"drive": "disk:raises"}, CardError, 'block "disk" (card Cards, given to Host): its shorthand: LookupError: '),
        ({"drive": "disk:nothing"}, CardError, "its shorthand gave None, expected a table"),
        ({"drive": "disk:list"}, CardError, "its shorthand gave [], expected a table"),
        ({"drive": {"type": "disk", "size": "x"}}, ConfigError, 'drive.size: expected a whole number, got "x"'),
        ({"ports": [{"type": "disk"}, {"type": "disk", "sise": 1}]}, ConfigError, "ports[1].sise: no such key"),
        ({"net": {"type": "deff"}}, ConfigError, 'net: no card offers backend "net:deff". Did you mean "net:deaf"?'),
        (
            {"net": "deaf"},
            CardError,
            'net back end "deaf" of device "user" (card Cards, given to Host): has no method ',
        ),
    ],
)
def test_a_back_ends_mistake_is_named(keys: dict[str, Any], kind: type[CardcageError], said: str) -> None:
    """What is wrong with a back end names it, its card and the key that asked for it, and leaves no device behind."""
    with machine() as vm:
        with pytest.raises(kind) as caught:
            vm.add("user", **keys)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not vm.devices


def test_a_file_that_cannot_be_used_comes_after_the_key_that_names_it(tmp_path: Path) -> None:
    """The place in the configuration, then the file, then what is wrong with it."""
    (tmp_path / "vm.toml").write_text('[[device]]\ntype = "virtio-blk"\ndrive = "gone.raw"\n')
    with pytest.raises(ConfigError) as caught:
        Machine.from_toml(tmp_path / "vm.toml")
    assert str(caught.value) == (
        f"{tmp_path}/vm.toml: device[0].drive: {tmp_path}/gone.raw: cannot be opened: No such file or directory"
    )


def test_a_read_that_gives_no_number_names_the_device() -> None:
    """What a device's `read` returns beside a whole number is an error of that device's."""
    bus = Bus("pio", 16)
    bus.add(Claim(0x80, 4, lambda offset, size: "much", lambda offset, size, value: None, "acme"))
    with pytest.raises(CardError, match=r"^acme: read\(0x1, 2\) gave 'much', expected a whole number$"):
        bus.read(0x81, 2)


def test_the_consoles_back_end_is_blamed_on_its_key() -> None:
    """`machine.console` names a back end by that key; one that cannot start is a card's failure."""
    device = {"type": "user", "console": True}
    for console, said in (
        ("shuot", 'machine.console: no card offers backend "char:shuot"'),
        ("shout", 'device "user" (card Cards, given to Host): RuntimeError: bad start (in start, '),
    ):
        with pytest.raises(CardcageError) as caught:
            machine(devices=[device], machine={"platform": "none", "console": console})
        assert said in str(caught.value)


@pytest.mark.parametrize("mistake", ["unplug", "close"])
def test_one_fault_at_the_end_keeps_nothing_else_open(mistake: str) -> None:
    """A device or back end that raises while the machine closes does not keep the others from being closed."""
    back = {"type": "disk", "mistake": "close"} if mistake == "close" else {"type": "disk"}
    with machine(devices=[{"type": "user", "ports": [back, {"type": "disk"}], "mistake": mistake}]) as vm:
        opened = vm.devices["user"].device.opened
    assert [one.closed for one in opened] == [True, True]


def test_a_device_that_cannot_be_plugged_leaves_its_bus() -> None:
    """After a failed `plug` the bus does not hold the device, so that the guest does not meet it."""
    with machine(devices=[{"type": "rack"}]) as vm:
        with pytest.raises(CardError, match="bad plug"):
            vm.add("carried", mistake="plug")
        assert vm.devices["rack"].device.there == []
        vm.add("carried")
        assert len(vm.devices["rack"].device.there) == 1


def test_a_failed_pci_device_gives_its_address_back() -> None:
    """The address of a PCI device that could not be plugged in is free for the next one."""
    with Machine(memory="16M", accel="tcg") as vm:
        for _ in range(2):
            with pytest.raises(ConfigError, match="cannot be opened"):
                vm.add("virtio-blk", drive="/nowhere/disk.raw", address="07.0")
        vm.add("virtio-rng", address="07.0")


def test_a_denied_timer_does_not_stop_the_others() -> None:
    """A timer's callback that is denied something is logged; timers after it still fire."""
    lock, fired, seen = threading.RLock(), threading.Event(), []

    def locked(callback: Any) -> None:
        with lock:
            try:
                callback()
            except Denied as error:
                seen.append(str(error))

    def refused() -> None:
        raise Denied("not you")

    events = EventLoop("test", locked)
    clock = MachineClock(events)
    with lock:
        clock.timer(refused).arm(1)
        clock.timer(fired.set).arm(2)
        clock.resume()
    assert fired.wait(10)
    assert seen == ["not you"]
    events.close()
    clock.close()


def test_a_cards_own_thread_ends_the_machine() -> None:
    """What a card's thread raises under `cardcage run` ends the machine with that error, without a traceback."""
    with machine() as vm, threads_watched([], vm):

        def broken() -> None:
            raise RuntimeError("bad thread")

        thread = threading.Thread(target=broken)
        thread.start()
        thread.join()
        vm._life.await_end()
        with pytest.raises(RuntimeError, match="bad thread"):
            vm.wait()


def test_an_exception_names_the_card_it_came_through() -> None:
    """One line names the innermost card, and a stranger's before one of ours that it called."""
    ours = CardInfo("ours", "cardcage 0.1.0", __import__("cardcage"))
    theirs = CardInfo("theirs", "theirs 1.0", __import__(__name__))
    with pytest.raises(ValueError, match="expected key=value") as caught:
        parse_pairs("x")
    assert describe(caught.value, [ours, theirs]).startswith("card theirs (theirs 1.0): ValueError: ")
    assert describe(caught.value, [ours]).startswith("card ours (cardcage 0.1.0): ValueError: ")
    assert describe(caught.value).startswith("ValueError: ")
    assert describe(LookupError("no place"), [ours]) == "LookupError: no place"
