"""Writes the reference pages from the code: ``python docs/reference.py`` (``--check`` only looks whether they are new).

What a page says about a protocol, a hook or a key is that thing's own docstring, so that the two cannot come apart.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
import textwrap
from pathlib import Path
from typing import Any

import attrs

HERE = Path(__file__).parent
ROOT = HERE.parent
CORE = ROOT / "core" / "cardcage"
PROTOCOLS = {
    "cardcage.device": "Devices and what carries them",
    "cardcage.interrupts": "Interrupts",
    "cardcage.clock": "Time",
    "cardcage.backends": "Back ends",
    "cardcage.memory": "Memory",
    "cardcage.ram": "Memory back ends",
    "cardcage.boot": "Booting",
    "cardcage.accelerator": "Accelerators",
    "cardcage.vcpu": "Processors",
    "cardcage.security": "Security",
    "cardcage_memory_policies.policy": "Memory policies",
    "cardcage_fleet.admission": "Admission",
    "cardcage_migrate.disks": "Migration",
}


VERBS = {
    "device": "DeviceOffer",
    "accelerator": "AcceleratorOffer",
    "platform": "PlatformOffer",
    "boot": "BootOffer",
    "backend": "BackendOffer",
    "memory": "MemoryOffer",
    "security": "SecurityOffer",
    "policy_key": "PolicyKeyOffer",
    "flag": "FlagOffer",
    "command": "CommandOffer",
    "doctor": "DoctorOffer",
    "verb": "VerbOffer",
}


def plain(text: str | None) -> str:
    """A docstring as Markdown: roles and double backquotes become code."""
    import re

    text = textwrap.dedent(inspect.cleandoc(text or ""))
    text = re.sub(r":(?:\w+:)?\w+:`~?(?:[\w.]*\.)?([\w]+)`", r"`\1`", text)
    return text.replace("``", "`")


def signature(node: ast.FunctionDef) -> str:
    """``name(arguments) -> result`` as written, without self."""
    arguments = ast.unparse(node.args).removeprefix("self, ").removeprefix("self").removeprefix("/, ")
    arguments = arguments.removeprefix("/")
    result = ast.unparse(node.returns) if node.returns is not None else "None"
    return f"{node.name}({arguments}) -> {result}"


def members(node: ast.ClassDef) -> list[str]:
    """Attributes and methods of a protocol, each with what is said about it."""
    lines = []
    for at, item in enumerate(node.body):
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            after = node.body[at + 1] if at + 1 < len(node.body) else None
            said = ""
            if (
                isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
                and isinstance(after.value.value, str)
            ):
                said = f": {' '.join(plain(after.value.value).split())}"
            lines.append(f"- `{item.target.id}: {ast.unparse(item.annotation)}`{said}")
        elif isinstance(item, ast.FunctionDef):
            property_ = any(isinstance(one, ast.Name) and one.id == "property" for one in item.decorator_list)
            name = f"{item.name}: {ast.unparse(item.returns)}" if property_ and item.returns else signature(item)
            said = plain(ast.get_docstring(item))
            lines.append(f"- `{name}`" + (f"\n{textwrap.indent(said, '  ')}" if said else ""))
    return lines


def protocols() -> str:
    """docs/protocols.md."""
    parts = [
        "# Protocols",
        "",
        "What cards implement and what they are given: small `typing.Protocol`s, no base classes. Generated from the",
        "code by `docs/reference.py`. Abilities of a device beyond `read` and `write` are found once, when it is",
        "plugged in, by method names *and* signatures; `cardcage cards -v` lists what was found.",
        "",
        "All callbacks of a device run under its machine's lock, on whichever thread (a vCPU's, or the machine's loop",
        "thread), and never wait for a vCPU. What the guest does wrong is logged, never raised.",
        "",
    ]
    for module, title in PROTOCOLS.items():
        package, _, name = module.partition(".")
        shelf = "core" if package == "cardcage" else "plugins"
        tree = ast.parse((ROOT / shelf / package / f"{name}.py").read_text())
        parts += [f"## {title} (`{module}`)", ""]
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "Protocol" for base in node.bases):
                parts += [f"### {node.name}", "", plain(ast.get_docstring(node)), "", *members(node), ""]
    return "\n".join(parts)


def hooks() -> str:
    """docs/hooks.md."""
    tree = ast.parse((CORE / "hookspecs.py").read_text())
    parts = [
        "# Hooks",
        "",
        "A card is a module (or any object) with functions marked by `cardcage.hookspecs.hookimpl`, announced in the",
        "entry point group `cardcage`. Hooks assemble a host or machine; nothing calls one while a guest runs. They go",
        "through pluggy's own caller: cards loaded later are called earlier, unless a hook is marked `tryfirst` or",
        "`trylast`. What a card takes for a machine it gives back by `machine.defer(callback)`. Generated by",
        "`docs/reference.py`.",
        "",
    ]
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "Hooks":
            for item in node.body:
                if isinstance(item, ast.FunctionDef):
                    said = signature(item).replace("machine: Any", "machine: Machine")  # Any breaks a ring of imports
                    parts += [f"## `{said}`", "", plain(ast.get_docstring(item)), ""]
    parts += ["## What a card offers", "", "Methods of the `registry` that `cardcage_register` is given:", ""]
    import cardcage.registry as registry

    tree = ast.parse((CORE / "registry.py").read_text())
    kinds = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Offer")}
    for verb, kind in VERBS.items():
        offer = getattr(registry, kind)
        words: list[str] = []
        for one in inspect.signature(offer).parameters.values():
            if one.kind is one.KEYWORD_ONLY and "*" not in words:
                words.append("*")
            words += ["options", "shorthand", "needs", "help"] if one.kind is one.VAR_KEYWORD else [one.name]
        parts += [f"- `{verb}({', '.join(words)})`", textwrap.indent(plain(ast.get_docstring(kinds[kind])), "  ")]
    said = plain(ast.get_docstring(kinds["Offer"])).partition("Attributes:")[2]
    parts += ["", "Each offer has:", "", *[f"- {line.strip()}" for line in said.splitlines() if line.strip()]]
    parts += [
        "",
        "Kinds of other cards, each an offer that `registry.add` takes: `cardcage_memory_policies.PolicyOffer`,",
        "`cardcage_fleet.AdmissionOffer`, `cardcage_fleet.ControlOffer`. A card makes a kind of its own by a subclass",
        "of `cardcage.registry.Offer` with a `kind`.",
    ]
    return "\n".join([*parts, ""])


def attributes(cls: Any) -> list[str]:
    """Rows of a table of keys: name, type, default, and the docstring's sentence."""
    said: dict[str, str] = {}
    inside = False
    name = ""
    for line in inspect.cleandoc(cls.__doc__).splitlines():
        if line == "Attributes:":
            inside = True
        elif inside and line.startswith("        "):
            said[name] += " " + line.strip()
        elif inside and ": " in line:
            names, _, text = line.strip().partition(": ")
            for name in names.split(", "):
                said[name] = text
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for one in attrs.fields(cls):
        if one.name in ("place", "options"):
            continue
        default = one.default.factory() if isinstance(one.default, attrs.Factory) else one.default  # type: ignore[arg-type]  # it takes no argument
        shown = "" if default is attrs.NOTHING or default is None else f"`{default!r}`"
        kind = str(one.type).replace("|", "\\|")
        rows.append(f"| `{one.name}` | `{kind}` | {shown} | {plain(said[one.name]).replace('|', chr(92) + '|')} |")
    return rows


