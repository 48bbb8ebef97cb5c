"""Every error this project raises, as one tree split by who is to blame.

::

    CardcageError
    ├── UsageError              the caller broke a documented rule (wrong state, wrong argument)
    │   └── StateError          the act does not fit the machine's state
    ├── ConfigError             the configuration is at fault: file, key path, what was expected
    │   └── NotOffered          it names what no card offers
    ├── CardError               a card is at fault: it is broken, missing a part, or raised
    │   └── MissingExtra        a card needs an optional distribution that is not installed
    ├── HostError               the host cannot or may not: permission, missing feature, resources
    │   └── AcceleratorError    an accelerator could not start or go on
    ├── GuestError              the guest did what no machine can honour (triple fault, wild address)
    │   ├── ConsoleTimeout      what was expected on the console did not come
    │   └── EjectTimeout        it did not let go of a device that it was asked to let go of
    └── Denied                  a security checker refused the act
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

__all__ = [
    "FAULTS",
    "AcceleratorError",
    "CardError",
    "CardcageError",
    "ConfigError",
    "ConsoleTimeout",
    "Denied",
    "EjectTimeout",
    "GuestError",
    "HostError",
    "MissingExtra",
    "NotOffered",
    "StateError",
    "UsageError",
    "in_words",
    "near",
    "place_of_error",
]


class CardcageError(Exception):
    """Base of all errors of this project; ``str()`` is one clear line for a person."""


class UsageError(CardcageError):
    """The caller broke a documented rule."""


class StateError(UsageError):
    """The act does not fit the state that the machine is in."""


class ConfigError(CardcageError):
    """A configuration is at fault.

    Args:
        problem: what is wrong and what was expected, without the place.
        file: the file the value came from, ``None`` for Python or the command line.
        key: the key path inside it, such as ``device[1].type``.
    """

    def __init__(self, problem: str, *, file: str | None = None, key: str | None = None) -> None:
        self.problem, self.file, self.key = problem, file, key
        super().__init__(": ".join(part for part in (file, key, problem) if part))


class NotOffered(ConfigError):
    """A configuration names what no card offers: a missing, misspelt or broken card."""


class CardError(CardcageError):
    """A card is at fault; the message names it and its distribution."""


class MissingExtra(CardError):
    """A card needs an optional distribution that is not installed."""


class HostError(CardcageError):
    """The host cannot, or does not allow, what was asked."""


class AcceleratorError(HostError):
    """An accelerator could not start, or could not go on."""


class GuestError(CardcageError):
    """The guest did what no machine can honour; the VMM itself is sound."""


class ConsoleTimeout(GuestError, TimeoutError):
    """Text that was expected on the console did not come in time."""


class EjectTimeout(GuestError, TimeoutError):
    """The guest did not let go of a device in time: it may have no driver for that, or use the device."""


class Denied(CardcageError):
    """A security checker refused the act."""


FAULTS = (Exception, SystemExit)
"""All that a card may raise by mistake: ``sys.exit`` in a device is its fault, and ends no process."""

BENEATH = {"cardcage", "cardcage_cli", "attr", "attrs", "cattr", "cattrs", "pluggy"}
"""Packages that a card's code is called by, or calls: the line to look at is the card's."""
LIBRARY = os.path.dirname(os.__file__)


def in_words(error: BaseException) -> str:
    """One line about an exception that is not ours: its type, text and the place that it came from."""
    what = f"{type(error).__name__}: {error}"
    if isinstance(error, SystemExit):
        what = f"sys.exit({error.code!r}): expected an exception or a return"
    return f"{' '.join(what.split())}{place_of_error(error)}"


def place_of_error(error: BaseException, *, outside: bool = False) -> str:
    """`` (in FUNCTION, FILE:LINE)`` of the innermost code outside the kernel and Python's library, if there is any.

    Args:
        outside: nothing else will do; by default, it is then where the error was raised.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}:{error.lineno})"
    frame, found, last = error.__traceback__, None, None
    while frame is not None:
        found, last, frame = (frame if _outside(frame) else found), frame, frame.tb_next
    if (found := found or (None if outside else last)) is None:
        return ""
    code = found.tb_frame.f_code
    return f" (in {code.co_name}, {code.co_filename}:{found.tb_lineno})"


def _outside(frame: TracebackType) -> bool:
    file, name = frame.tb_frame.f_code.co_filename, str(frame.tb_frame.f_globals.get("__name__"))
    library = file.startswith(LIBRARY) and "-packages" not in file
    return not library and not file.startswith("<") and name.partition(".")[0] not in BENEATH


def near(word: str, known: Iterable[str]) -> str:
    """Return ``' Did you mean "x"?'`` for the closest names in *known*, or an empty string."""
    from difflib import get_close_matches  # here, for start-up's sake

    found = get_close_matches(word, sorted(known), n=2, cutoff=0.6)
    return f" Did you mean {' or '.join(f'{name!r}' for name in found)}?".replace("'", '"') if found else ""
