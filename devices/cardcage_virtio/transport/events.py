"""Eventfds of a back end outside this process, at a virtio function on PCI: doorbells and interrupts."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from cardcage.errors import AcceleratorError

from cardcage_virtio.vhost.calls import CallThread
from cardcage_virtio.virtio import Virtio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cardcage.device import Slot
    from cardcage_pci.function import Function

__all__ = ["NOTIFY", "BackEndEvents"]

NOTIFY = 0x3000


class BackEndEvents:
    """The eventfds of one function's queues.

    Attributes:
        kicks: eventfd of each queue that has one, which a notification that no doorbell takes is handed on to.
    """

    def __init__(self, virtio: Virtio) -> None:
        self._virtio = virtio
        self._slot: Slot
        self._function: Function
        self.kicks: dict[int, int] = {}
        self._calls: dict[int, int] = {}
        self._bells: list[tuple[int, int]] = []

    def plug(self, slot: Slot, interrupt: Callable[[int], None]) -> None:
        """Where the accelerator does not by itself, *interrupt* is called with a queue, on a thread."""
        self._slot = slot
        self._direct = "irqfds" in getattr(slot.interrupts.vm, "capabilities", ())
        self._thread = CallThread(interrupt, f"{slot.id}-calls")

    def plug_pci(self, function: Function) -> None:
        """The function whose BAR and MSI-X table these are."""
        self._function = function

    def connect(self, index: int, kick: int, call: int) -> None:
        """Let eventfd *kick* carry the driver's notifications of queue *index*, and *call* the device's interrupts."""
        self.kicks[index], self._calls[index] = kick, call
        self._bind(index)
        self.place()

    def disconnect(self, index: int) -> None:
        """Undo :meth:`connect`."""
        if index in self._calls:
            self._unbind(index)
            del self.kicks[index], self._calls[index]
            self.place()

    def _bind(self, index: int) -> None:
        call, vector, msix = self._calls[index], self._virtio.queues[index].vector, self._function.msix
        if self._direct and msix is not None and msix.enabled and vector < msix.vectors:
            msix.bind(vector, call)
        else:
            self._thread.add(call, index)

    def _unbind(self, index: int) -> None:
        call, msix = self._calls[index], self._function.msix
        if msix is None or not msix.unbind(call):
            self._thread.remove(call)

    def place(self) -> None:
        """Put the doorbells where the BAR is now."""
        vm = self._slot.interrupts.vm
        if "doorbells" not in getattr(vm, "capabilities", ()):
            return
        for fd, address in self._bells:
            vm.remove_doorbell(fd, address, 2, pio=False, value=None)
        base = self._function.mappings[4].address
        self._bells = []
        if base is None:
            return
        for index, fd in self.kicks.items():
            address = base + NOTIFY + 4 * index
            try:
                vm.add_doorbell(fd, address, 2, pio=False, value=None)
            except AcceleratorError as error:  # it has only so many: the write comes here, and goes on to the eventfd
                self._slot.log.warning("notifications go by this process", queue=index, why=str(error))
                return
            self._bells.append((fd, address))

    @contextmanager
    def elsewhere(self, index: int) -> Iterator[None]:
        """The vector of queue *index* changes inside the block."""
        connected = index in self._calls
        if connected:
            self._unbind(index)
        yield
        if connected:
            self._bind(index)

    def config_written(self, offset: int, size: int) -> None:
        """The driver wrote configuration space: MSI-X may have gone on or off."""
        msix = self._function.msix
        if self._direct and self._calls and msix is not None and offset <= msix.offset + 3 < offset + size:
            for index in self._calls:  # the call eventfds take another way
                self._unbind(index)
                self._bind(index)
