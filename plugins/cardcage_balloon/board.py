"""A board on which each process of this account says what its machines hold, so that all plan for all.

Each writer has a file, replaced as a whole, and a lock on another that ends with the process: what a dead one wrote is
removed by the next who looks. Times are CLOCK_MONOTONIC, which is the whole host's.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import asdict, evolve, frozen
from cardcage_fleet.held import hold, is_held

from cardcage_balloon.plan import Seen

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Board", "Entry"]

OLD = 15.0
"""Seconds after which a writer that lives has stopped steering: what its machines hold is simply gone."""
LARGEST = 1 << 20
"""Bytes of a file that is still read: the directory is this account's own, but a bug may fill a file."""


@frozen
class Entry:
    """One machine on the board: its name, what it holds, and how much of it is resident (bytes)."""

    name: str
    seen: Seen
    resident: int


class Board:
    """This process's file on the board in *folder*, and the others'."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.name = folder, f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._lock = hold(folder / f"{self.name}.lock")  # the name is nobody else's

    def write(self, group: str, entries: Sequence[Entry]) -> None:
        """Say what the machines of this process, which is limited by *group*, hold now."""
        path = self._folder / f"{self.name}.new"
        machines = [asdict(one) for one in entries]
        path.write_text(json.dumps({"time": time.monotonic(), "group": group, "machines": machines}))
        path.rename(self._folder / f"{self.name}.json")

    def others(self, group: str) -> list[Entry]:
        """Return the holdings of the others in *group*."""
        found: list[Entry] = []
        for path in sorted(self._folder.glob("*.json")):
            if path.stem != self.name and self._lives(path.stem):
                found += self._read(path, group)
        return found

    def _lives(self, name: str) -> bool:
        """True if the writer lives; else its files go."""
        path = self._folder / f"{name}.lock"
        if is_held(path):
            return True
        if path.exists():
            self._remove(name)
        return False

    def _remove(self, name: str) -> None:
        for end in ("json", "new", "lock"):
            (self._folder / f"{name}.{end}").unlink(missing_ok=True)

    def _read(self, path: Path, group: str) -> list[Entry]:
        try:
            if path.stat().st_size > LARGEST:
                return []
            table: Any = json.loads(path.read_text())
            if table["group"] != group:
                return []
            old = time.monotonic() - table["time"] > OLD
            made = [Entry(str(one["name"]), Seen(**one["seen"]), int(one["resident"])) for one in table["machines"]]
            return [evolve(one, seen=evolve(one.seen, steered=False)) if old else one for one in made]
        except (OSError, ValueError, KeyError, TypeError):  # gone meanwhile, or written by another version
            return []

    def close(self) -> None:
        """Take the files away. Idempotent."""
        if self._lock is not None:
            self._remove(self.name)
            self._lock.close()
            self._lock = None
