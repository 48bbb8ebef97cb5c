"""Guests that firmware booted go on from their states: in their ROM, with the devices that it expects."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cardcage.host import Host
from cardcage.machine import Machine
from migrate_kit import Coming, over
from snapshot_kit import COUNTER, count, counts_on

CODE = bytes.fromhex("31c08ed8 66ff060050 ebf9")
"""Counts at 0x5000, for ever."""


@pytest.fixture
def rom() -> bytes:
    """A ROM whose code stays in it."""
    made = bytearray(0x10000)
    made[: len(CODE)], made[-16:-11] = CODE, bytes.fromhex("ea000000f0")  # jmp f000:0000
    return bytes(made)


@pytest.fixture
def vm(tmp_path: Path, rom: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A machine that runs in it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "rom").write_bytes(rom)
    boot = {"protocol": "firmware", "firmware": str(tmp_path / "rom")}
    with Host() as host, Machine(memory="4M", accel="tcg", name="count", boot=boot, host=host) as made:
        made.start()
        counts_on(made, 1000)
        yield made


def goes_on(vm: Machine, at: int, rom: bytes) -> None:
    """Hold a machine to what it was, and to a reset."""
    assert vm.memory.read(0xFFFF0000, len(rom)) == rom
    assert "piix4-pm" in [one.type for one in vm.devices.values()]
    counts_on(vm, at + 1000)
    vm.pause()
    vm.memory.write(COUNTER, bytes(4))
    vm.reset()
    vm.resume()
    counts_on(vm, 1000)


def test_a_restored_one(vm: Any, rom: bytes) -> None:
    """A restored machine goes on in its ROM, which is the file's again, and boots it when it is reset."""
    vm.pause()
    vm.snapshot("rom")
    restore: Any = Machine
    with restore.restore("rom", host=vm.host) as other:
        goes_on(other, count(vm), rom)


def test_a_migrated_one(vm: Any, rom: bytes) -> None:
    """So does a machine that moves."""
    with Coming(vm.host) as there:
        over(vm, there.link)
        goes_on(there.done().machine, count(vm), rom)


def test_one_that_loads_a_snapshot_before_it_starts(vm: Any, rom: bytes, tmp_path: Path) -> None:
    """So does a machine of the same configuration that loads the state before its first instruction."""
    from cardcage_snapshot.loading import load
    from cardcage_snapshot.places import located

    vm.pause()
    vm.snapshot("rom")
    boot = {"protocol": "firmware", "firmware": str(tmp_path / "rom")}
    with Machine(memory="4M", accel="tcg", name="other", boot=boot, host=vm.host) as other:
        load(other, located("rom"))
        other.start(boot=False)
        goes_on(other, count(vm), rom)
