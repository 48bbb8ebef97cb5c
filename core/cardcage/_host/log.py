"""Logs: structlog, imported when the first entry is written, with a limit on what a guest can repeat."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from attrs import field

from cardcage.values import define

if TYPE_CHECKING:
    from collections.abc import Callable

LEVELS = ("debug", "info", "warning", "error")


@define(eq=False)
class LogSink:
    """Where the entries of a host's machines go: standard error, unless the application configured structlog itself.

    Attributes:
        level: the least level that is written, one of :data:`LEVELS`.
        json: one JSON object a line.
        burst: entries with the same event that one log writes in ``window`` seconds; the rest are counted, and the
            number is told with the next one.
    """

    level: str = "warning"
    json: bool = False
    burst: int = 10
    window: float = 5.0
    _logger: Any = field(default=None, init=False, repr=False)

    def logger(self) -> Any:
        """The structlog logger, made at the first use."""
        if self._logger is None:
            import structlog

            if structlog.is_configured():
                self._logger = structlog.get_logger()
            else:
                render: Callable[..., Any] = (
                    structlog.processors.JSONRenderer(default=str)
                    if self.json
                    else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
                )
                self._logger = structlog.wrap_logger(
                    structlog.WriteLogger(sys.stderr),
                    processors=[
                        structlog.processors.add_log_level,
                        structlog.processors.TimeStamper("iso", utc=True),
                        structlog.processors.format_exc_info,
                        render,
                    ],
                )
        return self._logger


class Log:
    """A log with bound values; what devices hold as ``slot.log``. Thread-safe.

    ``log.warning("ring index out of range", queue=1)``. Entries that repeat are limited, since a guest may cause them.
    """

    __slots__ = ("_seen", "_sink", "_values")

    def __init__(self, sink: LogSink, **values: Any) -> None:
        self._sink, self._values = sink, values
        self._seen: dict[str, tuple[float, int]] = {}

    def bind(self, **values: Any) -> Log:
        """A log that adds *values* to each entry."""
        return Log(self._sink, **self._values, **values)

    def add(self, **values: Any) -> None:
        """Add *values* to each entry from now on, for all who hold this log."""
        self._values.update(values)

    def debug(self, event: str, **values: Any) -> None:
        self._write("debug", event, values)

    def info(self, event: str, **values: Any) -> None:
        self._write("info", event, values)

    def warning(self, event: str, **values: Any) -> None:
        self._write("warning", event, values)

    def error(self, event: str, **values: Any) -> None:
        self._write("error", event, values)

    def _write(self, level: str, event: str, values: dict[str, Any]) -> None:
        sink = self._sink
        if LEVELS.index(level) < LEVELS.index(sink.level):
            return
        now = time.monotonic()
        since, count = self._seen.get(event, (now, 0))
        if now - since > sink.window:
            if count > sink.burst:
                values = {"suppressed": count - sink.burst, **values}
            since, count = now, 0
        if len(self._seen) > 256:  # events are the cards' own words, but a card may build one from guest data
            self._seen.clear()
        self._seen[event] = since, count + 1
        if count < sink.burst:
            getattr(sink.logger(), level)(event, **{**self._values, **values})
