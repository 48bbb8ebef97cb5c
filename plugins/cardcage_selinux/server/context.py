"""Security contexts, ``user:role:type[:low[-high]]``, and the order of their levels.

Sources: ``libsepol/src/mls.c`` (text, dominance) and ``policydb_context_isvalid``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Context", "Level", "Names", "Range", "category_text", "members"]


def members(bits: int) -> list[int]:
    """The numbers of the bits that are set, ascending."""
    found = []
    while bits:
        low = bits & -bits
        found.append(low.bit_length() - 1)
        bits ^= low
    return found


class Level(NamedTuple):
    """A sensitivity by its number in order, and categories as bits."""

    sensitivity: int
    categories: int

    def dominates(self, other: Level) -> bool:
        """At least as sensitive, with at least the categories."""
        return self.sensitivity >= other.sensitivity and not other.categories & ~self.categories


class Range(NamedTuple):
    """A low and a high level."""

    low: Level
    high: Level

    def contains(self, other: Range) -> bool:
        """True if *other* lies within."""
        return other.low.dominates(self.low) and self.high.dominates(other.high)


class Context(NamedTuple):
    """Numbers of user, role and type, and the range (``None`` in a policy without levels)."""

    user: int
    role: int
    type: int
    range: Range | None

    def number(self, at: int) -> int:
        """That of user, role or type, by place."""
        return (self.user, self.role, self.type)[at]


class Names(NamedTuple):
    """Names by number, and numbers by name (aliases too).

    Attributes:
        allowed: the categories that each sensitivity may carry, as bits.
    """

    sensitivities: Sequence[str]
    categories: Sequence[str]
    sensitivity: dict[str, int]
    category: dict[str, int]
    allowed: Sequence[int]

    def level(self, text: str) -> Level:
        """``s0:c0.c3,c7``. Raises ValueError saying what is wrong."""
        name, colon, rest = text.partition(":")
        if name not in self.sensitivity:
            raise ValueError(f'no sensitivity is called "{name}"')
        if colon and not rest:
            raise ValueError(f'"{text}" ends where a category should be')
        bits = 0
        for part in rest.split(",") if rest else ():
            first, dot, last = part.partition(".")
            ends = (first, last) if dot else (first, first)
            for one in ends:
                if one not in self.category:
                    raise ValueError(f'no category is called "{one}"')
            low, high = (self.category[one] for one in ends)
            if low > high or (dot and low == high):
                raise ValueError(f'"{part}" is not a range of categories')
            bits |= (2 << high) - (1 << low)
        return Level(self.sensitivity[name], bits)

    def range(self, text: str) -> Range:
        """``low[-high]``. Raises ValueError."""
        low, dash, high = text.partition("-")
        first = self.level(low)
        return Range(first, self.level(high) if dash else first)

    def valid(self, range_: Range) -> bool:
        """High dominates low, and neither has categories that its sensitivity may not carry."""
        return range_.high.dominates(range_.low) and all(
            not level.categories & ~self.allowed[level.sensitivity] for level in range_
        )

    def text(self, range_: Range) -> str:
        """A range as contexts have it, one level alone when both are the same."""
        low = self.level_text(range_.low)
        return low if range_.low == range_.high else f"{low}-{self.level_text(range_.high)}"

    def level_text(self, level: Level) -> str:
        """One level: runs of three categories and more are written ``c0.c2``."""
        name = self.sensitivities[level.sensitivity]
        return f"{name}:{category_text(level.categories, self.categories)}" if level.categories else name


def category_text(bits: int, names: Sequence[str]) -> str:
    """Categories as contexts list them: ``c0.c2,c5,c6``."""
    runs: list[list[int]] = []
    for bit in members(bits):
        if runs and runs[-1][-1] == bit - 1:
            runs[-1].append(bit)
        else:
            runs.append([bit])
    parts = []
    for run in runs:
        if len(run) > 2:
            parts.append(f"{names[run[0]]}.{names[run[-1]]}")
        else:
            parts += [names[bit] for bit in run]
    return ",".join(parts)
