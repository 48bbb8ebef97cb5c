"""Whose fault it is: each card here makes one mistake, and the real command line says in one line whose and where."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from attrs import fields, frozen
from cardcage._host.owners import card_of
from cardcage.config import DeviceConfig
from cardcage.host import CardInfo, Host
from cardcage.ram import Placement
from cardcage.registry import CommandOffer, DeviceOffer, FlagOffer, MemoryOffer
from cardcage_cli.program import make_parser
from strangers import Shop

WANTED = '[[device]]\ntype = "bad"\n'
RUN = ("run", "vm.toml")

DEVICE = """
{more}
class Device:
    def __init__(self{takes}):
        {init}
    def plug(self, slot, /):
        self.slot = slot
        {plug}
    def read(self, offset, size, /):
        {read}
        return 0
    def write(self, offset, size, value, /): ...
@hookimpl
def cardcage_register(registry):
    registry.device("bad", Device, regions=(Pio(4, 0x90),){options})
"""
COMMAND = """
{more}
def run(host, arguments):
    {run}
def configure(parser):
    {configure}
@hookimpl
def cardcage_register(registry):
    registry.command("hello", run, configure=configure)
"""
HOOK = """
{more}
@hookimpl
def cardcage_register(registry):
    {register}
@hookimpl
def cardcage_built(machine):
    {built}
"""
CHECKER = """
class Checker:
    def __init__(self):
        {init}
    def check(self, act, /):
        {check}
@hookimpl
def cardcage_register(registry):
    registry.security("acme", Checker)
