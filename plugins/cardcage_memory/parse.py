"""``--memory-backend``: text to a ``[memory]`` table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attrs import fields
from cardcage.pairs import parse_pairs, typed_pairs
from cardcage.ram import Placement
from cardcage.registry import MemoryOffer

if TYPE_CHECKING:
    from cardcage.host import Host

__all__ = ["parse_memory_flag"]


def parse_memory_flag(text: str, host: Host) -> dict[str, Any]:
    """``file,path=ram.img,preallocate=on`` or ``memfd,nodes=0:1``: any card's back end, whose options say the rest.

    Raises :exc:`ValueError`, or NotOffered.
    """
    pairs = parse_pairs(text, "type")
    name = pairs.pop("type", "anonymous")
    offer = host.registry.get(MemoryOffer, name, key="memory.type")
    common = {one.name for one in fields(Placement)}
    placed = [pair for pair in pairs.items() if pair[0] in common and pair[0] != "nodes"]
    own = [pair for pair in pairs.items() if pair[0] not in common]
    table = {"type": name, **typed_pairs(placed, Placement), **typed_pairs(own, offer.load_options())}
    if "nodes" in pairs:
        parts = pairs["nodes"].split(":")
        if not all(part.isascii() and part.isdigit() for part in parts):
            raise ValueError(f'nodes: expected numbers such as 0:1, got "{pairs["nodes"]}"')
        table["nodes"] = [int(part) for part in parts]
    return {"memory": table}
