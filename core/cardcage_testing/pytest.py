"""Fixtures, never loaded unasked: ``pytest_plugins = "cardcage_testing.pytest"``.

``slot``: a :class:`~cardcage_testing.TestSlot`. ``make_machine``: like :class:`cardcage.Machine`, closed after the
test.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from cardcage_testing.slot import TestSlot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cardcage.machine import Machine

__all__ = ["make_machine", "slot"]


@pytest.fixture
def slot() -> Iterator[TestSlot]:
    """A slot without a machine."""
    made = TestSlot()
    yield made
    made.close()


@pytest.fixture
def make_machine() -> Iterator[Callable[..., Machine]]:
    """Makes machines, with the arguments of :class:`cardcage.Machine`; they are closed when the test ends.

    A card's exception that no ``wait()`` raised fails the test.
    """
    from cardcage.machine import Machine

    with ExitStack() as stack:

        def make(**arguments: Any) -> Machine:
            return stack.enter_context(Machine(**arguments))

        yield make
