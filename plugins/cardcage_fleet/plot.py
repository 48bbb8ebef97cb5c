"""Memory of each machine over time, by kind, as a picture (matplotlib, the extra ``plot``)."""

from __future__ import annotations

import base64
import html
import io
from typing import TYPE_CHECKING, Any

from cardcage.errors import ConfigError, MissingExtra

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from cardcage_fleet.accounting import MachineStats
    from cardcage_fleet.record import Sample

__all__ = ["KINDS", "check_plot", "kinds_of", "plot"]

KINDS = {
    "resident, its own": "#4477aa",
    "shared or merged": "#66ccee",
    "swapped": "#ee6677",
    "ballooned": "#ccbb44",
    "not taken": "#dddddd",
    "VMM": "#228833",
}
"""The stacked bands, from below, with their colours (Paul Tol's, for all eyes); the guest's five add up to its size."""
FORMATS = (".png", ".svg", ".pdf", ".html")


def check_plot(path: Path) -> None:
    """See that the plot can be made before anything is measured. Raises ConfigError or MissingExtra."""
    if path.suffix not in FORMATS:
        raise ConfigError(f"expected a name that ends in {', '.join(FORMATS)}", file=f"--plot {path}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"there is no directory {path.absolute().parent}", file=f"--plot {path}")
    _matplotlib()


def _matplotlib() -> Any:
    try:
        from matplotlib import figure
    except ImportError as error:
        raise MissingExtra(f"--plot: needs: pip install 'cardcage[plot]' ({error})") from error
    return figure


def kinds_of(one: MachineStats) -> tuple[int, ...]:
    """A machine's bytes by :data:`KINDS`. The guest's kinds add up to its size."""
    shared = min(max(one.shared, one.merged), one.resident)
    own = one.resident - shared
    left = max(0, one.size - one.resident)
    swapped = min(one.swapped, left)
    ballooned = min(one.ballooned or 0, left - swapped)
    return own, shared, swapped, ballooned, left - swapped - ballooned, one.overhead


def plot(samples: Iterable[Sample], path: Path) -> None:
    """Draw a panel a machine, and one with the sum. Raises ConfigError when there is nothing to draw, or no room."""
    taken = list(samples)
    panels = series(taken)
    if not panels:
        raise ConfigError("no machine ran: there is nothing to draw", file=f"--plot {path}")
    kind = "svg" if path.suffix == ".html" else path.suffix[1:]
    buffer = io.BytesIO()
    _draw(panels).savefig(buffer, format=kind, dpi=120)
    data = buffer.getvalue()
    if path.suffix == ".html":
        picture = base64.b64encode(data).decode()
        names = html.escape(", ".join(panels))
        data = (
            f'<!doctype html><meta charset="utf-8"><title>cardcage stats: {names}</title>\n'
            f'<img style="max-width:100%" alt="memory over time: {names}" src="data:image/svg+xml;base64,{picture}">\n'
        ).encode()
    try:
        path.write_bytes(data)
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}", file=str(path)) from error


def series(samples: list[Sample]) -> dict[str, tuple[list[float], list[tuple[int, ...]]]]:
    """For each machine, and for ``all`` of several: seconds since the first sample, and bytes by kind at each."""
    found: dict[str, tuple[list[float], list[tuple[int, ...]]]] = {}
    names = {(one.name, one.pid) for sample in samples for one in sample.machines}
    doubled = {name for name, _ in names if sum(name == other for other, _ in names) > 1}
    for sample in samples:
        since, rows = sample.at - samples[0].at, []
        for one in sample.machines:
            title = f"{one.name} ({one.pid})" if one.name in doubled else one.name
            times, values = found.setdefault(title, ([], []))
            times.append(since)
            values.append(kinds_of(one))
            rows.append(values[-1])
        if len(names) > 1:
            times, values = found.setdefault("all", ([], []))
            times.append(since)
            values.append(tuple(map(sum, zip(*rows, strict=True))) if rows else (0,) * len(KINDS))
    return found


def _draw(panels: dict[str, tuple[list[float], list[tuple[int, ...]]]]) -> Any:
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = _matplotlib().Figure(figsize=(5 * columns, 3 * rows + 0.6), layout="constrained")
    for at, (name, (times, values)) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, at + 1)
        if len(times) == 1:  # one look: a bar as wide as a second
            times, values = [times[0], times[0] + 1], values * 2
        stacks = [[value / (1 << 20) for value in kind] for kind in zip(*values, strict=True)]
        axes.stackplot(times, *stacks, colors=list(KINDS.values()), labels=list(KINDS), linewidth=0)
        axes.set_title(name.replace("$", r"\$"), fontsize=10)
        axes.set_ylim(bottom=0)
        axes.set_xlim(times[0], times[-1])
        axes.set_xlabel("seconds")
        axes.set_ylabel("MiB")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(KINDS), fontsize=8)
    return figure
