"""Memory back end ``arriving``: RAM of a compressed snapshot, which comes while the guest runs.

Who needs all of it waits (:meth:`Arrival.complete`): a snapshot, a fork, a checkpoint, a migration; the service
``arriving-ram`` is there as long as something is missing.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import select
import signal
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from attrs import evolve
from cardcage.errors import HostError
from cardcage.ram import Anonymous, Backing
from cardcage_jail import is_inside

from cardcage_snapshot import unpacking
from cardcage_snapshot.faults import DEVICE, Faults, opened_faults
from cardcage_snapshot.ram import compressor

if TYPE_CHECKING:
    from cardcage.machine import Machine

    from cardcage_snapshot.chain import Chain

__all__ = ["SERVICE", "Arrival", "ArrivingRam", "arrive", "complete"]

SERVICE = "arriving-ram"


class ArrivingRam(Anonymous):
    """Anonymous memory; a page whose contents are lost is a fault that ends the machine, and not the process."""

    def allocate(self, size: int, name: str, /) -> Backing:
        return evolve(super().allocate(size, name), guarded=True)


def arrive(machine: Machine, chain: Chain) -> bool:
    """Let the RAM of *machine*, which is all zeros, come from *chain* from now on. False where the host cannot."""
    block = machine.memory.ranges[0].block
    if not isinstance(block.backend, ArrivingRam):
        return False
    try:
        fd = opened_faults()
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS):  # a kernel that has it not
            machine.log.warning(
                "RAM is unpacked before the guest runs, and not while it does: this user may not catch the kernel's "
                f"faults: give it {DEVICE}, or set vm.unprivileged_userfaultfd=1",
                why=error.strerror,
            )
        return False
    compressor()  # what the process needs, it has
    faults = Faults(fd, block.host_address, block.size)
    try:
        block.map.madvise(mmap.MADV_DONTNEED, block.offset, block.size)  # what is there would not be replaced
        faults.register()
        pid, link = unpacking.begin(faults, chain)
    except OSError as error:
        faults.close()
        raise HostError(f"{machine.name}: RAM cannot be unpacked: {error.strerror}") from error
    Arrival(machine, faults, pid, link.detach())
    return True


class Arrival:
    """The machine's side of it. *link* is a descriptor of the end that the process *pid* tells on."""

    def __init__(self, machine: Machine, faults: Faults, pid: int, link: int) -> None:
        self._machine, self._faults, self._pid, self._link = machine, faults, pid, link
        self._lock = threading.Lock()
        self._why = ""
        machine.services.provide(SERVICE, self)
        machine.loop.add_reader(link, lambda: machine.loop.post(self._hear))
        machine.defer(self._close)

    def complete(self) -> None:
        """Wait until all RAM is there. Raises HostError where some never will be."""
        with self._lock:
            if self._link >= 0 and not self._why:
                with suppress(OSError):  # it has ended, which is heard
                    os.write(self._link, unpacking.ALL)
            while self._link >= 0 and not self._why:
                self._receive(None)
            if self._why:
                raise HostError(self._why)

    def _hear(self) -> None:
        with self._lock:
            if self._link >= 0:
                self._receive(0)

    def _receive(self, milliseconds: int | None) -> None:
        poll = select.poll()
        poll.register(self._link, select.POLLIN)
        if not poll.poll(milliseconds):
            return
        try:
            told = os.read(self._link, 4096)
        except ConnectionError:
            told = b""
        if told == unpacking.DONE:
            self._faults.unregister()
            self._end()
        elif told:  # of a piece, whose pages are faults now; the others come
            self._fail(json.loads(told))
        else:
            with suppress(OSError):  # all that is there stays
                self._faults.poison(0, self._faults.size)
                self._faults.unregister()
            self._fail("the process that unpacks RAM has ended")
            self._end()

    def _fail(self, why: str) -> None:
        self._why = self._why or f"{self._machine.name}: {why}"
        self._machine.fail(HostError(self._why))

    def _end(self) -> None:
        """No more of it: the process ends by that."""
        if self._link < 0:
            return
        with self._machine.lock:
            if not self._why:
                self._machine.services.pop(SERVICE, None)
            self._machine.loop.remove_reader(self._link)
        self._faults.close()
        os.close(self._link)
        self._link = -1
        with suppress(ChildProcessError):
            os.waitpid(self._pid, 0)

    def _close(self) -> None:
        with self._lock:
            if self._link >= 0:
                self._faults.unregister()  # nothing is waited for any more, or lost
                if not is_inside():  # in a jail they end once they have finished a piece
                    os.killpg(self._pid, signal.SIGKILL)
                self._end()


def complete(machine: Machine) -> None:
    """Wait until the machine has all of its RAM. Raises HostError where some of it never comes."""
    if (arrival := machine.services.get(SERVICE)) is not None:
        arrival.complete()
