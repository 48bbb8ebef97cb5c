"""A command's parser that is made when something is asked of it: of a dozen commands, a start parses one."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["LaterParser"]


class LaterParser(ArgumentParser):
    """An ``ArgumentParser`` of the arguments *how*, which :meth:`then` may add to once it is made."""

    def __init__(self, **how: Any) -> None:
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