def config() -> str:
    """docs/config.md: the static text, and the tables of keys in it."""
    from cardcage.config import DeviceConfig, MachineConfig, MemoryConfig

    text = (HERE / "config.in.md").read_text()
    for name, cls in (("machine", MachineConfig), ("memory", MemoryConfig), ("device", DeviceConfig)):
        text = text.replace(f"<!-- keys of {name} -->", "\n".join(attributes(cls)))
    return text


def cli() -> str:
    """docs/cli.md: the static text, and the help of the built-in commands."""
    from cardcage.host import Host
    from cardcage_cli.program import make_parser

    text = (HERE / "cli.in.md").read_text()
    parser = make_parser(Host(installed=False))
    (commands,) = (one for one in parser._actions if isinstance(one, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        rows = ["| argument | meaning |", "|---|---|"]
        for action in command._actions:
            if action.dest == "help":
                continue
            words = ", ".join(action.option_strings) or action.metavar
            metavar = f" {action.metavar}" if action.option_strings and action.metavar else ""
            rows.append(f"| `{words}{metavar}` | {action.help} |")
        text = text.replace(f"<!-- arguments of {name} -->", "\n".join(rows))
    return text


CALLS = {
    "Verbs": ("plugins/cardcage_agent/verbs.py", ()),
    "Agent": ("plugins/cardcage_agent/verbs.py", ()),
    "Files": ("plugins/cardcage_agent/files.py", ()),
    "Watch": ("plugins/cardcage_agent/watching.py", ()),
    "Popen": ("plugins/cardcage_agent/process.py", ()),
    "Qga": ("plugins/cardcage_agent/qga.py", ()),
    "Machine": ("core/cardcage/machine.py", ("dismantle",)),
    "Console": ("core/cardcage/_machine/console.py", ("claim", "connect", "claimed", "start", "write", "close", "end")),
}
"""Classes of docs/python.md, where they are, and those of their calls that are for others than a machine's user."""
MAKERS = {
    "debian": "plugins/cardcage_boot/debian.py",
    "host_root": "plugins/cardcage_boot/debian.py",
    "image": "plugins/cardcage_cloudinit/image.py",
}
"""Ways to make a machine, and where they are."""
DEFAULTS = {"SILENCE": "30", "PATIENCE": "60", "LIMIT": "256 << 20", "ENTRIES": "1_000_000", "493": "0o755"}
"""Constants in signatures, as a reader wants them."""


def calls(name: str) -> str:
    """The public methods and properties of a class, each with its docstring."""
    place, others = CALLS[name]
    (node,) = (one for one in ast.parse((ROOT / place).read_text()).body if getattr(one, "name", "") == name)
    assert isinstance(node, ast.ClassDef)
    said = plain(ast.get_docstring(node))
    methods = [
        one
        for one in node.body
        if isinstance(one, ast.FunctionDef)
        and not one.name.startswith("_")
        and one.name not in others
        and not any(ast.unparse(decorator) == "overload" for decorator in one.decorator_list)
    ]
    for one in methods:
        pairs = zip(one.args.kwonlyargs, one.args.kw_defaults, strict=True)
        shown = [(key, default) for key, default in pairs if not key.arg.startswith("_")]
        one.args.kwonlyargs, one.args.kw_defaults = [key for key, _ in shown], [default for _, default in shown]
    node.body = [*methods]
    text = "\n".join([said, "", *members(node)]).replace("(: Any, ", "(").replace("(cls, ", "(")
    for word, value in DEFAULTS.items():
        text = text.replace(f"={word}", f"={value}")
    return text


def classes(place: str) -> str:
    """The public classes of a module, each with its docstring."""
    tree = ast.parse((ROOT / place).read_text())
    found = [one for one in tree.body if isinstance(one, ast.ClassDef)]
    return "\n".join(f"- `{one.name}`\n{textwrap.indent(plain(ast.get_docstring(one)), '  ')}" for one in found)


def python() -> str:
    """docs/python.md: the static text, and every call of a machine and of its agent."""
    text = (HERE / "python.in.md").read_text()
    for name in CALLS:
        text = text.replace(f"<!-- calls of {name} -->", calls(name))
    for name, place in MAKERS.items():
        tree = ast.parse((ROOT / place).read_text())
        (made,) = (one for one in tree.body if isinstance(one, ast.FunctionDef) and one.name == name)
        made.args.args = [one for one in made.args.args if one.arg != "cls"]
        text = text.replace(f"<!-- calls of {name} -->", f"`{signature(made)}`\n\n{plain(ast.get_docstring(made))}")
    for name, place in (("errors", "plugins/cardcage_agent/errors.py"), ("outcome", "core/cardcage/outcome.py")):
        text = text.replace(f"<!-- classes of {name} -->", classes(place))
    return text


PAGES = {"protocols.md": protocols, "hooks.md": hooks, "config.md": config, "cli.md": cli, "python.md": python}


def main() -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for name, make in PAGES.items():
        text, path = make(), HERE / name
        if not path.exists() or path.read_text() != text:
            stale.append(name)
            if not check:
                path.write_text(text)
    if check and stale:
        print(f"run python docs/reference.py: stale: {', '.join(stale)}", file=sys.stderr)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
