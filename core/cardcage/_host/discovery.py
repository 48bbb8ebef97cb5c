"""Which cards are announced: the entry points of one group, of the distributions on ``sys.path``.

What :func:`importlib.metadata.entry_points` does, for start-up's sake: that module and what it imports take a fifth of
the time of ``cardcage --help``. A test holds the two to the same answer. Distributions inside zip files are not seen.
"""

from __future__ import annotations

import os
import re
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from cardcage.values import frozen

if TYPE_CHECKING:
    from collections.abc import Iterator


@frozen
class Announcement:
    """One entry point.

    Attributes:
        name: the card's. value: ``module`` or ``module:attribute``.
        project, version: its distribution. folder: that one's metadata.
    """

    name: str
    value: str
    project: str
    version: str
    folder: str

    def load(self) -> Any:
        """Import what it names."""
        module, _, attributes = self.value.partition("[")[0].strip().partition(":")
        found: Any = import_module(module.strip())
        for one in attributes.split(".") if attributes.strip() else ():
            found = getattr(found, one.strip())
        return found

    def requires(self, project: str) -> str | None:
        """What the distribution asks for of *project*, as it is written there; None when it does not name it."""
        wanted = (line.partition(":")[2].strip() for line in _headers(self.folder) if line.startswith("Requires-Dist:"))
        return next((one for one in wanted if re.match(rf"{re.escape(project)}(?![\w.-])", one)), None)


def announced(group: str) -> list[Announcement]:
    """The entry points of *group*; of two distributions with one name, the earlier on the path counts."""
    found = []
    for folder in _folders():
        try:
            with open(f"{folder}/entry_points.txt", encoding="utf-8") as file:
                pairs = list(_section(file.read(), group))
        except OSError:  # it announces nothing
            continue
        if pairs:
            headers = dict(line.split(": ", 1) for line in reversed(_headers(folder)) if ": " in line)
            project, version = headers.get("Name", "unknown"), headers.get("Version", "")
            found += [Announcement(name, value, project, version, folder) for name, value in pairs]
    return found


def _folders() -> Iterator[str]:
    seen = set()
    for place in sys.path:
        try:
            names = os.listdir(place or ".")
        except OSError:  # not there, or a zip file
            continue
        for name in names:
            if name.endswith((".dist-info", ".egg-info")):
                project = re.sub(r"[-_.]+", "-", name.rpartition(".")[0].partition("-")[0]).lower()
                if project not in seen:
                    seen.add(project)
                    yield os.path.join(place or ".", name)


def _section(text: str, group: str) -> Iterator[tuple[str, str]]:
    inside = False
    for line in map(str.strip, text.splitlines()):
        if line.startswith("["):
            inside = line == f"[{group}]"
        elif inside and line and not line.startswith("#"):
            name, _, value = line.partition("=")
            yield name.strip(), value.strip()


def _headers(folder: str) -> list[str]:
    """The lines of a distribution's metadata before its description."""
    for name in ("METADATA", "PKG-INFO"):
        try:
            with open(f"{folder}/{name}", encoding="utf-8", errors="replace") as file:
                return file.read().partition("\n\n")[0].splitlines()
        except OSError:
            continue
    return []
