"""A pytest plugin: guests as fixtures, and the contracts of cards as a suite. pytest finds it by its entry point.

It is no card. What it has: the fixtures ``guest``, ``class_guest``, ``module_guest``, ``session_guest`` and
``machine_factory``, the marker ``cardcage``, and options that ``pytest --help`` lists. :mod:`cardcage_pytest.plugin` is
all that a run loads which uses none of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.lazy import lazy_names

if TYPE_CHECKING:
    from cardcage_pytest.lab import Guest, MachineFactory

__all__ = ["Guest", "MachineFactory"]

__getattr__ = lazy_names("cardcage_pytest", lab="Guest MachineFactory")
