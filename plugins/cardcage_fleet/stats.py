"""``cardcage stats``: a table, JSON lines, a recording, or a plot."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from cardcage.errors import ConfigError
from cardcage.units import Duration

from cardcage_fleet.accounting import Sampler
from cardcage_fleet.oom import killed_pids, why_ended
from cardcage_fleet.record import Sample, read_samples
from cardcage_fleet.roster import Roster

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Iterator

    from cardcage.host import Host

    from cardcage_fleet.accounting import MachineStats

__all__ = ["configure", "run", "table"]

COLUMNS = ("size", "resident", "proportional", "shared", "merged", "swapped", "huge", "ballooned", "overhead", "code")
SHORT = {"proportional": "pss"}
MIB = 1 << 20


def configure(parser: ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("name", metavar="NAME", nargs="*", help="machines to show, by name; without any, all")
    parser.add_argument("--watch", action="store_true", help="look again and again, until Ctrl-C or --for has passed")
    parser.add_argument("--every", metavar="TIME", default="1s", help="how often to look (1s)")
    parser.add_argument("--for", metavar="TIME", dest="duration", help="look again and again for this time (60s, 5m)")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each look, sizes in bytes")
    parser.add_argument("--record", metavar="FILE", type=Path, help="add each look to a file, as JSON lines")
    parser.add_argument("--from", metavar="FILE", type=Path, dest="source", help="show or plot a recorded file instead")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw memory over time: .png, .svg, .pdf or .html")


def run(host: Host, arguments: Namespace) -> int:
    """Look, tell, and draw. Returns 0, or 1 when a machine that was named does not run."""
    if arguments.plot is not None:
        from cardcage_fleet.plot import check_plot, plot

        check_plot(arguments.plot)
    kept, samples = arguments.plot is not None, []
    wanted, running = set(arguments.name), set[str]()
    with _recording(arguments.record) as recording:
        try:
            for sample in _looks(arguments):
                chosen = tuple(one for one in sample.machines if not wanted or one.name in wanted)
                running |= {one.name for one in chosen}
                sample = Sample(sample.at, chosen, sample.ended)
                if recording is not None:
                    print(sample.line(), file=recording, flush=True)
                if kept:
                    samples.append(sample)
                if arguments.json:
                    print(sample.line(), flush=True)
                elif not (kept and _repeated(arguments)):
                    print(table(sample), flush=True)
        except KeyboardInterrupt:
            if not _repeated(arguments):
                raise
    if kept:
        plot(samples, arguments.plot)
    for name in sorted(wanted - running):
        print(f"{name}: no machine of this name runs", file=sys.stderr)
    return int(bool(wanted - running))


def _repeated(arguments: Namespace) -> bool:
    return bool(arguments.watch or arguments.duration or arguments.source)


@contextmanager
def _recording(path: Path | None) -> Iterator[TextIO | None]:
    """The file that looks are added to."""
    if path is None:
        yield None
        return
    try:
        file = path.open("a")
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}", file=str(path)) from error
    with file:
        yield file


def _looks(arguments: Namespace) -> Iterator[Sample]:
    """The samples: of a recorded file, or one now, or one every so often."""
    if arguments.source is not None:
        yield from read_samples(arguments.source)
        return
    every, length = _time(arguments.every, "--every"), None
    if arguments.duration is not None:
        length = _time(arguments.duration, "--for")
    if every < 0.01:
        raise ConfigError("expected at least 10ms", file="--every")
    sampler, roster, began = Sampler(), Roster(), time.monotonic()
    at = began
    while True:
        yield look(sampler, roster)
        if not arguments.watch and length is None:
            return
        at = max(at + every, time.monotonic())
        if length is not None and at > began + length:
            return
        time.sleep(max(0.0, at - time.monotonic()))


def _time(text: str, flag: str) -> float:
    try:
        return Duration(text)
    except ValueError as error:
        raise ConfigError(str(error), file=flag) from error


def look(sampler: Sampler, roster: Roster | None = None) -> Sample:
    """All machines now. Tells of those that ended without a word once, and takes them off the roster."""
    roster = roster or Roster()
    alive, ended, problems = roster.read()
    now = time.time()
    found = sampler.sample(alive)
    for text in (*problems, *sampler.problems):
        print(text, file=sys.stderr)
    killed = killed_pids() if ended else None
    said = {}
    for one in ended:
        said[f"{one.name} (pid {one.pid})"] = why_ended(one, killed)
        roster.forget(one)
    return Sample(now, tuple(found), said)


def table(sample: Sample) -> str:
    """The sample for a person: MiB, a row a machine, and their sum."""
    rows = [["name", "pid", "state", *(SHORT.get(name, name) for name in COLUMNS)]]
    rows += [[one.name, str(one.pid), one.state, *_cells(one)] for one in sample.machines]
    if len(sample.machines) > 1:
        sums = [sum(getattr(one, name) or 0 for one in sample.machines) for name in COLUMNS]
        rows.append(["all", "", "", *(_mib(one) for one in sums)])
    wide = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(wide[at]) if at in (0, 2) else cell.rjust(wide[at]) for at, cell in enumerate(row))
        for row in rows
    ]
    if not sample.machines:
        lines = ["no machine runs"]
    lines += [f"{name}: {why}" for name, why in sample.ended.items()]
    return "\n".join(lines)


def _cells(one: MachineStats) -> list[str]:
    return [_mib(getattr(one, name)) for name in COLUMNS]


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / MIB:.1f}"
