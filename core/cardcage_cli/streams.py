"""The standard streams of the process, and what happens when they are closed, full or hung up."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from cardcage.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Messages", "open_standard_streams"]


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
        sys.stdout, sys.stderr = _like(sys.stdout, _Output), _like(sys.stderr, Messages)


def _like(stream: Any, kind: type[io.TextIOWrapper]) -> io.TextIOWrapper:
    stream.flush()
    return kind(
        # Messages have no buffer in which one could stay that cannot be written.
        open(stream.fileno(), "wb", buffering=0 if kind is Messages or stream.write_through else -1, closefd=False),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,  # python -u
    )


# Not in place of the file below: a signal that raises there, after a write, would have it written again.
class Messages(io.TextIOWrapper):
    """Standard error: what cannot be written goes nowhere, since there is nobody who could be told.

    Attributes:
        written: called after each write, by who bounds what is kept of them.
    """

    written: Callable[[], object] | None = None

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError:
            return len(text)
        finally:
            if self.written is not None:
                self.written()

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


class _Output(io.TextIOWrapper):
    """Standard output: raises HostError where it cannot be written, BrokenPipeError where nobody reads it."""

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            raise self._failed(error) from error

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> Exception:
        if isinstance(error, BrokenPipeError):
            return error
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), self.fileno())  # for what is in the buffer
        return HostError(f"standard output cannot be written: {error.strerror}")
