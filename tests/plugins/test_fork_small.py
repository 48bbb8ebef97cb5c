"""Copies of running machines on each accelerator, with a guest of a few instructions: it keeps a character."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cardcage.errors import HostError
from cardcage.host import Host
from cardcage.machine import Machine, State
from cardcage.outcome import DebugExit
from cardcage_fleet import membership
from cardcage_fork import Copy, checkpoint, fork, revert
from cardcage_fork.process import LATER
from cardcage_snapshot.creating import snapshot
from cardcage_snapshot.verbs import Machine as Restored
from leftovers import shared

pytestmark = pytest.mark.once

CODE = bytes.fromhex(
    "31c08ed8"  # xor ax, ax; mov ds, ax
    "bafd03eca80174f8"  # again: mov dx, 0x3fd; in al, dx; test al, 1; jz again
    "baf803ec"  # mov dx, 0x3f8; in al, dx
    "3c3f7409"  # cmp al, '?'; je tell
    "3c21740b"  # cmp al, '!'; je end
    "a20050ebe7"  # mov [0x5000], al; jmp again
    "a00050eeebe1"  # tell: mov al, [0x5000]; out dx, al; jmp again
    "a00050baf400eeebd8"  # end: mov al, [0x5000]; mov dx, 0xf4; out dx, al; jmp again
)


def keeper(folder: Path, accel: str, **keys: Any) -> Machine:
    """A machine with the guest, not started."""
    (folder / "keeper.bin").write_bytes(CODE)
    boot = {"protocol": "raw", "image": str(folder / "keeper.bin"), "address": 0x7C00, "mode": 16}
    devices = [{"type": "isa-debug-exit"}, *keys.pop("devices", ())]
    return Machine(memory="16M", accel=accel, boot=boot, devices=devices, **{"name": "keeper", **keys})


@pytest.fixture
def vm(tmp_path: Path, accel: str) -> Iterator[Machine]:
    with keeper(tmp_path, accel) as made:
        made.start()
        made.console.send("a")
        yield made


def kept(one: Machine | Copy) -> str:
    """The character that a guest has."""
    before = len(one.console.output)
    one.console.send("?")
    while len(one.console.output) == before:
        assert one.state is State.RUNNING
    return one.console.output[before:]


def test_what_can_wait_does_not_hold_up_the_guest(vm: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a card leaves for later is done in the copy while its guest runs, and before anybody hears of the copy; if
    it fails, there is no copy, and the parent goes on."""
    heard, told = os.pipe()
    before = membership.forked

    def forked(machine: Machine, act: Callable[[], object]) -> None:
        before(machine)
        machine.host.share(LATER, list).append(act)

    def tell() -> None:
        os.write(told, f"{vm.name} {vm.state}".encode())

    def fail() -> None:
        raise HostError("there is no room")

    monkeypatch.setattr(membership, "forked", partial(forked, act=tell))
    with fork(vm)[0] as copy:
        assert os.read(heard, 100).decode() == f"{copy.name} running"
    monkeypatch.setattr(membership, "forked", partial(forked, act=fail))
    with pytest.raises(HostError, match="there is no room"):
        fork(vm)
    assert kept(vm) == "a"
    os.close(heard)
    os.close(told)


def test_a_copy_goes_on_from_where_its_parent_was(vm: Machine) -> None:
    """Copies have the guest's memory as it was; what either writes from then on the others do not see; each is a
    process with a name of its own, and can be paused, reset and put back."""
    first, second = fork(vm, 2)
    with first, second:
        assert len({vm.name, first.name, second.name}) == 3
        assert [kept(one) for one in (vm, first, second)] == ["a"] * 3
        first.console.send("b")
        vm.console.send("c")
        assert [kept(one) for one in (vm, first, second)] == ["c", "b", "a"]
        first.pause()
        assert first.state is State.PAUSED
        first.resume()
        second.checkpoint()
        second.console.send("d")
        assert kept(second) == "d"
        assert second.revert() >= 1
        assert kept(second) == "a"
        second.reset()
        second.console.send("e")
        assert [kept(one) for one in (vm, first, second)] == ["c", "b", "e"]


