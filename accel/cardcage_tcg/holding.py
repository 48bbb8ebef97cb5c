"""vCPUs that stand still where they are, without a thread that ends or a transition of the machine."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cardcage_tcg.cpu.vcpu import TcgVCpu
    from cardcage_tcg.library import Native
    from cardcage_tcg.translate.blocks import Blocks

__all__ = ["Holds"]

MOMENT, PATIENCE = 200_000, 100_000_000
"""Nanoseconds that vCPUs may take to come out: while their threads cannot have the GIL, and while they can."""


class Holds:
    """A :class:`~cardcage_tcg.vm.TcgVm` whose vCPUs can be held between two instructions.

    A vCPU's thread says that it is still when a kick has brought it out of native code, takes it back before it goes
    in, and looks at :attr:`holds` then; who holds sets that first, and looks at what they say then. So one of both sees
    the other. To come out, it needs no GIL, nor does it need to be scheduled again until it is let go.
    """

    native: Native
    pointer: int
    lock: threading.RLock
    cpus: list[TcgVCpu]
    _stopped: int

    def __init__(self) -> None:
        self._holder = threading.Lock()
        self.holds = False

    if TYPE_CHECKING:

        @property
        def blocks(self) -> Blocks:
            """The translator's Python half."""

    @contextmanager
    def hold(self) -> Iterator[bool]:
        """True: while the block runs, no vCPU is in guest code, in the middle of an access, or goes there, and their
        states can be set. False, which is no fault: one waits for a device, a lock or a debugger, or
        somebody else holds them, who may wait for a lock of the caller's."""
        if not self._holder.acquire(timeout=PATIENCE / 1e9):
            yield False
            return
        try:
            self.holds = True
            try:
                native, pointer = self.native, self.pointer
                still = bool(native.hold_briefly(pointer, MOMENT) or native.hold(pointer, PATIENCE))
                if still:
                    with self.lock:  # whoever stops the world meanwhile finds that it stands
                        self._stopped += 1
                try:
                    yield still
                finally:
                    if still:
                        with self.lock:
                            self._stopped -= 1
            finally:
                self.holds = False
        finally:
            self._holder.release()

    def get_ready(self) -> None:
        """Load what is otherwise loaded once a guest has instructions that need it: it may be about to go on from where
        it was, with somebody who waits for it."""
        with self.lock:
            assert self.blocks
            for cpu in self.cpus:
                cpu.get_ready()

    def await_release(self, cpu: TcgVCpu) -> None:
        """The thread of *cpu* was about to go in: wait until nobody holds it."""
        while self.holds:
            self.native.still(cpu.pointer)
            with self._holder:
                pass
            cpu.clear_still()
