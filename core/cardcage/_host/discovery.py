"""Which cards are announced: the entry points of one group, of the distributions on ``sys.path``.

What :func:`importlib.metadata.entry_points` does, for start-up's sake: that module and what it imports take a fifth of
the time of ``cardcage --help``. A test holds the two to the same answer. Distributions inside zip files are not seen.
"""

from __future__ import annotations

import os
import re
import sys
from importlib import import_module
from time import time_ns
from typing import TYPE_CHECKING, Any

from cardcage.values import frozen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


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
        if pairs := _points(folder).get(group):
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


SETTLED = 2_000_000_000
"""Nanoseconds after which a further change of a file shows in its times."""
_read: dict[str, tuple[tuple[int, ...], Any]] = {}
"""What was in a file, and which file that was: each new Host, and each maker of a machine, looks at all of them."""


def _parsed(path: str, parse: Callable[[str], Any]) -> Any:
    """What *parse* makes of a file; of one that is as it was when it was read, what it made then. Raises OSError."""
    about = os.stat(path)
    stamp = about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns
    known = _read.get(path)
    if known is None or known[0] != stamp:
        with open(path, encoding="utf-8", errors="replace") as file:
            known = stamp, parse(file.read())
        if time_ns() - about.st_ctime_ns > SETTLED:
            _read[path] = known
    return known[1]


def _points(folder: str) -> dict[str, list[tuple[str, str]]]:
    """The names and values of a distribution's entry points by their groups."""
    try:
        found: dict[str, list[tuple[str, str]]] = _parsed(f"{folder}/entry_points.txt", _sections)
    except OSError:  # it announces nothing
        return {}
    return found


def _sections(text: str) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    inside = found.setdefault("", [])
    for line in map(str.strip, text.splitlines()):
        if line.startswith("["):
            inside = found.setdefault(line.removeprefix("[").removesuffix("]"), [])
        elif line and not line.startswith("#"):
            name, _, value = line.partition("=")
            inside.append((name.strip(), value.strip()))
    return found


def _headers(folder: str) -> list[str]:
    """The lines of a distribution's metadata before its description."""
    for name in ("METADATA", "PKG-INFO"):
        try:
            lines: list[str] = _parsed(f"{folder}/{name}", lambda text: text.partition("\n\n")[0].splitlines())
        except OSError:
            continue
        return lines
    return []