def test_a_copy_of_a_copy(vm: Machine) -> None:
    """Copies are forked as machines are, and outlive the one that they were made of."""
    (first,) = fork(vm)
    first.console.send("b")
    second, third = first.fork(2)
    with second, third:
        second.console.send("c")
        assert [kept(one) for one in (first, second, third)] == ["b", "c", "b"]
        first.close()
        with second.fork()[0] as fourth:
            assert [kept(one) for one in (third, fourth)] == ["b", "c"]


def test_a_copy_of_a_paused_machine_is_paused(vm: Machine) -> None:
    """A paused machine is a template: its copies are paused, and each goes on when it is resumed."""
    assert kept(vm) == "a"
    vm.pause()
    copies = fork(vm, 2)
    vm.resume()
    for one in copies:
        with one:
            assert one.state is State.PAUSED
            one.resume()
            assert kept(one) == "a"


def test_a_copy_has_the_checkpoint_too(vm: Machine) -> None:
    """A machine with a checkpoint can be forked, and both go back to it."""
    assert kept(vm) == "a"
    checkpoint(vm)
    vm.console.send("b")
    assert kept(vm) == "b"
    with fork(vm)[0] as copy:
        assert kept(copy) == "b"
        copy.revert()
        assert [kept(one) for one in (vm, copy)] == ["b", "a"]
    revert(vm)
    assert kept(vm) == "a"


def test_a_copys_end(vm: Machine) -> None:
    """What a copy's guest ends with comes to its parent, whose own goes on."""
    with fork(vm)[0] as copy:
        copy.console.send("b!")
        assert copy.wait(60) == DebugExit(ord("b"))
    assert kept(vm) == "a"


def test_no_descriptor_is_shared_by_accident(tmp_path: Path, accel: str) -> None:
    """A copy has no lock, socket, eventfd, VM or vCPU in common with its parent."""
    before = {int(one) for one in os.listdir("/proc/self/fd")}
    with keeper(tmp_path, accel) as vm:
        vm.start()
        with fork(vm)[0] as copy:
            assert copy.state is State.RUNNING
            common = shared(copy.pid, before)
            assert not {one for one in common if one.startswith(("anon_inode", "socket:", "/memfd:")) or ".json" in one}


def test_forks_leave_nothing(vm: Machine) -> None:
    """Forks one after another leave no descriptor and no thread, however the copy ends."""

    def there() -> tuple[list[str], list[str]]:
        gc.collect()
        names = os.listdir("/proc/self/fd")
        links = [os.readlink(f"/proc/self/fd/{one}") for one in names if os.path.lexists(f"/proc/self/fd/{one}")]
        return sorted(links), sorted(one.name for one in threading.enumerate())

    fork(vm)[0].close()
    before = there()
    for at in range(12):
        (copy,) = fork(vm)
        copy.kill() if at % 3 == 2 else copy.close()
    assert there() == before
    assert kept(vm) == "a"


def test_a_restored_machine_is_forked(tmp_path: Path, accel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that was restored from a file has copies, whose writes are neither in it nor in the file."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with Host() as host:
        with keeper(tmp_path, accel, host=host) as vm:
            vm.start()
            vm.console.send("a")
            assert kept(vm) == "a"
            vm.pause()
            made = snapshot(vm, str(tmp_path / "saved"))
        with Restored.restore(made.path, host=host) as again:
            with fork(again)[0] as copy:
                copy.console.send("b")
                assert [kept(one) for one in (again, copy)] == ["a", "b"]
            again.console.send("c")
        with Restored.restore(made.path, host=host) as again:
            assert kept(again) == "a"
