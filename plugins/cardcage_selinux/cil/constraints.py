"""Constraint expressions over two contexts (three for ``validatetrans``), as plain data.

Source: ``cil_verify.c``, for what may be compared.
CIL gives a role no roles below it, so one role dominates another only when it is that role.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage_selinux.errors import PolicyError

if TYPE_CHECKING:
    from cardcage_selinux.cil.expressions import Expression
    from cardcage_selinux.cil.family import Family
    from cardcage_selinux.cil.scope import Scope
    from cardcage_selinux.cil.sexpr import Node

__all__ = ["constraint"]

FIELDS = {"u": "user", "r": "role", "t": "type"}
LEVELS = {("l1", "l2"), ("l1", "h2"), ("h1", "l2"), ("h1", "h2"), ("l1", "h1"), ("l2", "h2")}
OPERATORS = ("eq", "neq", "dom", "domby", "incomp")


def constraint(node: Node, scope: Scope, families: dict[str, Family], *, levels: bool, third: bool) -> Expression:
    """An expression, for :func:`~cardcage_selinux.cil.expressions.satisfied`. Raises PolicyError, Unresolved.

    Args:
        families: of users, roles and types, by ``u``, ``r`` and ``t``.
        levels: whether ``l1 l2 h1 h2`` may be compared.
        third: whether ``u3 r3 t3`` may be named.
    """
    items = node.list("an expression")
    if not items:
        raise PolicyError("expected an expression, found nothing", node)
    word = items[0].symbol("an operator")
    operands = items[1:]
    if word in ("and", "or", "not"):
        if len(operands) != (1 if word == "not" else 2):
            raise PolicyError(f"{word} takes {1 if word == 'not' else 2} operands", node)
        return (word, *(constraint(one, scope, families, levels=levels, third=third) for one in operands))
    if word not in OPERATORS:
        raise PolicyError(f'expected and, or, not, {", ".join(OPERATORS)}, found "{word}"', items[0])
    if len(operands) != 2:
        raise PolicyError(f"{word} takes 2 operands", node)
    left = operands[0].symbol("u1, r1, t1, l1 or the like")
    if left[:1] in ("l", "h") and left[1:] in ("1", "2"):
        return _levels(word, operands, node, levels)
    if left[:1] not in FIELDS or left[1:] not in (("1", "2", "3") if third else ("1", "2")):
        raise PolicyError(f'"{left}" cannot be compared here', operands[0])
    return _fields(word, operands, scope, families)


def _levels(word: str, operands: list[Node], node: Node, allowed: bool) -> Expression:
    left, right = operands[0].text, operands[1].symbol("l2, h2 or h1")
    if not allowed:
        raise PolicyError("levels are compared in mlsconstrain and mlsvalidatetrans only", node)
    if (left, right) not in LEVELS:
        raise PolicyError(f'"{left}" cannot be compared with "{right}"', operands[1])
    first, second = ((int(name[1]) - 1, "lh".index(name[0])) for name in (left, right))
    if word in ("eq", "neq"):
        same = "level", first, second
        return same if word == "eq" else ("not", same)
    above, below = ("dom", first, second), ("dom", second, first)
    if word == "incomp":
        return "not", ("or", above, below)
    return above if word == "dom" else below


def _fields(word: str, operands: list[Node], scope: Scope, families: dict[str, Family]) -> Expression:
    left, other = operands[0].text, operands[1]
    kind = left[0]
    at = ("user", "role", "type").index(FIELDS[kind])
    if other.items is None and other.text == f"{kind}2" and left == f"{kind}1":
        if kind != "r" and word not in ("eq", "neq"):
            raise PolicyError(f"{FIELDS[kind]}s are compared by eq and neq", operands[0])
        same = "same", at
        return same if word in ("eq", "dom", "domby") else ("not", same)
    if word not in ("eq", "neq"):
        raise PolicyError(f"names are compared by eq and neq, not by {word}", operands[0])
    if other.items is None and other.text[:1] in FIELDS and other.text[1:] in ("1", "2", "3"):
        raise PolicyError(f'"{left}" cannot be compared with "{other.text}"', other)
    bits = 0
    for name in [other] if other.items is None else other.items:
        name.symbol(f"the name of a {FIELDS[kind]}")
        bits |= families[kind].named(name, scope)
    if not bits and other.items == []:
        raise PolicyError(f"expected the name of a {FIELDS[kind]}, found nothing", other)
    among = "in", int(left[1]) - 1, at, bits
    return among if word == "eq" else ("not", among)
