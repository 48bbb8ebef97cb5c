"""``cardcage new card NAME``: the command line, and the names that it refuses."""

from __future__ import annotations

import keyword
import re
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from cardcage.errors import ConfigError

from cardcage_new.kinds import KINDS
from cardcage_new.skeleton import write

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from cardcage.host import BrokenCard, CardInfo, Host

    from cardcage_new.kinds import Kind

__all__ = ["configure", "run"]

LONGEST = 64
BUILT_IN = ("run", "cards", "doctor")
"""Commands that no card offers."""


def configure(parser: ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("what", choices=("card",), help="the word card")
    parser.add_argument("name", metavar="NAME", help="name of the card and its folder: lower case, digits, hyphens")
    parser.add_argument("--kind", choices=tuple(KINDS), default="device", help="what the card offers (device)")


def run(host: Host, arguments: Namespace) -> int:
    """Write the card and print the commands that come next. Raises ConfigError, and leaves nothing behind then."""
    name, kind = arguments.name, KINDS[arguments.kind]
    check_name(name)
    if Path(name).exists() or Path(name).is_symlink():
        raise ConfigError(f'"{name}" exists already; choose another name or another folder to work in')
    check_free(host, name, kind)
    files = write(Path(name), arguments.kind, name)
    print(f"{name}: {kind.about}, in {len(files)} files")
    for file in files:
        print(f"    {name}/{file}")
    print("next:")
    for line in (f"pip install -e './{name}[test]'", f"pytest {name}", Template(kind.use).substitute(name=name)):
        print(f"    {line}")
    return 0


def check_name(name: str) -> None:
    """Refuse what cannot name a distribution, a package and an offer alike. Raises ConfigError."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name, re.ASCII) or len(name) > LONGEST:
        shown = " ".join(name.split())  # an error is one line
        what = f'at most {LONGEST} lower case letters, digits and single hyphens, such as "status-lamp"'
        raise ConfigError(f'"{shown}" cannot name a card: expected {what}')
    if keyword.iskeyword(name) or keyword.issoftkeyword(name):
        raise ConfigError(f'"{name}" cannot name a card: it is a word of Python')


def check_free(host: Host, name: str, kind: Kind) -> None:
    """Refuse a name that would hide something that is installed. Raises ConfigError."""
    package = name.replace("-", "_")
    known: list[CardInfo | BrokenCard] = [*host.cards, *host.broken]
    for card in known:
        if card.name == name:
            raise ConfigError(f'"{name}" is taken: a card of {card.distribution} has that name')
    word, offered = kind.offers[0], Template(kind.offers[1]).substitute(name=name)
    for offer in host.registry:
        if (offer.kind, offer.name) == (word, offered):
            raise ConfigError(f'"{name}" is taken: card {offer.card} ({offer.distribution}) offers {word} {offered}')
    if word == "command" and name in BUILT_IN:
        raise ConfigError(f'"{name}" is taken: cardcage has a command of that name')
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
    else:
        raise ConfigError(f'"{name}" is taken: a distribution of that name is installed ({version})')
    if package in sys.stdlib_module_names or find_spec(package) is not None:
        raise ConfigError(f'"{name}" is taken: Python imports another package as {package}')
