"""A point in a machine's life to come back to, in the same process, at the cost of the pages written since."""

from __future__ import annotations

import ctypes
import mmap
import pickle
import re
from array import array
from typing import TYPE_CHECKING, Any, Protocol

from cardcage.abilities import has
from cardcage.accelerator import DirtyLog
from cardcage.errors import CardError, HostError, StateError
from cardcage.machine import State
from cardcage.ram import PAGE, fenced
from cardcage.security import OPERATOR, Act
from cardcage_jail import open_file

from cardcage_fork.plan import blocks_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager
    from weakref import WeakKeyDictionary

    from cardcage.machine import Machine
    from cardcage.ram import Backing, RamBlock
    from cardcage.x86 import VCpuState

__all__ = ["Checkpoint", "Reverted", "checkpoint", "revert"]

PRESENT = 3 << 62
"""A page that is in memory, or swapped out (Documentation/admin-guide/mm/pagemap.rst)."""


class Reverted(Protocol):
    """A device, or a back end, that is to know when the guest is back at an earlier time; its device is by then."""

    def reverted(self) -> None:
        """Forget what was under way with the guest: it never was. Under the machine's lock."""


class Checkpointed(Protocol):
    """A device, or a back end, that keeps something of its own for :meth:`Reverted.reverted`."""

    def checkpointed(self) -> None:
        """The guest will be put back to where it stands now. Under the machine's lock."""


class Unchanged(Protocol):
    """A device with state that can tell, faster than it loads it, that it still has it.

    Its word is taken for it: a state that does not tell of something has to be the same in that, too.
    """

    def unchanged(self, state: Any, /) -> bool:
        """True where ``load(state)``, which it saved, would change nothing: no register, no line, no alarm, nothing
        that it is about to do; False is never wrong. Under the machine's lock, and it is paused."""


class RevertingVm(Protocol):
    """A VM that puts pages back by itself."""

    def set_revert_bases(self, bases: Sequence[tuple[int, int, int]], /) -> None:
        """(host address of RAM, bytes, host address of the bytes to put back)."""

    def revert_dirty_log(self) -> int:
        """Put back what the log has, and empty it; returns how many pages."""


class KeepsChips(Protocol):
    """A VM with a full irqchip whose interrupt controllers can be put back."""

    def save_chips(self) -> bytes:
        """All of them; empty with another irqchip."""

    def load_chips(self, data: bytes, /) -> None:
        """Put them back, before the vCPUs' states."""


class HoldableVm(Protocol):
    """A VM whose vCPUs can be held where they are: to pause a machine takes a hand-over to two other threads."""

    def hold(self) -> AbstractContextManager[bool]:
        """True: while the block runs no vCPU is in guest code, in the middle of an access, or goes there, and the
        state of each can be set. False: they cannot be held so now."""


class Base:
    """The bytes that a block of RAM had."""

    def __init__(self, block: RamBlock) -> None:
        self.host, self.size = block.host_address, block.size
        self._backing: Backing = fenced(block.size)
        self._export = ctypes.c_char.from_buffer(self._backing.map)
        self.address = ctypes.addressof(self._export) + self._backing.offset
        for start, size in present(self.host, self.size):
            ctypes.memmove(self.address + start, self.host + start, size)

    def close(self) -> None:
        """Give the memory back."""
        del self._export
        self._backing.map.close()


