"""S-expressions with the place of each: the syntax of CIL.

Symbols are letters, digits and most punctuation; strings are quoted and end on their line; a comment runs from ``;`` to
the end of the line. Source: ``libsepol/cil/src/cil_lexer.l`` and ``cil_parser.c``.
"""

from __future__ import annotations

import re
from bisect import bisect_right

from attrs import define

from cardcage_selinux.errors import PolicyError

__all__ = ["MAX_DEPTH", "Node", "Source", "parse"]

MAX_DEPTH = 100
"""How deep lists may nest: far more than policies use, and few enough for recursive walks."""

TOKEN = re.compile(
    r"""[ \t\r\n]+|;[^\n]*
    |(?P<open>\()|(?P<close>\))
    |"(?P<string>[^"\n]*)"
    |(?P<symbol>[A-Za-z0-9\[\].@=/*_$%+!|&^:~`\#{}'<>?,-]+)
    |(?P<wrong>.)""",
    re.VERBOSE | re.DOTALL,
)


class Source:
    """A file or text: where its lines begin is found out when first asked."""

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text = name, text
        self._starts: list[int] = []

    def place(self, at: int) -> tuple[int, int]:
        """Line and column of an offset, counted from 1."""
        if not self._starts:
            self._starts = [0, *(match.end() for match in re.finditer("\n", self.text))]
        line = bisect_right(self._starts, at)
        return line, at - self._starts[line - 1] + 1


@define(eq=False, slots=True)
class Node:
    """A symbol, a quoted string or a list.

    Attributes:
        text: the symbol or what stands between the quotes; empty for a list.
        items: the elements of a list, ``None`` for the others.
        source, at: the file, and the offset at which it begins.
    """

    text: str
    items: list[Node] | None
    source: Source
    at: int
    quoted: bool = False

    @property
    def line(self) -> int:
        """Counted from 1."""
        return self.source.place(self.at)[0]

    @property
    def column(self) -> int:
        """Counted from 1."""
        return self.source.place(self.at)[1]

    @property
    def place(self) -> str:
        """``file:line:column``."""
        line, column = self.source.place(self.at)
        return f"{self.source.name}:{line}:{column}"

    @property
    def head(self) -> str:
        """The keyword of a statement: its first element when that is a symbol, else empty."""
        return self.items[0].text if self.items and not self.items[0].quoted else ""

    def symbol(self, wanted: str) -> str:
        """The text of a symbol. Raises PolicyError for a list or string, saying what was *wanted*."""
        if self.items is not None or self.quoted:
            raise PolicyError(f"expected {wanted}, found {self}", self)
        return self.text

    def list(self, wanted: str) -> list[Node]:
        """The elements of a list. Raises PolicyError for anything else."""
        if self.items is None:
            raise PolicyError(f"expected {wanted} in brackets, found {self}", self)
        return self.items

    def __str__(self) -> str:
        if self.items is None:
            return f'"{self.text}"' if self.quoted else self.text
        return f"({' '.join(str(one) for one in self.items)})"


def parse(text: str, file: str) -> list[Node]:
    """The statements of a file. Raises PolicyError for what is not a list of s-expressions in brackets."""
    source = Source(file, text)
    top: list[Node] = []
    items: list[Node] | None = None
    stack: list[Node] = []
    for match in TOKEN.finditer(text):
        kind = match.lastgroup
        if kind is None:
            continue
        if kind == "close":
            if not stack:
                raise PolicyError("this bracket closes nothing", Node("", None, source, match.start()))
            stack.pop()
            items = stack[-1].items if stack else None
        elif kind == "open":
            node = Node("", [], source, match.start())
            (top if items is None else items).append(node)
            stack.append(node)
            items = node.items
            if len(stack) > MAX_DEPTH:
                raise PolicyError(f"lists nest deeper than {MAX_DEPTH}", node)
        elif kind == "wrong":
            raise PolicyError(_wrong(match[kind]), Node("", None, source, match.start()))
        else:
            node = Node(match[kind], None, source, match.start(), kind == "string")
            if items is None:
                raise PolicyError(f"expected a statement in brackets, found {node}", node)
            items.append(node)
    if stack:
        raise PolicyError("this bracket is never closed", stack[-1])
    return top


def _wrong(character: str) -> str:
    if character == '"':
        return "this string is not closed on its line"
    return f"character {character!r} is not allowed in a policy"
