"""``cardcage policy``: check, explain, allow-from-log, diff and query; and what ``running`` adds."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cardcage.errors import ConfigError, UsageError, near
from cardcage.security import Act

from cardcage_selinux.server.policy import Policy, load
from cardcage_selinux.tool import running
from cardcage_selinux.tool.difference import difference
from cardcage_selinux.tool.explain import explain
from cardcage_selinux.tool.fromlog import read_log, rules_for
from cardcage_selinux.tool.query import Step, Wanted, attributes_between, direct, path

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from cardcage_selinux.cil.origins import Rule

__all__ = ["configure", "run"]

DEFAULT = Path(__file__).parents[1] / "default.cil"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``cardcage policy``."""
    acts = parser.add_subparsers(dest="act", required=True, metavar="ACT")
    files = "CIL files of the policy, or a directory of *.cil files; by default the policy that cardcage ships"
    check = acts.add_parser("check", help="compile a policy; errors name file, line and column (status 2)")
    why = acts.add_parser("explain", help="explain why an access is granted (status 0) or denied (1)")
    for name, help in (
        ("scontext", "source of the access: a context, or the name of a SID such as operator"),
        ("tcontext", "target of the access, likewise"),
        ("tclass", "class of the target"),
    ):
        why.add_argument(name, help=help)
    why.add_argument("permission", help="permission of that class")
    log = acts.add_parser("allow-from-log", help="write rules that grant the accesses denied in AVC records")
    log.add_argument("log", help="file with AVC records, - for standard input")
    log.add_argument(
        "-p",
        "--policy",
        action="append",
        metavar="FILE",
        help="policy to check: note denials that a rule alone cannot lift",
    )
    two = acts.add_parser("diff", help="compare the meaning of two policies (status 0 if equal, 1 if different)")
    two.add_argument("old", help="CIL file, or a directory of *.cil files")
    two.add_argument("new", help="likewise")
    ask = acts.add_parser(
        "query", help="find a path by which a type can reach another (status 0 if there is a path, 1 if not)"
    )
    ask.add_argument("source", help="type to start from")
    ask.add_argument("target", help="type to reach")
    ask.add_argument("--flow", action="store_true", help="follow the flow of information instead of permissions")
    ask.add_argument("--class", dest="tclass", default="", help="follow only this class")
    ask.add_argument("--without", action="append", default=[], metavar="TYPE", help="exclude paths through this type")
    ask.add_argument("--permission", default="", help="follow only this permission")
    check.add_argument("files", nargs="*", metavar="FILE", help=files)
    for one in (why, ask):
        one.add_argument("-p", "--policy", action="append", default=[], metavar="FILE", help=files)
    for one in (why, ask, log):
        one.add_argument("--set", action="append", default=[], metavar="BOOLEAN=VALUE", help="set a boolean: x=true")
    running.configure(acts)
    check.add_argument("--no-neverallow", action="store_true", help="do not check neverallow rules and type bounds")


def run(host: object, arguments: argparse.Namespace) -> int:
    """Carry out ``cardcage policy``; the process's status. Raises ConfigError, UsageError."""
    acts: dict[str, Callable[[argparse.Namespace], int]] = {
        "check": _check,
        "explain": _explain,
        "allow-from-log": _allow,
        "diff": _diff,
        "query": _query,
    }
    return acts.get(arguments.act, running.run)(arguments)


def _load(files: list[str], assignments: list[str], *, check: bool = True) -> Policy:
    paths: list[Path] = []
    for name in files or [str(DEFAULT)]:
        inside = sorted(Path(name).glob("*.cil")) if Path(name).is_dir() else [Path(name)]
        if not inside:
            raise ConfigError("this directory has no *.cil", file=name)
        paths += inside
    policy = load(paths, check=check)
    changes = {}
    for text in assignments:
        name, value = running.flag(text, "--set")
        changes[name] = value
    return policy.with_booleans(changes) if changes else policy


