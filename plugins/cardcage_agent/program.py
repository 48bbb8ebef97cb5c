"""The guest agent's executable, as it was built with this installation."""

from __future__ import annotations

from pathlib import Path

from cardcage.errors import CardError

from cardcage_agent.native.build import PROGRAM, digest

__all__ = ["program"]

AGAIN = "to build it: python -m cardcage_agent.native.build"


def program() -> bytes:
    """A static x86-64 ELF file. Raises CardError where it is missing, or was built from other sources."""
    path = Path(__file__).parent / PROGRAM
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CardError(f"agent: {path}: {error.strerror}; {AGAIN}") from error
    if not data.endswith(f"\nsources {digest()}\n".encode()):
        raise CardError(f"agent: {path} was built from other sources; {AGAIN}")
    return data
