"""A command's parser that is made when something is asked of it: of a dozen commands, a start parses one."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, HelpFormatter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Formatter", "LaterParser"]


class Formatter(HelpFormatter):
    """A ``HelpFormatter`` that takes the terminal's width itself: argparse makes one for each argument that is added,
    and imports shutil with all compressors for it."""

    def __init__(self, prog: str, **how: Any) -> None:
        super().__init__(prog, **{"width": columns() - 2} | how)


def columns() -> int:
    """The terminal's width, as ``shutil.get_terminal_size`` finds it."""
    told = os.environ.get("COLUMNS", "")
    if told.isascii() and told.isdigit() and int(told):
        return int(told)
    try:
        return os.get_terminal_size(sys.__stdout__.fileno()).columns or 80  # type: ignore[union-attr]  # None: no terminal
    except (AttributeError, ValueError, OSError):
        return 80


class LaterParser(ArgumentParser):
    """An ``ArgumentParser`` of the arguments *how*, which :meth:`then` may add to once it is made."""

    def __init__(self, **how: Any) -> None:
        how.setdefault("formatter_class", Formatter)
        self._later: tuple[dict[str, Any], list[Callable[[ArgumentParser], object]]] = how, []

    def then(self, fill: Callable[[ArgumentParser], object]) -> None:
        """Call *fill* with the parser when it is made, after those that were given before."""
        if "_later" in vars(self):
            self._later[1].append(fill)
        else:
            fill(self)

    def __getattr__(self, name: str) -> Any:
        """Make the parser, since nothing of it is there yet."""
        if "_later" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        how, fills = vars(self).pop("_later")
        super().__init__(**how)
        for fill in fills:
            fill(self)
        return getattr(self, name)