def _check(arguments: argparse.Namespace) -> int:
    policy = _load(arguments.files, [], check=not arguments.no_neverallow)
    tables = policy.tables
    counts = {
        "classes": len(tables.classes),
        "types": len(tables.types),
        "attributes": len(tables.attributes),
        "roles": len(tables.roles),
        "users": len(tables.users),
        "booleans": len(tables.booleans),
        "rules": len(policy.origins.rules),
        "constraints": sum(len(one) for one in tables.constraints.values()),
    }
    print(", ".join(f"{count} {name}" for name, count in counts.items()))
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    policy = _load(arguments.policy, arguments.set, check=False)
    sids = policy.tables.sids
    source, target = (sids.get(text, text) for text in (arguments.scontext, arguments.tcontext))
    found = explain(policy, Act(source, target, arguments.tclass, (arguments.permission,)))
    print("granted" if found.granted else "denied")
    for reason in found.reasons:
        print(f"  {reason}")
    return 0 if found.granted else 1


def _allow(arguments: argparse.Namespace) -> int:
    policy = _load(arguments.policy, arguments.set, check=False) if arguments.policy else None
    try:
        if arguments.log == "-":
            denials = read_log(sys.stdin)
        else:
            with open(arguments.log, encoding="utf-8", errors="surrogateescape") as file:
                if stat.S_ISCHR(os.fstat(file.fileno()).st_mode):  # /dev/zero has no end, not even of a line
                    raise ConfigError("a character device: expected a log, or - for standard input", file=arguments.log)
                denials = read_log(file)
    except OSError as error:
        raise ConfigError(str(error.strerror or error), file=arguments.log) from error
    for line in denials.skipped:
        print(f"{arguments.log}:{line}", file=sys.stderr)
    for line in rules_for(denials, policy):
        print(line)
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    lines = difference(_load([arguments.old], [], check=False), _load([arguments.new], [], check=False))
    for line in lines:
        print(line)
    return 1 if lines else 0


def _type(policy: Policy, name: str) -> int:
    known = policy.tables.type_number
    if name not in known:
        raise UsageError(f'the policy has no type "{name}".{near(name, known)}'.rstrip("."))
    return known[name]


def _query(arguments: argparse.Namespace) -> int:
    policy = _load(arguments.policy, arguments.set, check=False)
    wanted = Wanted(arguments.flow, arguments.tclass, arguments.permission)
    _known(policy, wanted)
    source, target = _type(policy, arguments.source), _type(policy, arguments.target)
    names = policy.tables.types
    rules = direct(policy, source, target, Wanted(False, wanted.tclass, wanted.permission))
    print(
        f"{names[source]} may act on {names[target]} itself:"
        if rules
        else f"no rule from {names[source]} to {names[target]}"
    )
    for rule, mask in rules:
        print(f"  {_said(policy, rule, mask, source, target)}")
    steps = path(policy, source, target, wanted, frozenset(_type(policy, name) for name in arguments.without))
    if steps is None:
        print(f"{'no information flows' if wanted.flow else 'no path leads'} from {names[source]} to {names[target]}")
        return 1
    if len(steps) > 1 or wanted.flow:
        print(f"{'information flows' if wanted.flow else 'a path leads'} in {len(steps)} step{'s' * (len(steps) > 1)}:")
        for step in steps:
            _print_step(policy, step)
    return 0


def _known(policy: Policy, wanted: Wanted) -> None:
    classes = policy.tables.classes
    if wanted.tclass and wanted.tclass not in classes:
        raise UsageError(f'the policy has no class "{wanted.tclass}".{near(wanted.tclass, classes)}'.rstrip("."))
    permissions = {name for one in classes.values() for name in one.permissions}
    if wanted.permission and wanted.permission not in permissions:
        raise UsageError(
            f'no class has permission "{wanted.permission}".{near(wanted.permission, permissions)}'.rstrip(".")
        )


def _print_step(policy: Policy, step: Step) -> None:
    names = policy.tables.types
    print(f"  {names[step.first]} -> {names[step.second]}")
    pair = (step.second, step.first) if step.backwards else (step.first, step.second)
    for rule, mask in step.rules:
        print(f"    {_said(policy, rule, mask, *pair)}")


def _said(policy: Policy, rule: Rule, mask: int, source: int, target: int) -> str:
    words = " ".join(rule.class_.names(mask))
    return f"{rule.class_.name} {words}: {rule.node.place}: {rule}{attributes_between(policy, rule, source, target)}"
