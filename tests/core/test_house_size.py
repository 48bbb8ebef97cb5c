"""Modules and classes are small enough to be read at once."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
ROOMS = ("core", "accel", "devices", "plugins", "examples", "benchmarks", "docs", "tests")
LINES, METHODS = 500, 25
GENERATED = ("accel/cardcage_tcg/layout.py",)


def ours() -> dict[str, str]:
    """The text of each Python file of ours, by its path."""
    files = [ROOT / "hatch_build.py", *(file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py")))]
    kept = {file.relative_to(ROOT).as_posix(): file for file in files if not {"build", "dist"} & set(file.parts)}
    return {name: file.read_text() for name, file in kept.items() if name not in GENERATED}


def test_no_module_is_long() -> None:
    """No Python file, tests included, has more than 500 lines."""
    assert [name for name, text in ours().items() if len(text.splitlines()) > LINES] == []


def test_no_class_has_many_methods() -> None:
    """No class has more than 25 methods, properties and special ones included."""
    large = [
        f"{name}: {node.name}"
        for name, text in ours().items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ClassDef)
        and sum(isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef) for one in node.body) > METHODS
    ]
    assert large == []
