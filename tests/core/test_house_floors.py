"""The floors: which room may import which, by walking every import."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHELVES = {"core": "core", "accel": "accel", "devices": "devices", "plugins": "plugins"}
ALSO = {"cardcage_virtio": {"cardcage_pci"}}
"""What a card may import besides core and itself."""


def rooms() -> dict[str, Path]:
    """Package name to folder."""
    return {init.parent.name: init.parent for shelf in SHELVES for init in (ROOT / shelf).glob("*/__init__.py")}


def imports(file: Path) -> set[str]:
    """Top-level packages of ours that *file* imports or names in a lazy reference ``"package.module:attribute"``."""
    found = set()
    ours = rooms()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            head, colon, tail = node.value.partition(":")
            if colon and tail.isidentifier() and all(part.isidentifier() for part in head.split(".")):
                found.add(head.partition(".")[0])
    return found & set(ours)


@pytest.mark.parametrize("room", sorted(rooms()))
def test_only_the_agreed_arrows(room: str) -> None:
    """A room imports core, itself and what the plan allows; core imports no card."""
    allowed = {room, "cardcage"} | ALSO.get(room, set())
    wrong = {
        f"{file.relative_to(ROOT)} -> {name}"
        for file in rooms()[room].rglob("*.py")
        for name in imports(file) - allowed
    }
    assert not wrong


def test_no_room_uses_relative_imports() -> None:
    """Imports are absolute, so that the walk above sees all of them."""
    wrong = {
        str(file.relative_to(ROOT))
        for folder in rooms().values()
        for file in folder.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level
    }
    assert not wrong


@pytest.mark.parametrize("room", sorted(name for name in rooms() if name != "cardcage"))
def test_a_cards_init_imports_nothing_heavy(room: str) -> None:
    """A card's `__init__` imports only core and attrs, at its top level: it registers, with lazy references."""
    tree = ast.parse((rooms()[room] / "__init__.py").read_text())
    wrong = [
        ast.unparse(node)
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        and not ast.unparse(node).startswith(("from __future__", "from typing", "from cardcage.", "from attrs"))
    ]
    assert not wrong
