"""Samples over time: a JSON line for each, as ``--record`` writes, ``--json`` prints and ``--from`` reads them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from attrs import asdict, fields, frozen
from cardcage.errors import ConfigError

from cardcage_fleet.accounting import MachineStats

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Sample", "read_samples"]


@frozen
class Sample:
    """All machines at one moment.

    Attributes:
        at: seconds since 1970. machines: their figures. ended: machines that ended without a word, and why.
    """

    at: float
    machines: tuple[MachineStats, ...]
    ended: dict[str, str]

    def line(self) -> str:
        """One line of JSON."""
        return json.dumps(
            {"at": round(self.at, 3), "machines": [asdict(one) for one in self.machines], "ended": self.ended}
        )


def read_samples(path: Path) -> list[Sample]:
    """Samples that ``--record`` wrote. Raises ConfigError that names the line."""
    found = []
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"cannot be read: {reason}", file=str(path)) from error
    for number, line in enumerate(lines, 1):
        try:
            found.append(_sample(json.loads(line)))
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"no sample of cardcage stats: {error}", file=f"{path}:{number}") from error
    return found


def _sample(table: Any) -> Sample:
    known = {one.name: one for one in fields(MachineStats)}
    machines = []
    for row in table["machines"]:
        for name in ("name", "pid", "size"):
            row[name]  # a KeyError names what is missing
        values = {name: value for name, value in row.items() if name in known}
        for name, value in values.items():
            wanted = str if name in ("name", "state") else (int, float, type(None))
            if not isinstance(value, wanted):
                raise ValueError(f"{name} is {value!r}")
        machines.append(MachineStats(**values))
    return Sample(float(table["at"]), tuple(machines), dict(table.get("ended", {})))