def present(host: int, size: int) -> Iterator[tuple[int, int]]:
    """The stretches of a mapping, (offset, bytes), that may not be zero: all of it where the kernel does not tell."""
    entries = array("Q")
    try:
        with open("/proc/self/pagemap", "rb", buffering=0, opener=open_file) as file:
            file.seek(host // mmap.PAGESIZE * 8)
            entries.frombytes(file.read(size // mmap.PAGESIZE * 8))
    except OSError:
        entries = array("Q")
    if len(entries) != size // mmap.PAGESIZE:
        yield 0, size
        return
    marks = bytes(1 if entry & PRESENT else 0 for entry in entries)
    for run in re.finditer(b"\\x01+", marks):
        yield run.start() * mmap.PAGESIZE, (run.end() - run.start()) * mmap.PAGESIZE


class Checkpoint:
    """The RAM, devices, processors and time of a machine. Made while it is paused."""

    def __init__(self, machine: Machine) -> None:
        vm: Any = machine.vm
        self._devices: list[tuple[Any, bytes, Any, Any]] = []
        """Device, its state, and, where it can tell, who tells if it still has the same, and that."""
        self._told: dict[int, tuple[Any, bool]] = {}
        """Who may have to be told of a way back, by id, and whether: to find out takes time."""
        with machine.lock:
            for plugged in machine.devices.values():
                if "state" in plugged.abilities:
                    self._devices.append(_kept(plugged.who, plugged.device))
            for one in _parties(machine, "checkpointed"):
                if has(one, Checkpointed):
                    one.checkpointed()
            self._clock = machine.clock.now()
        self._chips: bytes = vm.save_chips() if has(vm, KeepsChips) else b""
        self._vcpus: list[VCpuState] = [one.get_state() for one in machine.vcpus]  # values, which are only read
        self._parts = _parts(machine)
        self._bases: list[Base] = []
        self._itself, self.holds = has(vm, RevertingVm), has(vm, HoldableVm)
        vm.start_dirty_log()
        try:
            self._bases += map(Base, blocks_of(machine))
            if self._itself:
                vm.set_revert_bases([(one.host, one.size, one.address) for one in self._bases])
        except BaseException as error:
            self.close(machine)
            if isinstance(error, OSError):
                raise HostError(f"{machine.name}: no memory for a checkpoint: {error.strerror}") from error
            raise

    def obstacle(self, machine: Machine) -> str:
        """Why the paused machine cannot be put back, empty when it can: a guest may eject devices, too."""
        now = _parts(machine)
        same = len(now) == len(self._parts) and all(one is two for one, two in zip(now, self._parts, strict=True))
        return "" if same else "devices or memory came, or went, since its checkpoint"

    def revert(self, machine: Machine) -> int:
        """Put the paused *machine* back; returns how many pages that took."""
        vm: Any = machine.vm
        pages: int = vm.revert_dirty_log() if self._itself else self._put_back(machine)
        with machine.lock:
            machine.clock.set(self._clock)
            for device, state, unchanged, same in self._devices:
                if unchanged is None or not unchanged(same):
                    device.load(pickle.loads(state))
        if self._chips:
            vm.load_chips(self._chips)
        for vcpu, registers in zip(machine.vcpus, self._vcpus, strict=True):
            vcpu.set_state(registers)
        with machine.lock:  # an interrupt that one of these raises goes to the processors as they are now
            for one in _parties(machine, "reverted"):
                if id(one) not in self._told:
                    self._told[id(one)] = one, has(one, Reverted)
                if self._told[id(one)][1]:
                    one.reverted()
        return pages

    def _put_back(self, machine: Machine) -> int:
        vm: Any = machine.vm
        count, written = 0, []
        for slot in machine.memory.slots:
            base = next((one for one in self._bases if 0 <= slot.host_address - one.host < one.size), None)
            if base is None:  # what only shows since then, and is not written
                continue
            for page in pages_in(vm.fetch_dirty_log(slot)):
                at = slot.host_address + page * PAGE
                ctypes.memmove(at, base.address + at - base.host, PAGE)
                written.append((slot.address + page * PAGE, PAGE))
                count += 1
        machine.memory.written_many(written)
        for slot in machine.memory.slots:
            vm.fetch_dirty_log(slot)  # of what was just told
        return count

    def close(self, machine: Machine) -> None:
        """Forget it."""
        vm: Any = machine.vm
        vm.stop_dirty_log()
        for base in self._bases:
            base.close()


def _parties(machine: Machine, name: str) -> list[Any]:
    """Devices and back ends with a method of that *name*: few have it, and looking at all that it is takes time."""
    devices = machine.devices.values()
    return [one for it in devices for one in (*it.slot.host.opened, it.device) if hasattr(one, name)]


def _parts(machine: Machine) -> list[object]:
    """The devices and the blocks of memory that are written."""
    blocks = {id(one.block): one.block for one in machine.memory.ranges if not one.readonly}
    return [*(one.device for one in machine.devices.values()), *blocks.values()]


def _kept(who: str, device: Any) -> tuple[Any, bytes, Any, Any]:
    try:
        state = pickle.dumps(device.save())
        if not has(device, Unchanged):
            return device, state, None, None
        return device, state, device.unchanged, pickle.loads(state)
    except Exception as error:  # a stranger's state may hold anything
        raise CardError(f"{who}: its state cannot be kept: {error}") from error


def pages_in(bitmap: bytes) -> Iterator[int]:
    """Numbers of the bits that are set, in little-endian order."""
    for found in re.finditer(rb"[^\0]", bitmap):
        byte, at = found[0][0], found.start() * 8
        yield from (at + bit for bit in range(8) if byte >> bit & 1)


def _checkpoints(machine: Machine) -> WeakKeyDictionary[Machine, Checkpoint]:
    from weakref import WeakKeyDictionary

    found: WeakKeyDictionary[Machine, Checkpoint] = machine.host.share("fork:checkpoints", WeakKeyDictionary)
    return found


def checkpoint(machine: Machine) -> None:
    """Keep what the machine is like now, for :func:`revert`; an earlier checkpoint is forgotten.

    It costs a copy of the RAM that the guest has touched, and from then on the guest's first write to each page takes
    longer. Raises StateError, in one line, where something could not be put back: a disk that the guest can write, an
    accelerator without a dirty log, a log that somebody else has; Denied.
    """
    if why := _obstacle(machine):
        raise StateError(f"{machine.name} cannot have a checkpoint: {why}")
    facts = {"machine": machine.name}
    machine.mediator.check(Act(OPERATOR, machine.label, "machine", ("save",), facts))
    if (arrival := machine.services.get("arriving-ram")) is not None:
        arrival.complete()  # a page that is still to come looks like one that is zero
    forget(machine)
    running = _pause(machine)
    try:
        kept = Checkpoint(machine)
    finally:
        if running:
            machine.resume()
    known = _checkpoints(machine)
    if not any(one is machine for one in known):
        machine.defer(lambda: forget(machine))
    known[machine] = kept


def _obstacle(machine: Machine) -> str:
    if machine.state not in ("running", "paused"):
        return f"it is {machine.state}"
    if "dirty-log" not in machine.vm.capabilities or not has(machine.vm, DirtyLog):
        return f'the accelerator "{machine.accelerator.name}" has no dirty log'
    if machine.irqchip == "full" and not has(machine.vm, KeepsChips):
        return f'the interrupt controllers of the accelerator "{machine.accelerator.name}" would not be put back'
    for plugged in machine.devices.values():
        for backend in plugged.slot.host.opened:
            info = getattr(backend, "info", None)
            if info is not None and not info.readonly:
                return f'the guest can write the drive of device "{plugged.id}", which would not be put back'
        if "state" not in plugged.abilities and {"unplug", "needs"} & plugged.abilities:
            return f"{plugged.who} does not say what its state is"
    return ""


def revert(machine: Machine) -> int:
    """Put the machine back to its :func:`checkpoint`; returns how many pages of RAM that took.

    It runs then, or is paused, as it was before. Raises StateError without a checkpoint, or where devices or memory
    came or went since; Denied.
    """
    kept = _checkpoints(machine).get(machine)
    if kept is None:
        raise StateError(f"{machine.name} has no checkpoint to go back to")
    runs = machine.state is State.RUNNING
    acts = ("pause", "load", "resume") if runs else ("load",)
    machine.mediator.check(Act(OPERATOR, machine.label, "machine", acts, {"machine": machine.name}))
    if runs and kept.holds and (pages := _revert_held(machine, kept)) is not None:
        return pages
    running = _pause(machine)
    try:
        return _revert(machine, kept)
    except BaseException as error:
        _broken(machine, error)
        raise
    finally:
        if running and machine.state is State.PAUSED:
            machine.resume()


def _broken(machine: Machine, error: BaseException) -> None:
    """What cannot be put back is refused by StateError before anything is; any other machine is neither here nor
    there, and ends."""
    if not isinstance(error, StateError):
        machine.fail(error)


def _revert(machine: Machine, kept: Checkpoint) -> int:
    if why := kept.obstacle(machine):
        raise StateError(f"{machine.name} cannot go back: {why}")
    return kept.revert(machine)


def _revert_held(machine: Machine, kept: Checkpoint) -> int | None:
    """:func:`revert` of a machine that runs, on this thread alone; None where it has to be paused."""
    vm: Any = machine.vm
    with vm.hold() as still, machine.lock:
        if not still or machine.state is not State.RUNNING:
            return None
        machine.clock.pause()
        stopped: list[Any] = []
        try:
            for plugged in machine.devices.values():
                if "pause" in plugged.abilities:
                    stopped.append(plugged.device)
                    plugged.device.pause()
            return _revert(machine, kept)
        except BaseException as error:
            _broken(machine, error)
            raise
        finally:
            machine.clock.resume()
            for one in stopped:
                one.resume()


def _pause(machine: Machine) -> bool:
    if machine.state != "running":
        return False
    machine.pause()
    return True


def forget(machine: Machine) -> None:
    """Drop the checkpoint, if there is one."""
    if (kept := _checkpoints(machine).pop(machine, None)) is not None:
        kept.close(machine)
