"""Where values of a configuration stand: a place for each, which text and tables keep on their way to a device."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from attrs import field

from cardcage.errors import FAULTS, CardcageError, CardError, ConfigError, UsageError, in_words
from cardcage.values import frozen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

T = TypeVar("T")

HostPath = Annotated[str, "path"]
"""Text in a card's options that is a path of the host's: in a file, it is relative to that file's folder."""


@frozen
class Place:
    """Where a value stands: the file (or ``command line``, ``None`` for Python) and the key path.

    Attributes:
        folder: absolute path of the folder that relative paths here begin at; empty for the current directory.
    """

    file: str | None = None
    key: str | None = None
    folder: str = field(default="", eq=False)

    def below(self, key: str) -> Place:
        """The place of *key* in the table here; ``[2]`` is the third of a list."""
        full = key if not self.key else self.key + key if key.startswith("[") else f"{self.key}.{key}"
        return Place(self.file, full, self.folder)

    def error(self, problem: str) -> ConfigError:
        """A ConfigError about this place."""
        return ConfigError(problem, file=self.file, key=self.key)

    def blamed(self, who: str, act: Callable[[], T]) -> T:
        """Run *act*, a card's code, and return its result.

        Its own ConfigError gets this place; an exception that is not of this project, and a UsageError, becomes a
        CardError that names *who*: what was being made, its card and distribution.
        """
        try:
            return act()
        except ConfigError as error:
            if error.file not in (None, self.file):  # of a file that is named here, such as a disk image
                if self.file is None:
                    raise
                raise _moved(error, str(error), self.file, self.key) from error
            if (error.file is None and self.file is not None) or error.key is None:
                key = f"{self.key}.{error.key}" if self.key and error.key else error.key or self.key
                raise _moved(error, error.problem, error.file or self.file, key) from error
            raise
        except FAULTS as error:  # a stranger's code: whatever it raises is the card's fault, and named so
            if isinstance(error, CardcageError) and not isinstance(error, UsageError):
                raise
            raise CardError(f"{who}: {in_words(error)}") from error


def _moved(error: ConfigError, problem: str, file: str | None, key: str | None) -> ConfigError:
    """The same error with another place: of a card's own class, whatever that is made with."""
    made = error.__class__.__new__(error.__class__)
    made.__dict__.update(error.__dict__)
    ConfigError.__init__(made, problem, file=file, key=key)
    return made


@frozen
class Spec:
    """One card that a configuration names, with its options still plain."""

    name: str
    options: dict[str, Any] | str
    place: Place = field(default=Place(), eq=False)


class PlacedText(str):
    """Text of a configuration that knows its place; a ``str`` in every other way."""

    __slots__ = ("place",)

    place: Place

    def __new__(cls, text: str, place: Place) -> PlacedText:
        made = super().__new__(cls, text)
        made.place = place
        return made


class PlacedTable(dict[str, Any]):
    """A table of a configuration that knows its place; a ``dict`` in every other way."""

    __slots__ = ("place",)

    def __init__(self, table: Iterable[tuple[str, Any]] | Mapping[str, Any], place: Place) -> None:
        super().__init__(table)
        self.place = place


def placed(value: Any, place: Place) -> Any:
    """A copy of *value*, read from *place*, in which each text and table knows its own place; a file's text does."""
    if isinstance(value, str):
        return value if isinstance(value, PlacedText) and value.place.folder else PlacedText(value, place)
    if isinstance(value, dict):
        return PlacedTable(((key, placed(one, place.below(str(key)))) for key, one in value.items()), place)
    if isinstance(value, list | tuple):
        return [placed(one, place.below(f"[{at}]")) for at, one in enumerate(value)]
    return value


def place_of(value: Any, default: Place) -> Place:
    """Where *value* stands, if it still knows; else *default*."""
    return value.place if isinstance(value, PlacedText | PlacedTable) else default


def beside(text: str, prefix: str = "") -> str:
    """The path *text* from its file's folder on, where it is relative and stands in one; else as it is.

    Args:
        prefix: what such a path has in front, ``unix:``; text without it is no path.
    """
    folder, path = place_of(text, Place()).folder, text.removeprefix(prefix)
    if not (folder and path and text.startswith(prefix)):
        return str(text)
    return prefix + os.path.join(folder, path)
