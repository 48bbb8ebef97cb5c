"""Where values of a configuration stand: a place for each, which text and tables keep on their way to a device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from attrs import field, frozen

from cardcage.errors import CardcageError, CardError, ConfigError, in_words

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

T = TypeVar("T")


@frozen
class Place:
    """Where a value stands: the file (or ``command line``, ``None`` for Python) and the key path."""

    file: str | None = None
    key: str | None = None

    def below(self, key: str) -> Place:
        """The place of *key* in the table here; ``[2]`` is the third of a list."""
        if not self.key:
            return Place(self.file, key)
        return Place(self.file, self.key + key if key.startswith("[") else f"{self.key}.{key}")

    def error(self, problem: str) -> ConfigError:
        """A ConfigError about this place."""
        return ConfigError(problem, file=self.file, key=self.key)

    def blamed(self, who: str, act: Callable[[], T]) -> T:
        """Run *act*, a card's code, and return its result.

        Its own ConfigError gets this place; an exception that is not of this project becomes a CardError that names
        *who*: what was being made, its card and distribution.
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
        except CardcageError:
            raise
        except Exception as error:  # a stranger's code: whatever it raises is the card's fault, and named so
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
    """A copy of *value*, read from *place*, in which each text and table knows its own place."""
    if isinstance(value, str):
        return PlacedText(value, place)
    if isinstance(value, dict):
        return PlacedTable(((key, placed(one, place.below(str(key)))) for key, one in value.items()), place)
    if isinstance(value, list | tuple):
        return [placed(one, place.below(f"[{at}]")) for at, one in enumerate(value)]
    return value


def place_of(value: Any, default: Place) -> Place:
    """Where *value* stands, if it still knows; else *default*."""
    return value.place if isinstance(value, PlacedText | PlacedTable) else default
