"""Kernel settings (sysctl) of a guest, by their names."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cardcage_pytest import Guest

__all__ = ["get", "held", "put"]


def path(name: str) -> str:
    """The file of a setting. Raises ValueError for what is no name of one."""
    if not all(part.replace("_", "a").isalnum() for part in name.split(".")):
        raise ValueError(f"{name!r}: expected a name such as vm.swappiness")
    return "/proc/sys/" + name.replace(".", "/")


def get(guest: Guest, name: str) -> str:
    """The value. Raises FileNotFoundError where the kernel has no such setting."""
    return guest.files.read_text(path(name)).strip()


def put(guest: Guest, name: str, value: str) -> None:
    """Set it. Raises OSError for a value that the kernel does not take."""
    guest.files.write(path(name), value + "\n")


@contextmanager
def held(guest: Guest, name: str, value: str) -> Iterator[None]:
    """Set it meanwhile."""
    before = get(guest, name)
    put(guest, name, value)
    try:
        yield
    finally:
        put(guest, name, before)