"""


def device(**parts: str) -> str:
    """A device card with these statements in it."""
    takes = {"takes": ", options", "options": ", options=O"} if "class O" in parts.get("more", "") else {}
    return DEVICE.format(**{**STILL, **takes, **parts})


def other(form: str, **parts: str) -> str:
    """A card of another form."""
    return form.format(**{**STILL, **parts})


STILL = {
    **dict.fromkeys("init plug read run configure register built check".split(), "pass"),
    **dict.fromkeys("more takes options".split(), ""),
}


@frozen
class Case:
    """A mistake, and what is said of it.

    Attributes:
        code: the card's. said: parts of the line, beside who and where. at: text of the card's line that is named.
        toml: more of the machine. words: the command. status: its status.
    """

    code: str
    said: tuple[str, ...]
    at: str
    toml: str = WANTED
    words: tuple[str, ...] = RUN
    status: int = 70
    entry: str = ""


HELLO: dict[str, Any] = {"toml": "", "words": ("hello",)}
QUIET: dict[str, Any] = {"toml": "", "status": 1}
ACME: dict[str, Any] = {"toml": "", "entry": "acme = card1"}
OPTION = "@frozen\nclass O:\n    size: {} = 1"
THREAD = "import threading; t = threading.Thread(target=lambda: 1 // 0); t.start(); t.join()"

CASES = {
    "a part of the slot used wrongly": Case(
        device(read="self.slot.ranges.mappings(7)"), ("card failure: card card1",), "mappings(7)"
    ),
    "UsageError of its own": Case(device(read="raise UsageError('mine')"), ("UsageError: mine",), "'mine'"),
    "StateError while plugged in": Case(device(plug="raise StateError('mine')"), ("StateError: mine",), "'mine'"),
    "UsageError in a hook": Case(
        other(HOOK, built="machine.observers.add('nix', print)"), ('no event "nix"',), "'nix'", toml=""
    ),
    "StateError of a command's machine": Case(
        other(COMMAND, more="from cardcage.machine import Machine", run="Machine(host=host, accel='tcg').wait()"),
        ("StateError: nothing to wait for",),
        ".wait()",
        **HELLO,
    ),
    "options of no attrs class": Case(
        device(more="class O:\n    size: int = 1"), ("expected an attrs class", "got O"), "class O", WANTED + "size = 2"
    ),
    "an annotation that does not resolve": Case(
        device(more=OPTION.format("'Sise'")), ('the annotation "Sise" does not resolve',), "size: ", WANTED + "size = 2"
    ),
    "one below": Case(
        device(more="@frozen\nclass I:\n    size: 'Sise' = 1\n@frozen\nclass O:\n    inner: list[I] = []"),
        ('the annotation "Sise" does not resolve',),
        "size: ",
        WANTED + "inner = [{size = 2}]",
    ),
    "a type that no value becomes": Case(
        device(more=OPTION.format("range")), ("becomes a range: expected bool, int",), "size: ", WANTED + "size = 2"
    ),
    "a validator that breaks": Case(
        device(more="def check(*_):\n    1 // 0\n@frozen\nclass O:\n    size: int = field(default=1, validator=check)"),
        ("ZeroDivisionError",),
        "1 // 0",
        WANTED + "size = 2",
    ),
    "a KeyError that is no missing key": Case(
        device(more=f"{OPTION.format('int')}\n    def __attrs_post_init__(self):\n        {{}}['x']"),
        ("KeyError: 'x'",),
        "{}['x']",
        WANTED + "size = 2",
    ),
    "an option with a machine key's name": Case(
        device(more="@frozen\nclass O:\n    port: int = 1"), ('option "port" of O: expected another name',), "port: int"
    ),
    "sys.exit in a device": Case(
        device(read="import sys; sys.exit('bye')"), ("sys.exit('bye'): expected an exception or",), "'bye'"
    ),
    "sys.exit while plugged in": Case(device(plug="raise SystemExit(0)"), ("sys.exit(0): expected",), "SystemExit(0)"),
    "sys.exit in a constructor": Case(device(init="raise SystemExit(3)"), ("sys.exit(3): expected",), "SystemExit(3)"),
    "sys.exit in a hook": Case(other(HOOK, built="raise SystemExit(0)"), ("sys.exit(0): expected",), "(0)", toml=""),
    "sys.exit in a command": Case(
        other(COMMAND, run="raise SystemExit(0)"), ("sys.exit(0): expected",), "(0)", **HELLO
    ),
    "a command that returns None": Case(
        other(COMMAND), ("gave None, expected its exit status, 0 to 255",), "def run", **HELLO
    ),
    "a command that returns 300": Case(other(COMMAND, run="return 300"), ("gave 300, expected",), "def run", **HELLO),
    "a conflicting -h": Case(
        other(COMMAND, configure="parser.add_argument('-h')"), ("conflicting option string: -h",), "'-h'", **HELLO
    ),
    "arguments that break": Case(other(COMMAND, configure="1 // 0"), ("ZeroDivisionError",), "1 // 0", **HELLO),
    "a command of our name": Case(
        other(HOOK, register="registry.command('run', print)"), ("expected another name",), "'run'", **QUIET
    ),
    "a flag of our name": Case(
        other(HOOK, register="registry.flag('--memory', dict)"), ("expected another name",), "'--memory'", **QUIET
    ),
    "a flag that is no flag": Case(
        other(HOOK, register="registry.flag('x', dict)"), ("expected a name like --",), "'x'", **QUIET
    ),
    "a flag that raises": Case(
        other(HOOK, register="registry.flag('--half', lambda text: {}[text])"),
        ('flag "--half"', "KeyError: 'x'"),
        "lambda",
        "",
        (*RUN, "--half", "x"),
    ),
    "a flag that gives None": Case(
        other(HOOK, register="registry.flag('--half', lambda text: None)"),
        ("gave None for 'x', expected a table",),
        "lambda",
        "",
        (*RUN, "--half", "x"),
    ),
    "a security card that raises": Case(
        other(CHECKER, check="1 // 0"),
        ("security card acme", "ZeroDivisionError"),
        "1 // 0",
        words=("--security", "acme", "boot", "--help"),
        **ACME,
    ),
    "one that cannot be made": Case(
        other(CHECKER, init="1 // 0"),
        ('security "acme"', "ZeroDivisionError"),
        "1 // 0",
        words=("--security", "acme", *RUN),
        **ACME,
    ),
    "one that breaks later": Case(
        other(CHECKER, check="act.tclass == 'memory' and 1 // 0"),
        ("ZeroDivisionError",),
        "1 // 0",
        words=("--security", "acme", *RUN),
        **ACME,
    ),
    "a broken card that is wanted": Case("raise RuntimeError('no luck')", ("RuntimeError: no luck",), "luck", status=2),
    "a broken card that is not wanted": Case("raise RuntimeError('no luck')", ("no luck",), "luck", **QUIET),
    "a card with a misspelt import": Case("import nothere", ("No module named 'nothere'",), "nothere", **QUIET),
    "a card that is no Python": Case("def x(:", ("SyntaxError",), "def x(:", **QUIET),
    "a broken card's command": Case("1 // 0", ("ZeroDivisionError",), "1 // 0", words=("hello",), status=2, toml=""),
    "a broken card's flag": Case("1 // 0", ("Zero",), "1 // 0", words=(*RUN, "--half", "x"), status=2, toml=""),
    "an unmarked hook": Case(
        "def cardcage_register(registry): ...", ("expected @cardcage.hookspecs.hookimpl above",), "def card", **QUIET
    ),
    "a name that is taken": Case(
        other(HOOK, register="registry.device('virtio-blk', dict)"),
        ("already offered by card virtio (cardcage ", "expected a name of its own"),
        "'virtio-blk'",
        **QUIET,
    ),
    "a thread while the machine is built": Case(device(plug=THREAD), ("ZeroDivisionError",), "1 // 0"),
    "a thread before": Case(other(HOOK, register=THREAD), ("ZeroDivisionError",), "1 // 0", toml=""),
    "a thread of a command": Case(
        other(COMMAND, run=f"{THREAD}; return 0"), ("ZeroDivisionError",), "1 // 0", toml="", words=("hello",)
    ),
    "sys.exit at import": Case("raise SystemExit(0)", ("sys.exit(0): expected",), "raise SystemExit", status=2),
    "sys.exit when it registers": Case(
        other(HOOK, register="raise SystemExit(0)"), ("sys.exit(0): expected",), "raise SystemExit", **QUIET
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_cards_mistake_is_told_in_a_line(tmp_path: Path, case: Case) -> None:
    """One line has the card, its distribution, file and line, and what was expected; the status is not 0."""
    shop = Shop(tmp_path)
    file = shop.card("card1", case.code, entry=case.entry)
    shop.machine(case.toml)
    number = next(at for at, line in enumerate(file.read_text().splitlines(), 1) if case.at in line)
    result = shop.run(*case.words)
    assert result.status == case.status, result.err
    assert "Traceback" not in "".join(result.err)
    (line,) = [one for one in result.err if "card1 1.0" in one]
    for part in (f"{file}:{number}", *case.said):
        assert part in line
    assert len(line) < 600  # nobody reads on
    assert result.outcome == result.err[-1]


def test_a_card_without_a_hook_is_named(tmp_path: Path) -> None:
    """A module with no hook at all is told at boot, with its file and what was expected."""
    shop = Shop(tmp_path)
    file = shop.card("card1", "x = 1")
    shop.machine()
    result = shop.run(*RUN)
    assert result.status == 1
    assert f"no hook in it: expected cardcage_register, marked by @hookimpl ({file})" in result.err[0]


def test_a_commands_own_words_are_its_users(tmp_path: Path) -> None:
    """What a card's command says of its arguments, by UsageError or argparse, is told to the user, with status 2."""
    shop = Shop(tmp_path)
    shop.card("card1", other(COMMAND, run="raise UsageError('no such thing: expected a thing')"))
    result = shop.run("hello")
    assert (result.status, result.err) == (2, ["outcome: wrong use: no such thing: expected a thing"])
    shop.card("card1", other(COMMAND, configure="parser.add_argument('number', type=int)"))
    result = shop.run("hello", "x")
    assert (result.status, result.err[-1]) == (2, "outcome: bad configuration: see the lines above")
    assert "invalid int value" in result.err[-2]


