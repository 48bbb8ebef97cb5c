"""How a machine is built: devices, their contract and addresses, the accelerator, RAM, TOML."""

from __future__ import annotations

import re
from typing import Any

import pytest
from cardcage.accelerator import Probe
from cardcage.config import Draft
from cardcage.device import Mmio, Pio
from cardcage.errors import CardError, ConfigError, HostError, StateError
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage.memory import RamBlock, RamRange
from cardcage.outcome import PoweredOff
from cardcage.registry import Registry
from leftovers import Leftovers
from machine_kit import out
from scripted import Scripted


def test_devices_are_added_before_the_start(make_machine: Any) -> None:
    """add() plugs a device with its own keys, refuses what does not fit, and raises StateError after the end."""
    machine = make_machine(out(0), devices=[])
    added = machine.add("panel", id="second", port=0x80)
    assert added.slot.ranges.mappings[0].address == 0x80
    with pytest.raises(ConfigError, match="the console already belongs to device"):
        machine.add("panel", port=0x90)
    with pytest.raises(ConfigError, match="pio 0x84-0x8b overlaps second at 0x80-0x87"):
        machine.add("panel", port=0x84)
    with pytest.raises(ConfigError, match='the id "second" is taken'):
        machine.add("panel", id="second", port=0x90)
    with pytest.raises(ConfigError, match="no such key"):
        machine.add("panel", sped=1)
    assert set(machine.devices) == {"second"}
    assert machine.start().wait(20) == PoweredOff()
    with pytest.raises(StateError, match="has ended"):
        machine.add("panel")


class Wrong:
    """A device with a method that cannot be called as agreed."""

    def read(self, offset: int, size: int, /) -> int:
        return 0

    def write(self, offset: int, size: int, value: int, /) -> None: ...

    def reset(self, hard: bool) -> None: ...


class Half(Wrong):
    def save(self) -> None: ...

    def reset(self) -> None: ...


class Raises(Wrong):
    def __init__(self) -> None:
        raise KeyError("boom")


class NoWrite:
    def read(self, offset: int, size: int, /) -> int:
        return 0


class MmioThing(NoWrite):
    def write(self, offset: int, size: int, value: int, /) -> None: ...


@pytest.mark.parametrize(
    ("factory", "error"),
    [
        (Wrong, "reset(hard: 'bool') -> 'None' does not take 0 positional arguments"),
        (Half, "has 'save' but no 'load'"),
        (Raises, "KeyError: 'boom'"),
        (NoWrite, "has no method 'write'"),
    ],
)
def test_a_broken_device_is_named(make_machine: Any, factory: Any, error: str) -> None:
    """A device that breaks the contract is a CardError that names it and its card; nothing of it stays."""

    class Card:
        from cardcage.hookspecs import hookimpl

        @hookimpl
        def cardcage_register(self, registry: Registry) -> None:
            registry.device("wrong", factory, regions=(Pio(1, 0x200),))

    machine = make_machine(cards=(Card(),))
    with pytest.raises(CardError, match=re.escape(error)):
        machine.add("wrong")
    assert "wrong" not in machine.devices
    assert machine.pio.find(0x200) is None


def test_addresses_are_checked(make_machine: Any) -> None:
    """A region needs an address, may not lie on RAM, and the keys must fit the regions that the card has."""

    class Card:
        from cardcage.hookspecs import hookimpl

        @hookimpl
        def cardcage_register(self, registry: Registry) -> None:
            registry.device("mmio", MmioThing, regions=(Mmio(0x1000),))
            registry.device("carried", MmioThing, bus="pci")

    machine = make_machine(cards=(Card(),))
    for keys, error in (
        ({}, 'device "mmio" needs the key address'),
        ({"address": 0x100000}, "overlaps RAM at 0x0-0x1fffff"),
        ({"address": "03.0"}, 'expected a number, got "03.0"'),
        ({"port": 3, "address": 1 << 30}, 'port: "mmio" has 0 to give, got 1'),
        ({"address": 1 << 60}, "outside the mmio bus"),
    ):
        with pytest.raises(ConfigError, match=re.escape(error)):
            machine.add("mmio", **keys)
    machine.add("mmio", address=[1 << 30])
    with pytest.raises(ConfigError, match='"carried" needs a pci bus, which this machine does not have'):
        make_machine(cards=(Card(),), devices=[{"type": "carried"}])


def test_building_fails_without_leaving_anything(make_machine: Any) -> None:
    """A machine that cannot be built closes its VM and threads and leaves its host."""
    left = Leftovers()
    for arguments in (
        {"devices": [{"type": "panle"}]},
        {"boot": {"protocol": "fill", "fil": 1}},
        {"boot": {"protocol": "lniux"}},
        {"memory": "100T"},
        {"memory": 4097},
        {"machine": {"platform": "mac"}},
        {"machine": {"console": "stdio"}, "devices": []},
        {"accel": "kvm"},
        {"fragments": [{"policy": {"memory": "ksm"}}]},
        {"fragments": [{"security": {"checkers": ["selinux"]}}]},
        {"fragments": [{"accel": {"scripted": {"x": 1}}}]},
        {"fragments": [{"accel": {"other": {}}}]},
    ):
        with pytest.raises(ConfigError):
            make_machine(**arguments)
    assert left.threads() == []


def test_the_accelerator_is_the_first_usable_and_fast(make_machine: Any) -> None:
    """Unusable ones are passed over with their reason, an emulated one is taken only when nothing is faster."""
    absent = Scripted(probe_result=Probe(False, "native", "no device"), name="absent")
    slow = Scripted(probe_result=Probe(True, "emulated", "2 MIPS"), name="slow")
    machine = make_machine(cards=(absent, slow), accel=["absent", "slow", "scripted"])
    assert machine.accelerator.why == "scripted: scripted by the test (absent: no device; slow: 2 MIPS)"
    assert make_machine(cards=(absent, slow), accel=["absent", "slow"]).accelerator.name == "slow"
    with pytest.raises(HostError, match=re.escape("no accelerator is usable here (absent: no device)")):
        make_machine(cards=(absent,), accel="absent")
    with pytest.raises(ConfigError, match=re.escape('machine.accel[0]: no card offers accelerator "scriptde"')):
        make_machine(accel="scriptde")


def test_ram_shows_where_the_platform_says(make_machine: Any) -> None:
    """On a bare machine RAM begins at 0 and has no hole; the accelerator has the same slots, and is told of writes."""
    machine = make_machine(memory="2M")
    assert [(one.address, one.size) for one in machine.memory.slots] == [(0, 0x200000)]
    assert machine.vm.slots == machine.memory.slots
    machine.memory.write(0x100, b"x")
    assert machine.scripted.log[-1] == ("written", 0x100, 1)
    machine.memory.add(RamRange(0xFFF00000, 0x1000, RamBlock(0x1000), readonly=True))
    assert machine.vm.slots[-1].readonly


def test_toml_and_python_make_the_same_machine(tmp_path: Any) -> None:
    """A TOML file gives the same configuration as keyword arguments."""
    file = tmp_path / "vm.toml"
    file.write_text('[machine]\naccel = "scripted"\nmemory = "2M"\nplatform = "none"\n')
    host = Host([Scripted()], installed=False)
    with Machine.from_toml(file, host=host, set=["machine.cpus=2"]) as first:
        keys = {"memory": "2M", "accel": ["scripted"], "cpus": 2}
        draft = Draft.of({"machine": {**keys, "platform": "none"}})
        with Machine.from_config(draft.config(), host=host) as second:
            assert first.config.machine == second.config.machine
            assert len(first.vcpus) == len(second.vcpus) == 2
