"""``cardcage policy``: check, explain, allow-from-log, diff and query."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from cardcage_selinux.policy import load

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``cardcage policy``."""
    acts = parser.add_subparsers(dest="act", required=True, metavar="check")
    check = acts.add_parser("check", help="compile CIL files to one policy; errors have file, line and column")
    check.add_argument("files", nargs="+", metavar="FILE")
    check.add_argument("--no-neverallow", action="store_true", help="leave out neverallow rules and type bounds")


def run(host: object, arguments: argparse.Namespace) -> int:
    """Carry out ``cardcage policy``; the process's status. Raises ConfigError."""
    acts: dict[str, Callable[[argparse.Namespace], int]] = {"check": _check}
    return acts[arguments.act](arguments)


def _check(arguments: argparse.Namespace) -> int:
    tables = load(arguments.files, check=not arguments.no_neverallow).tables
    counts = {
        "classes": len(tables.classes),
        "types": len(tables.types),
        "attributes": len(tables.attributes),
        "roles": len(tables.roles),
        "users": len(tables.users),
        "booleans": len(tables.booleans),
        "rules": len(tables.rules),
        "constraints": sum(len(one) for one in tables.constraints.values()),
    }
    print(", ".join(f"{count} {name}" for name, count in counts.items()), file=sys.stdout)
    return 0
