"""Where vCPUs wait while their VM is to be quiescent."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from cardcage.waiting import Condition

from cardcage_kvm.vcpu import KvmVCpu

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


__all__ = ["Gate"]


class Gate:
    """The way into guest code.

    Attributes:
        stopping: how many want the VM quiescent. Read without the lock, on the way into each run.
    """

    def __init__(self) -> None:
        self.stopping = 0
        self._changed = Condition()

    @contextlib.contextmanager
    def closed(self, vcpus: Sequence[KvmVCpu]) -> Iterator[None]:
        """All of *vcpus* out of guest code while the block runs; may be nested and called within *ops*."""
        with self._changed:
            self.stopping += 1
        for vcpu in vcpus:
            vcpu.interrupt()
        try:
            with self._changed:
                while any(vcpu.inside for vcpu in vcpus):
                    self._changed.wait()
            yield
        finally:
            with self._changed:
                self.stopping -= 1
                self._changed.notify_all()

    def left(self) -> None:
        """A vCPU with something to attend to came out of KVM_RUN: whoever waits for that looks again."""
        with self._changed:
            self._changed.notify_all()

    def wait(self) -> None:
        """Hold a vCPU's thread until nobody wants the VM quiescent."""
        with self._changed:
            while self.stopping:
                self._changed.wait()
