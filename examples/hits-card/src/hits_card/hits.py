"""The device: it has no registers, and uses the accelerator's ``guest-debug``."""

from collections import Counter, deque
from typing import Any, cast

from attrs import field, frozen
from cardcage.accelerator import GuestDebug
from cardcage.device import Slot
from cardcage.errors import ConfigError
from cardcage.machine import Machine


@frozen
class HitsOptions:
    """Options of ``hits``: the linear addresses that are counted."""

    at: list[int] = field()

    @at.validator
    def _addresses(self, _: object, value: list[int]) -> None:
        if not value or not all(0 <= one < 1 << 64 for one in value):
            raise ValueError(f"{value}: expected addresses, 0 to 0xffffffffffffffff")


def parse_hits(text: str) -> dict[str, Any]:
    """``--hits 0x7c00,0x7c03``."""
    return {"device": [{"type": "hits", "at": [int(one, 0) for one in text.split(",")]}]}


class Hits:
    """Counts; ``counts`` has how often the guest came by each address."""

    def __init__(self, options: HitsOptions) -> None:
        self.counts: Counter[int] = Counter(dict.fromkeys(options.at, 0))
        self._points = [("execute", one, 1) for one in options.at]
        self._met: deque[int] = deque()
        self._stepped: int | None = None

    def plug(self, slot: Slot, /) -> None:
        slot.host.provide("guest-debug", self)  # another debugger would take the points away

    def read(self, offset: int, size: int, /) -> int:
        return 0

    def write(self, offset: int, size: int, value: int, /) -> None: ...

    def count(self, machine: Machine) -> None:
        if "guest-debug" not in machine.vm.capabilities:
            raise ConfigError(f"accelerator {machine.accelerator.name} has no guest-debug, which hits needs")
        self._debug = cast(GuestDebug, machine.vm)
        self._cpus = len(machine.vcpus)
        self._debug.set_breakpoints(self._points)
        machine.observers.add("debug", self._stopped)
        machine.observers.add("state", lambda state: self._changed(machine, state))

    def _stopped(self, cpu: int) -> None:
        """On a processor's thread; the machine is about to pause."""
        self._met.append(cpu)

    def _changed(self, machine: Machine, state: str) -> None:
        if state == "paused" and self._met:
            machine.loop.post(lambda: self._go_on(machine))  # behind this transition
        elif state == "stopped":
            for address, times in self.counts.items():
                machine.log.warning("hits", address=hex(address), times=times)

    def _go_on(self, machine: Machine) -> None:
        if machine.state != "paused":
            return
        while self._met:
            cpu = self._met.popleft()
            point = self._debug.debug_stop(cpu)
            if cpu == self._stepped and point is None:
                self._stepped = None
            elif point is not None:
                self.counts[point[1]] += 1
                self._stepped = cpu
                break  # the others meet theirs again: nothing of their instructions is done
        self._met.clear()
        self._debug.set_breakpoints([] if self._stepped is not None else self._points)
        for cpu in range(self._cpus):
            how = "run" if self._stepped is None else "step" if cpu == self._stepped else "hold"
            self._debug.set_stepping(cpu, how)
        machine.resume()
