"""Errors of commands, in QEMU's error classes."""

from __future__ import annotations

from cardcage.errors import UsageError

__all__ = ["CLASSES", "QmpError"]

CLASSES = ("GenericError", "CommandNotFound", "DeviceNotActive", "DeviceNotFound", "KVMMissingCap")


class QmpError(UsageError):
    """A command's refusal.

    Args:
        kind: one of QEMU's classes, :data:`CLASSES`.
    """

    def __init__(self, text: str, kind: str = "GenericError") -> None:
        self.kind = kind
        super().__init__(text)
