"""The policy: what was not touched since the last step is cold, and a part of it goes out."""

from pathlib import Path

from attrs import frozen
from cardcage.units import Duration
from cardcage_memory_policies import MachineMemory, mappings


@frozen
class Options:
    interval: Duration = Duration("30s")  # noqa: RUF009  a time is a float
    part: float = 0.25


class ColdMemory:
    def __init__(self, options: Options) -> None:
        self.part, self.interval = options.part, float(options.interval)
        self.machines: list[MachineMemory] = []
        self.attach, self.detach = self.machines.append, self.machines.remove

    def step(self) -> None:
        areas = [area for one in self.machines for area in one.areas]
        ours = [one for one in mappings() if any(start < one.end and one.start < start + size for start, size in areas)]
        cold = sum(one.sizes["Rss"] - one.sizes["Referenced"] for one in ours) * self.part
        for memory in self.machines:
            memory.reclaim(int(cold * memory.size / sum(one.size for one in self.machines)))
        Path("/proc/self/clear_refs").write_text("1")  # from here on the processor notes anew what is touched
