"""Lines before a guest starts: the header, and the progress of slow steps."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from typing import Any

__all__ = ["Report"]

EVERY = 5.0
"""Seconds between two lines about the same download where there is no terminal to show a bar."""


class Report:
    """Progress before the guest starts: on standard error, with a progress bar on a terminal."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._cleanup = ExitStack()
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}
        self._told: dict[str, tuple[float, str]] = {}

    def line(self, name: str, text: str) -> None:
        """One line of the header."""
        self.close()
        print(f"  {name:<12} {text}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line about what takes time."""
        self.line("", text)

    def progress(self, what: str, percent: float) -> None:
        """A download's progress: *what* is its name, and after a colon and a space where it is now."""
        label = what.partition(": ")[0]
        if not self._terminal:
            now, (last, said) = time.monotonic(), self._told.get(label, (0.0, ""))
            if now - last >= EVERY and what != said:
                self._told[label] = now, what
                self.line("fetching", what)
            return
        if self._bar is None:
            from rich.console import Console
            from rich.markup import escape
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (
                TextColumn("  fetching     {task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.percentage:>3.0f}%"),
            )
            bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar, self._tasks, self._escape = self._cleanup.enter_context(bar), {}, escape
        if label not in self._tasks:
            self._tasks[label] = self._bar.add_task(self._escape(what), total=100)
        self._bar.update(self._tasks[label], completed=percent, description=self._escape(what))

    def close(self) -> None:
        """Take the bar away."""
        self._cleanup.close()
        self._bar = None
