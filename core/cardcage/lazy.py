"""Names of a package that are imported when first used (PEP 562), so that ``import cardcage`` costs nothing."""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # typing is slow to import, and until main() runs a Ctrl-C is a traceback

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["lazy_names"]


def lazy_names(package: str, **homes: str) -> Callable[[str], Any]:
    """A package's ``__getattr__``: each keyword is a module of it, its value the names from there, by spaces."""

    def find(name: str) -> Any:
        for module, names in homes.items():
            if name in names.split():
                return getattr(import_module(f"{package}.{module}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find
