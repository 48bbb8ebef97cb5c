"""The standard streams of the process, and what happens when they are closed, full or hung up."""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING

from cardcage.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["open_standard_streams"]


def open_standard_streams(*, alone: bool) -> None:
    """Give the process standard streams that it can use; one where it has none.

    Args:
        alone: the process has nothing else to do. Then a message that cannot be written to standard error changes
            neither what is done nor its status, and output that cannot be written is the host's failure, not the
            command's.
    """
    # A service manager may start us with closed streams: no file of ours may take their numbers by chance.
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(fd, "w" if fd else "r", closefd=False))
    if alone:
        sys.stdout = _over(sys.stdout, _failed)
        sys.stderr = _over(sys.stderr, _lost)


def _failed(error: OSError) -> None:
    if isinstance(error, BrokenPipeError):
        raise error
    raise HostError(f"standard output cannot be written: {error.strerror}") from error


def _lost(_: OSError) -> None:
    """Nothing: there is nobody who could be told."""


class _Stream(io.FileIO):
    """A file descriptor; *failed* is told the first failure to write, and what comes after it goes nowhere."""

    def __init__(self, fd: int, failed: Callable[[OSError], None]) -> None:
        super().__init__(fd, "w", closefd=False)
        self._failed = failed

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            failed, self._failed = self._failed, _lost
            failed(error)
            return len(data)


def _over(stream: Any, failed: Callable[[OSError], None]) -> io.TextIOWrapper:
    """A stream like *stream*, with another opinion of failures."""
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Stream(stream.fileno(), failed)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
    )
