"""``--memory-backend``: text to a ``[memory]`` table."""

from __future__ import annotations

from typing import Any

from cardcage.pairs import parse_pairs

__all__ = ["parse_memory_flag"]

WORDS = {"on": True, "off": False}
"""QEMU's words for keys that are true or false."""
BOOLEAN = ("preallocate", "shared")


def parse_memory_flag(text: str) -> dict[str, Any]:
    """``file,path=ram.img,preallocate=on`` or ``memfd,nodes=0:1``."""
    table: dict[str, Any] = dict(parse_pairs(text, "type"))
    for name in BOOLEAN:
        if name in table:
            if table[name] not in WORDS:
                raise ValueError(f'{name}: expected on or off, got "{table[name]}"')
            table[name] = WORDS[table[name]]
    if "nodes" in table:
        parts = str(table["nodes"]).split(":")
        if not all(part.isascii() and part.isdigit() for part in parts):
            raise ValueError(f'nodes: expected numbers such as 0:1, got "{table["nodes"]}"')
        table["nodes"] = [int(part) for part in parts]
    return {"memory": table}
