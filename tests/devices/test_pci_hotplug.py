"""PCI devices that come and go while the machine runs, with small guests in place of an operating system."""

from __future__ import annotations

import gc
import os
import struct
import weakref
from pathlib import Path
from typing import Any

import pytest
from cardcage import ConfigError, Machine, StateError
from cardcage.errors import Denied, EjectTimeout
from cardcage.host import Host
from cardcage.security import Act, Mediator
from cardcage_snapshot.state import capture, restore
from leftovers import Leftovers
from virtio_function import Function

UP, DOWN, EJECT, REMOVABLE, BUS, GPE = 0xAE00, 0xAE04, 0xAE08, 0xAE0C, 0xAE10, 0xAFE0
HALT = b"\xfa\xf4\xeb\xfd"
LETS_GO = b"\x66\xb9\0\0\x10\0\x67\xe2\xfd\xba\x04\xae\x66\xed\x66\x85\xc0\x74\xed\xba\x08\xae\x66\xef\xeb\xe6"
"""Counts to a million, reads *down*, and writes what there is in it to *eject*."""


@pytest.fixture
def disk(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "disk"
    path.write_bytes(b"".join(struct.pack("<Q", at) * 64 for at in range(64)))
    return {"file": str(path), "format": "raw"}


def machine(tmp_path: Path, code: bytes, *devices: dict[str, Any], **keys: Any) -> Machine:
    """A machine that runs *code* in real mode."""
    image = tmp_path / "image"
    image.write_bytes(code)
    boot = {"protocol": "raw", "image": str(image)}
    return Machine(boot=boot, memory="32M", accel="tcg", devices=devices, **keys)


def port(vm: Machine, address: int, value: int | None = None) -> int:
    """Read or write a doubleword as the guest does."""
    with vm.lock:
        if value is None:
            return vm.pio.read(address, 4)
        vm.pio.write(address, 4, value)
        return value


def vendor(vm: Machine, slot: int) -> int:
    """The vendor id in *slot*, as the guest sees it."""
    port(vm, 0xCF8, 1 << 31 | slot << 11)
    return port(vm, 0xCFC) & 0xFFFF


def test_a_device_comes_and_goes(tmp_path: Path, disk: dict[str, Any]) -> None:
    """A disk that is added while the guest runs serves it; removed, its slot reads as empty, and another goes there."""
    with machine(tmp_path, LETS_GO) as vm:
        vm.start()
        assert vendor(vm, 2) == 0xFFFF
        for _ in range(2):
            added = vm.add("virtio-blk", drive=disk)
            assert (added.id, vendor(vm, 2)) == ("virtio-blk", 0x1AF4)
            function = Function(vm, 0x1042)
            (driver,) = function.start(1)
            assert function.call(driver, 0, [struct.pack("<IIQ", 0, 0, 7)], [512, 1])[:8] == struct.pack("<Q", 7)
            vm.remove(added.id, timeout=60)
            assert (vendor(vm, 2), "virtio-blk" in vm.devices) == (0xFFFF, False)
            assert not any("virtio-blk" in claim.name for bus in (vm.pio, vm.mmio) for claim in bus)


def test_the_guest_is_told(tmp_path: Path) -> None:
    """*Up* and *down* hold the slot and event 1 is set: reading *up* clears it, ejecting clears *down*."""
    with machine(tmp_path, HALT) as vm:
        vm.start()
        vm.add("virtio-rng", address="05.0")
        assert (port(vm, REMOVABLE), port(vm, GPE) & 0xFFFF) == (1 << 5, 1 << 1)
        port(vm, BUS, 1)
        assert (port(vm, UP), port(vm, REMOVABLE)) == (0, 0)
        port(vm, BUS, 0)
        assert (port(vm, UP), port(vm, UP)) == (1 << 5, 0)
        port(vm, GPE, 2)
        assert port(vm, GPE) == 0
        port(vm, GPE, 2 << 16)
        assert not vm.lines[9].level
        with pytest.raises(EjectTimeout, match='device "virtio-rng": the guest did not let go of it within 0 seconds'):
            vm.remove("virtio-rng", timeout=0)
        assert (port(vm, DOWN), vm.lines[9].level) == (1 << 5, True)
        port(vm, EJECT, 1 << 4)
        assert "virtio-rng" in vm.devices
        port(vm, EJECT, 1 << 5)
        assert (port(vm, DOWN), port(vm, REMOVABLE), "virtio-rng" in vm.devices) == (0, 0, False)


def test_what_a_reset_finds_asked_for_is_gone(tmp_path: Path) -> None:
    """A guest that was asked for a device and resets has let go of it."""
    with machine(tmp_path, HALT, {"type": "virtio-rng"}, {"type": "virtio-balloon"}) as vm:
        vm.start()
        with pytest.raises(EjectTimeout):
            vm.remove("virtio-rng", timeout=0)
        vm.reset()
        assert ("virtio-rng" in vm.devices, "virtio-balloon" in vm.devices, vendor(vm, 2)) == (False, True, 0xFFFF)


def test_the_configuration_follows(tmp_path: Path, disk: dict[str, Any]) -> None:
    """A machine built from the configuration after all that has the same devices in the same slots, and takes the
    state over."""
    told: list[tuple[str, bool]] = []
    with machine(tmp_path, LETS_GO, {"type": "virtio-rng"}, {"type": "virtio-balloon"}) as vm:
        vm.observers.add("device", lambda id, there: told.append((id, there)))
        assert [one.id for one in vm.config.devices] == [None, None]
        vm.start()
        vm.add("virtio-blk", drive=disk, id="disk")
        vm.remove("virtio-rng", timeout=60)
        vm.pause()
        assert [(one.id, one.address) for one in vm.config.devices] == [("virtio-balloon", "03.0"), ("disk", "04.0")]
        assert told == [("disk", True), ("virtio-rng", False)]
        state, config = capture(vm), vm.config
    with Machine.from_config(config) as other:
        restore(other, state)
        assert [vendor(other, slot) for slot in (2, 3, 4)] == [0xFFFF, 0x1AF4, 0x1AF4]
        port(other, EJECT, 1 << 4)
        assert "disk" not in other.devices


def test_what_cannot_come_or_go_is_refused(tmp_path: Path) -> None:
    """One line says why: no bus that tells guests, a slot that is taken or shared, a state that does not fit."""
    shared = ({"type": "virtio-rng", "address": "06.0", "id": "one"}, {"type": "virtio-balloon", "address": "06.1"})
    with machine(tmp_path, HALT, *shared) as vm:
        with pytest.raises(StateError, match='device "pic" cannot be taken out: it is on no bus'):
            vm.remove("pic")
        vm.start()
        with pytest.raises(StateError, match='"isa-serial" is added before the machine starts'):
            vm.add("isa-serial", port=0x2F8, char="null")
        for address in ("06.2", "07.1", "01.0"):
            with pytest.raises(ConfigError, match=f'address "{address}": while the machine runs'):
                vm.add("virtio-net", net="null", address=address)
        with pytest.raises(ConfigError, match=r'"06.0" is taken by one'):
            vm.add("virtio-net", net="null", address="06.0")
        with pytest.raises(ConfigError, match="nonesuch"):
            vm.add("virtio-blk", drive=str(tmp_path / "nonesuch"))
        with pytest.raises(StateError, match='no device "two"'):
            vm.remove("two")
        with pytest.raises(StateError, match=r'"one" at 06\.0 cannot be taken out: its slot is not its own'):
            vm.remove("one")
        with pytest.raises(StateError, match=r'"i440fx" at 00\.0 cannot be taken out'):
            vm.remove("i440fx")
        assert (vendor(vm, 2), port(vm, UP), port(vm, REMOVABLE)) == (0xFFFF, 0, 0)
        port(vm, EJECT, 0xFFFFFFFF)
        assert {"i440fx", "one", "virtio-balloon"} <= set(vm.devices)
        vm.pause()
        with pytest.raises(StateError, match="while the machine is paused"):
            vm.remove("one")
        vm.add("virtio-net", net="null")
        vm.resume()
        vm.stop()
        with pytest.raises(StateError, match="ended"):
            vm.add("virtio-net", net="null")


def test_before_the_start_a_device_just_goes(tmp_path: Path) -> None:
    """Nobody is asked while there is no guest, and the next device takes its slot."""
    with machine(tmp_path, HALT, {"type": "virtio-rng"}) as vm:
        vm.remove("virtio-rng")
        assert (vm.add("virtio-balloon").id, vm.config.devices[0].address) == ("virtio-balloon", "02.0")


def test_nothing_is_left_of_a_hundred(tmp_path: Path, disk: dict[str, Any]) -> None:
    """Descriptors, ranges, lines, and the devices themselves are as before, after a disk and a network card each came
    and went."""
    with machine(tmp_path, LETS_GO) as vm:
        vm.start()

        def holds() -> tuple[int, ...]:
            gc.collect()
            return len([*vm.pio]), len([*vm.mmio]), len(vm.devices)

        before, left, refs = None, Leftovers(), []
        for at in range(100 if os.environ.get("CARDCAGE_LONG_TESTS") else 10):
            disk_id = vm.add("virtio-blk", drive=disk).id
            refs.append(weakref.ref(vm.devices[disk_id].device))
            net = vm.add("virtio-net", net="null").id
            Function(vm, 0x1042).start(1)
            vm.remove(disk_id, timeout=60)
            vm.remove(net, timeout=60)
            if at == 0:
                before, left = holds(), Leftovers()
        assert holds() == before
        assert left() == []
        assert not any(line.level for line in vm.lines[10:12])
        assert [one() for one in refs] == [None] * len(refs)


class Keeps:
    """A checker that lets nobody take a device out."""

    def check(self, act: Act, /) -> None:
        if act.tclass == "device" and "detach" in act.permissions and act.facts["device"] == "kept":
            raise Denied(str(act))


def test_a_denied_eject_leaves_the_device(tmp_path: Path) -> None:
    """Neither the operator nor the guest takes out what policy keeps."""
    kept = {"type": "virtio-rng", "id": "kept"}
    with machine(tmp_path, HALT, kept, host=Host(mediator=Mediator((Keeps(),)))) as vm:
        vm.start()
        with pytest.raises(Denied, match="may not detach device"):
            vm.remove("kept")
        port(vm, EJECT, 1 << 2)
        assert ("kept" in vm.devices, vendor(vm, 2), port(vm, DOWN)) == (True, 0x1AF4, 0)
        vm.stop()
        vm.dismantle()


def test_a_strangers_card_comes_and_goes(tmp_path: Path) -> None:
    """A virtio device out of another distribution needs nothing for it."""
    pytest.importorskip("virtio_card")
    with machine(tmp_path, LETS_GO) as vm:
        vm.start()
        vm.add("number-disk", id="numbers")
        (driver,) = Function(vm, 0x1042).start(1)
        vm.remove("numbers", timeout=60)
        assert (vendor(vm, 2), driver is None) == (0xFFFF, False)
