"""The policy: marks guest RAM for ksmd, under the lease, and says in one line what keeps it from merging."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs.validators import and_, ge, le, optional
from cardcage.errors import HostError
from cardcage.security import Needs
from cardcage.units import Duration
from cardcage_fleet.rundir import run_directory

from cardcage_ksm.lease import KSM, HeldError, Lease, read_settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage_memory_policies.memory import MachineMemory

__all__ = ["START", "KsmOptions", "KsmPolicy"]

START = "echo 1 | sudo tee /sys/kernel/mm/ksm/run"


@frozen
class KsmOptions:
    """Options of the policy ``ksm``. ksmd is tuned by the first machine, and only where it does not run already.

    Attributes:
        group: machines of one group merge; while they do, others may not.
        scan_time: how long ksmd takes for all memory, from 1 s on, where the kernel has its advisor (6.8).
        max_cpu: per cent of a processor that the advisor may take, 10 to 100.
        pages_to_scan: pages each time it wakes, without the advisor. sleep: time between.
        smart_scan: pass over pages that could not be merged before. use_zero_pages: merge zeros with the kernel's page.
        max_page_sharing: how many may share one page, at least 2; as it is by default.
    """

    group: str = ""
    scan_time: Duration = field(default=Duration("20s"), validator=ge(Duration(1)))
    max_cpu: int = field(default=50, validator=and_(ge(10), le(100)))
    pages_to_scan: int = field(default=2500, validator=ge(1))
    sleep: Duration = field(default=Duration("20ms"))
    smart_scan: bool = True
    use_zero_pages: bool = True
    max_page_sharing: int | None = field(default=None, validator=optional(ge(2)))

    def settings(self, there: dict[str, str]) -> dict[str, str]:
        """Return the values for the settings that are *there*, in this order; ksmd starts last."""
        found = {"sleep_millisecs": str(round(self.sleep * 1000))}
        if "advisor_mode" in there:
            found |= {"advisor_mode": "scan-time", "advisor_target_scan_time": str(round(self.scan_time))}
            found["advisor_max_cpu"] = str(self.max_cpu)
        else:
            found["pages_to_scan"] = str(self.pages_to_scan)
        found |= {"smart_scan": str(int(self.smart_scan)), "use_zero_pages": str(int(self.use_zero_pages))}
        if self.max_page_sharing is not None:
            found["max_page_sharing"] = str(self.max_page_sharing)
        return {**{name: value for name, value in found.items() if name in there}, "run": "1"}


class KsmPolicy:
    """Marks the RAM of each machine that it is given.

    Args:
        options: see :class:`KsmOptions`. folder, ksm: where the lease and ksmd are; tests bring their own.
    """

    def __init__(
        self,
        options: KsmOptions | None = None,
        *,
        folder: Callable[[], Path] = lambda: run_directory("ksm"),
        ksm: Path = KSM,
    ) -> None:
        self.options = options or KsmOptions()
        self._folder, self._ksm = folder, ksm
        self._leases: dict[int, Lease] = {}

    def attach(self, memory: MachineMemory) -> None:
        """Take the lease, then mark the RAM. Raises HostError or Denied with the reason; nothing is changed then."""
        there = read_settings(self._ksm)
        if "run" not in there:
            raise HostError(f"this kernel has no KSM: {self._ksm} is not there (CONFIG_KSM=y)")
        if reason := memory.cannot_merge:
            raise HostError(f"RAM cannot be merged: {reason}")
        group = " ".join(part for part in (memory.label if memory.labelled else "", self.options.group) if part) or None
        self._join(memory, group, there)
        try:
            memory.merge()
        except BaseException:
            self._leave(memory)
            raise
        if read_settings(self._ksm).get("run") != "1":
            memory.log.warning("KSM: RAM is marked, but ksmd does not run and may not be started here", start=START)

    def _join(self, memory: MachineMemory, group: str | None, there: dict[str, str]) -> None:
        try:
            lease = Lease(self._folder(), self._ksm)
        except (HostError, OSError) as error:
            if group is not None:  # who merges with whom cannot be known: better not at all
                raise HostError(f"no lease on ksmd, without which {group} may not merge: {error}") from error
            memory.log.info("KSM: no lease, so its settings stay as they are", reason=str(error))
            return
        try:
            refused = lease.join(group, f"{memory.name} of process {os.getpid()}", self.options.settings(there))
        except HeldError as error:
            lease.close()
            raise HostError(str(error)) from error
        self._leases[id(memory)] = lease
        for one in refused:
            memory.log.info("KSM: a setting was refused", setting=one)

    def needs(self) -> Needs:
        """ksmd's settings are put back at the end."""
        return Needs(write=(str(self._ksm), *([str(self._folder())] if self._leases else [])))

    def detach(self, memory: MachineMemory) -> None:
        """Pages are the machine's own again, unless they are about to be freed; the last machine restores ksmd."""
        try:
            if not memory.ending:
                memory.merge(False)
        finally:
            self._leave(memory)

    def _leave(self, memory: MachineMemory) -> None:
        lease = self._leases.pop(id(memory), None)
        if lease is not None:
            lease.leave()
