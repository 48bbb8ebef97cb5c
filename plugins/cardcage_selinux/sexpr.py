"""S-expressions with the place of each: the syntax of CIL.

Symbols are letters, digits and most punctuation; strings are quoted and end on their line; a comment runs from ``;`` to
the end of the line. Source: ``libsepol/cil/src/cil_lexer.l`` and ``cil_parser.c``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from attrs import define

from cardcage_selinux.errors import PolicyError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["MAX_DEPTH", "Node", "parse"]

MAX_DEPTH = 100
"""How deep lists may nest: far more than policies use, and few enough for recursive walks."""

TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+|;[^\n]*)
    |(?P<open>\()|(?P<close>\))
    |"(?P<string>[^"\n]*)"
    |(?P<symbol>[A-Za-z0-9\[\].@=/*_$%+!|&^:~`\#{}'<>?,-]+)""",
    re.VERBOSE,
)


@define(eq=False, slots=True)
class Node:
    """A symbol, a quoted string or a list.

    Attributes:
        text: the symbol or what stands between the quotes; empty for a list.
        items: the elements of a list, ``None`` for the others.
        file, line, column: where it begins, counted from 1.
    """

    text: str
    items: list[Node] | None
    file: str
    line: int
    column: int
    quoted: bool = False

    @property
    def place(self) -> str:
        """``file:line:column``."""
        return f"{self.file}:{self.line}:{self.column}"

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


def tokens(text: str, file: str) -> Iterator[tuple[str, Node]]:
    """(kind, node) of each token. Raises PolicyError at the first character that begins none."""
    at, line, start = 0, 1, 0
    while at < len(text):
        here = Node("", None, file, line, at - start + 1)
        match = TOKEN.match(text, at)
        if match is None:
            if text[at] == '"':
                raise PolicyError("this string does not end on its line", here)
            raise PolicyError(f"character {text[at]!r} has no place in a policy", here)
        kind = match.lastgroup or "space"
        if kind == "space":
            breaks = text.count("\n", at, match.end())
            if breaks:
                line, start = line + breaks, text.rindex("\n", at, match.end()) + 1
        else:
            here.text, here.quoted = match[kind], kind == "string"
            yield kind, here
        at = match.end()


def parse(text: str, file: str) -> list[Node]:
    """The statements of a file. Raises PolicyError for what is not a list of s-expressions in brackets."""
    top: list[Node] = []
    stack: list[Node] = []
    for kind, node in tokens(text, file):
        if kind == "close":
            if not stack:
                raise PolicyError("this bracket closes nothing", node)
            stack.pop()
            continue
        if kind == "open":
            node.text, node.items = "", []
        if stack:
            items = stack[-1].items
            assert items is not None  # only lists are on the stack
            items.append(node)
        elif kind == "open":
            top.append(node)
        else:
            raise PolicyError(f"expected a statement in brackets, found {node}", node)
        if kind == "open":
            stack.append(node)
            if len(stack) > MAX_DEPTH:
                raise PolicyError(f"lists nest deeper than {MAX_DEPTH}", node)
    if stack:
        raise PolicyError("this bracket is never closed", stack[-1])
    return top
