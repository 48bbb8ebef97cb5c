"""What users read: how docstrings begin."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
ROOMS = sorted(one for shelf in ("core", "accel", "devices", "plugins") for one in (ROOT / shelf).glob("cardcage*"))


def sources() -> Iterator[Path]:
    """Every module whose names are public."""
    for room in ROOMS:
        yield from (one for one in sorted(room.rglob("*.py")) if "/_" not in str(one.parent.relative_to(room.parent)))


def docstrings(node: ast.AST) -> Iterator[ast.Constant]:
    """The docstrings of a module's public names, of attributes too, whose text follows the assignment."""
    for item in getattr(node, "body", []):
        if isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant) and isinstance(item.value.value, str):
            yield item.value
        elif not getattr(item, "name", "").startswith("_") or getattr(item, "name", "").endswith("__"):
            yield from docstrings(item)


def test_docstrings_begin_with_a_noun_or_an_imperative() -> None:
    """No public docstring of the rooms begins with "What" or "Whether"."""
    found = [
        f"{file.relative_to(ROOT)}:{one.lineno}: {str(one.value).splitlines()[0]}"
        for file in sources()
        for one in docstrings(ast.parse(file.read_text()))
        if re.match(r"\s*(What|Whether)\b", str(one.value))
    ]
    assert found == []
