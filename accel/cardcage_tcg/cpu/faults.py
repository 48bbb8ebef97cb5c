"""The guest's exceptions, as Python's."""

from __future__ import annotations

__all__ = ["Fault"]


class Fault(Exception):
    """A guest exception that the instruction ends with."""

    def __init__(self, vector: int, error: int | None = None) -> None:
        self.vector, self.error = vector, error
