"""Observers: a table from an event to the callables really present; free when empty."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cardcage._machine.faults import MISTAKES
from cardcage.errors import FAULTS, UsageError, in_words, near

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage._host.log import Log
    from cardcage._machine.faults import Faults

EVENTS = ("state", "outcome", "reset", "pio", "mmio", "exit", "debug", "waiting", "device")


class Observers:
    """The observers of one machine. One that raises is logged and removed, but for what a guest can make it raise.

    Events, and what observers are called with:

    ``state``       the new state (a string): built, running, paused, stopped
    ``outcome``     the :data:`~cardcage.outcome.Outcome`
    ``reset``       why; after the machine was reset
    ``pio``         (port, size, value, written): each port access, after it was served
    ``mmio``        (address, size, value, written): each memory-mapped access, after it was served
    ``exit``        (vCPU index, :class:`~cardcage.vcpu.VCpuExit`): each end of a vCPU's run
    ``debug``       (vCPU index): a breakpoint or single step; the machine is about to pause
    ``waiting``     (device id, why): the host cannot do now what the guest asked for; the machine is about to pause
    ``device``      (device id, present): it was added, or taken out, after the machine was built
    """

    def __init__(self, log: Log, faults: Faults) -> None:
        self._table: dict[str, tuple[Callable[..., None], ...]] = {}
        self._log, self._faults = log, faults
        self._listener: Callable[[], None] = lambda: None

    def follow(self, changed: Callable[[], None]) -> None:
        """Call *changed* whenever an observer came or went."""
        self._listener = changed

    def add(self, event: str, observer: Callable[..., None]) -> None:
        """Call *observer* at each *event*, on the thread where it happens. Raises UsageError for an unknown event."""
        if event not in EVENTS:
            raise UsageError(f'no event "{event}".{near(event, EVENTS) or f" Known: {EVENTS}"}')
        self._table[event] = (*self._table.get(event, ()), observer)
        self._listener()

    def remove(self, event: str, observer: Callable[..., None]) -> None:
        """Take *observer* away; nothing happens when it is not there."""
        left = tuple(one for one in self._table.get(event, ()) if one is not observer)
        self._table[event] = left
        if not left:
            del self._table[event]
        self._listener()

    def has(self, *events: str) -> bool:
        """Whether anyone observes one of *events*."""
        return any(event in self._table for event in events)

    def emit(self, event: str, *values: Any) -> None:
        for observer in self._table.get(event, ()):
            try:
                observer(*values)
            except MISTAKES as error:
                self._faults.spare(error)
            except FAULTS as error:  # an observer is no part of the machine: its fault must not become the guest's
                self._log.error(
                    "observer removed: it raised", event_name=event, observer=repr(observer), error=in_words(error)
                )
                self.remove(event, observer)
