"""The table of conformance programs, by theme. Each module holds ``PROGRAMS``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cardcage_conformance.conformance import Program

__all__ = ["THEMES", "all_programs"]

THEMES = (
    *("flow", "integer", "strings", "floating", "modes", "paging", "segments", "privilege", "system_calls"),
    *("user_pages", "exceptions", "stepping", "breakpoints"),
    *("precise", "devices", "machine", "code", "stale", "processors", "interrupts", "apic", "ipi", "eventfds"),
)


def all_programs() -> list[Program]:
    """Every program, in the order of themes."""
    return [one for theme in THEMES for one in import_module(f"cardcage_conformance.programs.{theme}").PROGRAMS]
