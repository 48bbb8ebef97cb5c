"""``cardcage completion`` and ``cardcage man``: made from the parser, with the commands and flags of all cards."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cardcage.errors import ConfigError, MissingExtra

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cardcage.host import Host

__all__ = ["configure_completion", "configure_man", "pages", "run_completion", "run_man"]

SHELLS = ("bash", "zsh", "fish")
MACHINES = "cardcage ps -q 2> /dev/null"
OF_MACHINES = (
    "stop",
    "shutdown",
    "kill",
    "pause",
    "resume",
    "inspect",
    "console",
    "exec",
    "logs",
    "stats",
    "cdrom",
    "device",
)
"""Commands whose NAME is a machine's."""
FILES, FOLDERS = ("FILE", "PATH", "VM.toml", "IMAGE"), ("DIR", "FOLDER")
STATUSES = (
    ("0", "the guest powered off, or the command did what it was asked"),
    ("odd", "debug exit of the guest: code << 1 | 1"),
    ("2", "bad configuration or arguments, or denied"),
    ("10", "the guest panicked"),
    ("12", "the guest crashed by a triple fault"),
    ("70", "a card, the accelerator or the host failed"),
    ("124", "timeout"),
    ("128 + N", "ended by signal N"),
)


def parser_of(host: Host) -> argparse.ArgumentParser:
    """The parser, with each command's arguments."""
    from cardcage_cli.program import make_parser

    return make_parser(host, whole=True)


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of a parser's commands, by name."""
    return next((dict(one.choices) for one in parser._actions if isinstance(one, argparse._SubParsersAction)), {})


# completion


def configure_completion(parser: argparse.ArgumentParser) -> None:
    """The argument."""
    parser.add_argument("shell", choices=SHELLS, help="the shell that it is for")


def run_completion(host: Host, arguments: argparse.Namespace) -> int:
    """Print a shell's completions of ``cardcage``, names of machines included. Raises MissingExtra."""
    try:
        import shtab
    except ImportError as error:
        raise MissingExtra("completion: needs: pip install 'cardcage[completion]'") from error
    parser = parser_of(host)
    for name, command in subcommands(parser).items():
        for action in (one for made in (command, *subcommands(command).values()) for one in made._actions):
            choices = {**dict.fromkeys(FILES, shtab.FILE), **dict.fromkeys(FOLDERS, shtab.DIRECTORY)}
            if name in OF_MACHINES and not action.option_strings:
                choices["NAME"] = shtab.cmd(MACHINES)
            if action.metavar in choices:
                action.complete = choices[action.metavar]  # type: ignore[attr-defined]  # shtab's way
    print(shtab.complete(parser, shell=arguments.shell))
    return 0


# manual pages


def configure_man(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("topic", metavar="COMMAND", nargs="?", default="", help="the command; by default cardcage(1)")
    parser.add_argument("--directory", metavar="DIR", type=Path, help="write all pages there, such as .../man/man1")


def run_man(host: Host, arguments: argparse.Namespace) -> int:
    """Show a page, print it where this is no terminal, or write all."""
    made = pages(parser_of(host))
    if arguments.directory is not None:
        try:
            arguments.directory.mkdir(parents=True, exist_ok=True)
            for name, text in made.items():
                (arguments.directory / f"{name}.1").write_text(text)
        except OSError as error:
            raise ConfigError(f"{error.filename}: {error.strerror}", file="--directory") from error
        print(f"{len(made)} pages in {arguments.directory}")
        return 0
    name = f"cardcage-{arguments.topic}" if arguments.topic else "cardcage"
    if name not in made:
        known = ", ".join(one.removeprefix("cardcage-") for one in made if one != "cardcage")
        raise ConfigError(f'no command "{arguments.topic}". Known: {known}', file="man")
    if sys.stdout.isatty() and shutil.which("man"):
        return subprocess.run(["man", "-l", "-"], input=made[name], text=True, check=False).returncode
    print(made[name], end="")
    return 0


def pages(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Name, without ``.1``, to text of each page: one for the program, and one for each command."""
    commands = subcommands(parser)
    listed = next(one for one in parser._actions if isinstance(one, argparse._SubParsersAction))
    about = {one.dest: one.help or "" for one in listed._choices_actions}
    rows = [line for name in commands for line in (".TP", rf"\fBcardcage\-{roff(name)}\fR(1)", words(about[name]))]
    end = [".SH EXIT STATUS", *(line for one, text in STATUSES for line in (".TP", rf"\fB{one}\fR", words(text)))]
    end += [
        ".SH FILES",
        ".TP",
        r"\fI$XDG_RUNTIME_DIR/cardcage\fR",
        "machines that run, and the logs of those left running",
    ]
    top = "machine monitor in which everything that does something is a card"
    found = {"cardcage": page("cardcage", top, parser, [".SH COMMANDS", *rows, *end])}
    for name, command in commands.items():
        more = [".SH SEE ALSO", r"\fBcardcage\fR(1)"]
        found[f"cardcage-{name}"] = page(f"cardcage-{name}", about[name], command, more)
    return found


def page(name: str, about: str, parser: argparse.ArgumentParser, more: list[str]) -> str:
    """A page in roff, of man(7)'s macros."""
    from cardcage import __version__

    usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
    lines = [
        f'.TH "{name.upper()}" "1" "" "cardcage {__version__}" "cardcage"',
        ".SH NAME",
        f"{roff(name)} \\- {words(about)}",
    ]
    lines += [".SH SYNOPSIS", words(usage)]
    lines += list(options(parser, ".SH"))
    for sub, inner in subcommands(parser).items() if name != "cardcage" else ():
        lines += [f".SH {roff(sub.upper())}", words(" ".join(inner.format_usage().removeprefix("usage: ").split()))]
        if inner.description:
            lines += [".PP", words(inner.description)]
        lines += list(options(inner, ".SS"))
    return "\n".join([*lines, *more, ""])


def options(parser: argparse.ArgumentParser, macro: str) -> Iterator[str]:
    """The arguments of a parser, group by group."""
    for group in parser._action_groups:
        shown = [one for one in group._group_actions if one.help != argparse.SUPPRESS]
        shown = [one for one in shown if not isinstance(one, argparse._SubParsersAction)]
        if not shown:
            continue
        yield f"{macro} {roff((group.title or 'options').upper())}"
        for action in shown:
            value = action.metavar or ("|".join(map(str, action.choices)) if action.choices else "")
            shape = "" if action.nargs == 0 else str(value or (action.dest if not action.option_strings else ""))
            flags = ", ".join(rf"\fB{roff(one)}\fR" for one in action.option_strings)
            yield ".TP"
            yield " ".join(part for part in (flags, rf"\fI{roff(shape)}\fR" if shape else "") if part)
            yield words((action.help or "").replace("%%", "%"))


def roff(text: str) -> str:
    """*text* with what roff takes for its own escaped."""
    return text.replace("\\", r"\e").replace("-", r"\-")


def words(text: str) -> str:
    """A line of text, which roff must not take for a request."""
    line = roff(re.sub(r"\s+", " ", text).strip())
    return rf"\&{line}" if line[:1] in (".", "'") else line
