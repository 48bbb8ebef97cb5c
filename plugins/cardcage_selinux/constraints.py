"""Constraint expressions, as functions of two contexts (three for ``validatetrans``).

Source: ``libsepol/src/services.c`` (``constraint_expr_eval_reason``) and ``cil_verify.c`` for what may be compared.
CIL gives a role no roles below it, so one role dominates another only when it is that role.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import define

from cardcage_selinux.errors import PolicyError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage_selinux.context import Context, Level
    from cardcage_selinux.family import Family
    from cardcage_selinux.scope import Scope
    from cardcage_selinux.sexpr import Node

    Test = Callable[[Context, Context, Context], bool]
    Side = Callable[[Context, Context, Context], Level]

__all__ = ["Constraint", "compile_test"]

FIELDS = {"u": "user", "r": "role", "t": "type"}
LEVELS = {("l1", "l2"), ("l1", "h2"), ("h1", "l2"), ("h1", "h2"), ("l1", "h1"), ("l2", "h2")}
OPERATORS = ("eq", "neq", "dom", "domby", "incomp")


@define(eq=False, frozen=True)
class Constraint:
    """What must hold for *mask* to be granted.

    Attributes:
        test: ``test(source, target, third)``; third is the task of a ``validatetrans``, else the target again.
        node: the statement, for those who ask why.
    """

    mask: int
    test: Test
    node: Node


def compile_test(node: Node, scope: Scope, families: dict[str, Family], *, levels: bool, third: bool) -> Test:
    """An expression as a function. Raises PolicyError, Unresolved.

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
        tests = [compile_test(one, scope, families, levels=levels, third=third) for one in operands]
        return _join(word, tests)
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


def _join(word: str, tests: list[Test]) -> Test:
    first, second = tests[0], tests[-1]
    if word == "not":
        return lambda s, t, n: not first(s, t, n)
    if word == "and":
        return lambda s, t, n: first(s, t, n) and second(s, t, n)
    return lambda s, t, n: first(s, t, n) or second(s, t, n)


def _levels(word: str, operands: list[Node], node: Node, allowed: bool) -> Test:
    left, right = operands[0].text, operands[1].symbol("l2, h2 or h1")
    if not allowed:
        raise PolicyError("levels are compared in mlsconstrain and mlsvalidatetrans only", node)
    if (left, right) not in LEVELS:
        raise PolicyError(f'"{left}" cannot be compared with "{right}"', operands[1])
    first, second = _side(left), _side(right)
    if word == "eq":
        return lambda s, t, n: first(s, t, n) == second(s, t, n)
    if word == "neq":
        return lambda s, t, n: first(s, t, n) != second(s, t, n)
    if word == "dom":
        return lambda s, t, n: first(s, t, n).dominates(second(s, t, n))
    if word == "domby":
        return lambda s, t, n: second(s, t, n).dominates(first(s, t, n))

    def incomparable(s: Context, t: Context, n: Context) -> bool:
        one, other = first(s, t, n), second(s, t, n)
        return not one.dominates(other) and not other.dominates(one)

    return incomparable


def _side(name: str) -> Side:
    end = 0 if name[0] == "l" else 1
    if name[1] == "1":
        return lambda s, t, n: s.range[end]  # type: ignore[index]  # only compiled where there are levels
    return lambda s, t, n: t.range[end]  # type: ignore[index]  # likewise


def _fields(word: str, operands: list[Node], scope: Scope, families: dict[str, Family]) -> Test:
    left, other = operands[0].text, operands[1]
    kind = left[0]
    at = ("user", "role", "type").index(FIELDS[kind])
    who = int(left[1]) - 1
    if other.items is None and other.text == f"{kind}2" and left == f"{kind}1":
        if kind != "r" and word not in ("eq", "neq"):
            raise PolicyError(f"{FIELDS[kind]}s are compared by eq and neq", operands[0])
        if word in ("eq", "dom", "domby"):
            return lambda s, t, n: s[at] == t[at]
        return lambda s, t, n: s[at] != t[at]
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
    if word == "eq":
        return lambda s, t, n: bool(bits >> (s, t, n)[who].number(at) & 1)
    return lambda s, t, n: not bits >> (s, t, n)[who].number(at) & 1