def test_percent_signs_are_plain_in_help(tmp_path: Path) -> None:
    """A card's help is text: "50% of it" breaks no `--help`."""
    shop = Shop(tmp_path)
    shop.card(
        "card1",
        other(HOOK, register="registry.flag('--half', dict, help='50% off'); registry.command('x', dict, help='%d')"),
    )
    assert any("50% off" in one for one in shop.run("run", "--help").out)
    assert any("%d" in one for one in shop.run("--help").out)


def test_a_dataclass_is_a_class_of_options_too(tmp_path: Path) -> None:
    """Options may be a dataclass: a table is checked against it as against an attrs class."""
    more = "from dataclasses import dataclass\n@dataclass\nclass O:\n    size: int = 1"
    shop = Shop(tmp_path)
    shop.card("card1", device(more=more))
    shop.machine(WANTED + "sise = 2\n")
    assert shop.run(*RUN).outcome.endswith('vm.toml: device[1].sise: no such key. Did you mean "size"?')
    shop.machine(WANTED + 'size = "x"\n')
    assert shop.run(*RUN).outcome.endswith('device[1].size: expected a whole number, got "x"')


def test_the_command_lines_own_names_are_known() -> None:
    """The names that no card can have are the parser's, and the keys that no option can have are the kernel's."""
    parser = make_parser(Host(installed=False))
    commands = parser._subparsers._group_actions[0].choices  # type: ignore[union-attr, index]
    assert set(commands) == CommandOffer.ours  # type: ignore[arg-type]
    found = {text for one in (parser, *commands.values()) for text in one._option_string_actions}  # type: ignore[union-attr]
    assert {one for one in found if one.startswith("--")} - {"--verbose"} == FlagOffer.ours
    assert DeviceOffer.keys == {one.name for one in fields(DeviceConfig)} - {"options", "place"}
    assert MemoryOffer.keys == {"type", *(one.name for one in fields(Placement))}


def test_cards_of_one_package_are_told_apart() -> None:
    """Of two cards side by side in a package, the one whose module shares most with the frame's is blamed."""
    code = "def act(): raise ValueError('no')"
    modules = {}
    for name in ("acme.one", "acme.two", "acme.two.part"):
        module = type(sys)(name)
        exec(code, module.__dict__)
        modules[name] = module
    cards = [CardInfo(name[-3:], "acme 1.0", modules[name]) for name in ("acme.one", "acme.two")]
    for name, card in (("acme.one", "one"), ("acme.two", "two"), ("acme.two.part", "two")):
        with pytest.raises(ValueError, match="no") as caught:
            modules[name].act()
        found = card_of(caught.value, cards)
        assert found is not None
        assert found.name == card
