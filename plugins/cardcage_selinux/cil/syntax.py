"""The statements that this compiler knows, with their arguments, and what is said about the others."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from cardcage.errors import near

from cardcage_selinux.errors import PolicyError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cardcage_selinux.cil.sexpr import Node

__all__ = ["CONTAINERS", "SYNTAX", "arguments", "check_keywords", "declared_name"]

SYNTAX = {
    # containers
    "block": "NAME *",
    "blockabstract": "BLOCK",
    "blockinherit": "BLOCK",
    "in": "BLOCK *",
    "macro": "NAME PARAMETERS *",
    "call": "MACRO [ARGUMENTS]",
    "optional": "NAME *",
    "tunable": "NAME VALUE",
    "tunableif": "CONDITION *",
    "boolean": "NAME VALUE",
    "booleanif": "CONDITION *",
    # the policy as a whole
    "mls": "VALUE",
    "handleunknown": "ACTION",
    "policycap": "NAME",
    # classes and permissions
    "common": "NAME PERMISSIONS",
    "class": "NAME PERMISSIONS",
    "classcommon": "CLASS COMMON",
    "classorder": "CLASSES",
    "classmap": "NAME PERMISSIONS",
    "classmapping": "CLASSMAP PERMISSION CLASSPERMISSIONS",
    "classpermission": "NAME",
    "classpermissionset": "NAME CLASSPERMISSIONS",
    # types
    "type": "NAME",
    "typeattribute": "NAME",
    "typealias": "NAME",
    "typealiasactual": "ALIAS TYPE",
    "typeattributeset": "ATTRIBUTE EXPRESSION",
    "expandtypeattribute": "ATTRIBUTES VALUE",
    "typebounds": "PARENT CHILD",
    "typepermissive": "TYPE",
    "typetransition": "SOURCE TARGET CLASS [NAME] RESULT",
    "typechange": "SOURCE TARGET CLASS RESULT",
    "typemember": "SOURCE TARGET CLASS RESULT",
    # roles and users
    "role": "NAME",
    "roleattribute": "NAME",
    "roleattributeset": "ATTRIBUTE EXPRESSION",
    "roletype": "ROLE TYPE",
    "roleallow": "ROLE ROLE",
    "roletransition": "ROLE TYPE CLASS RESULT",
    "user": "NAME",
    "userattribute": "NAME",
    "userattributeset": "ATTRIBUTE EXPRESSION",
    "userrole": "USER ROLE",
    "userlevel": "USER LEVEL",
    "userrange": "USER RANGE",
    # rules
    "allow": "SOURCE TARGET CLASSPERMISSIONS",
    "auditallow": "SOURCE TARGET CLASSPERMISSIONS",
    "dontaudit": "SOURCE TARGET CLASSPERMISSIONS",
    "neverallow": "SOURCE TARGET CLASSPERMISSIONS",
    "constrain": "CLASSPERMISSIONS EXPRESSION",
    "mlsconstrain": "CLASSPERMISSIONS EXPRESSION",
    "validatetrans": "CLASS EXPRESSION",
    "mlsvalidatetrans": "CLASS EXPRESSION",
    "defaultuser": "CLASSES SIDE",
    "defaultrole": "CLASSES SIDE",
    "defaulttype": "CLASSES SIDE",
    "defaultrange": "CLASSES SIDE [PART]",
    "rangetransition": "SOURCE TARGET CLASS RANGE",
    # levels
    "sensitivity": "NAME",
    "sensitivityalias": "NAME",
    "sensitivityaliasactual": "ALIAS SENSITIVITY",
    "sensitivityorder": "SENSITIVITIES",
    "sensitivitycategory": "SENSITIVITY CATEGORIES",
    "category": "NAME",
    "categoryalias": "NAME",
    "categoryaliasactual": "ALIAS CATEGORY",
    "categoryorder": "CATEGORIES",
    "categoryset": "NAME CATEGORIES",
    "level": "NAME LEVEL",
    "levelrange": "NAME RANGE",
    # contexts
    "context": "NAME CONTEXT",
    "sid": "NAME",
    "sidorder": "SIDS",
    "sidcontext": "SID CONTEXT",
}
"""Keyword to its arguments; ``[X]`` may be left out, ``*`` is any number of statements."""

COUNTS = {
    keyword: (
        sum(word[0] not in "[*" for word in words.split()),
        sys.maxsize if "*" in words else len(words.split()),
    )
    for keyword, words in SYNTAX.items()
}
"""Keyword to the least and the most arguments."""

CONTAINERS = {"block": 2, "in": 2, "macro": 3, "optional": 2}
"""Keyword to the place of the first statement inside."""

IN_CONDITION = {"allow", "auditallow", "dontaudit", "typetransition", "typechange", "typemember", "call", "tunableif"}
"""Statements allowed in a ``booleanif`` (secilc's list, without optionals and extended permissions)."""

LABELS = "fsuse genfscon filecon portcon nodecon netifcon pirqcon iomemcon ioportcon pcidevicecon devicetreecon".split()
LABELS += "ibpkeycon ibendportcon selinuxuser selinuxuserdefault userprefix ipaddr".split()
EXTENDED = "allowx auditallowx dontauditx neverallowx permissionx".split()
RESERVED = {"and", "or", "not", "xor", "all", "self"}


def arguments(node: Node) -> list[Node]:
    """The arguments of a statement; an absent optional argument is simply missing. Raises PolicyError."""
    least, most = COUNTS[node.head]
    given = (node.items or [])[1:]
    if not least <= len(given) <= most:
        raise PolicyError(f"expected ({node.head} {SYNTAX[node.head]})", node)
    return given


def check_keywords(nodes: Iterable[Node], inside: str = "") -> None:
    """Look at every statement, also in what is not used. Raises PolicyError for an unknown statement."""
    for node in nodes:
        node.list("a statement")
        head = node.head
        if not head:
            raise PolicyError("expected a statement: a keyword and its arguments", node)
        if head not in SYNTAX:
            raise PolicyError(unknown(head), node)
        if inside and head not in IN_CONDITION:
            raise PolicyError(f"{head} cannot stand in a {inside}", node)
        given = arguments(node)
        if head in CONTAINERS:
            check_keywords(given[CONTAINERS[head] - 1 :], inside)
        elif head in ("tunableif", "booleanif"):
            for branch in given[1:]:
                if branch.head not in ("true", "false"):
                    raise PolicyError("expected (true ...) or (false ...)", branch)
                check_keywords((branch.items or [])[1:], "booleanif" if head == "booleanif" else inside)


def unknown(head: str) -> str:
    """Return the error about an unsupported keyword."""
    if head in LABELS:
        return f"{head} labels objects of a kernel; this object manager has none of them (see docs/selinux.md)"
    if head in EXTENDED:
        return f"{head}: extended permissions are not supported (see docs/selinux.md)"
    return f'no statement "{head}" is supported.{near(head, SYNTAX)}'


def declared_name(node: Node, *, container: bool = False) -> str:
    """A name to declare: a letter, then letters, digits, ``_`` and ``-``. Raises PolicyError.

    Args:
        container: of a block, macro or optional: these never stand in expressions, so that any word will do.
    """
    name = node.symbol("a name")
    if not name[:1].isalpha() or not name.replace("_", "a").replace("-", "a").isalnum():
        raise PolicyError(f'"{name}" is not a name: a letter, then letters, digits, "_" and "-"', node)
    if name in RESERVED and not container:
        raise PolicyError(f'"{name}" has a meaning of its own and cannot be declared', node)
    return name
