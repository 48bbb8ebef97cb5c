"""``cardcage``: parse, do, and turn errors into one line and an exit status."""

from __future__ import annotations

import gc
import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cardcage._config.places import Place
from cardcage.errors import CardError
from cardcage.registry import CommandOffer

from cardcage_cli.arguments import (
    add_boot_arguments,
    add_common_arguments,
    add_machine_arguments,
    draft_of,
    place_of_code,
    plain,
    timeout_of,
)
from cardcage_cli.early import VARIABLE, early_security
from cardcage_cli.leaving import detach
from cardcage_cli.running import STRAYS, SWITCH_INTERVAL, report, run_machine, threads_watched
from cardcage_cli.streams import open_standard_streams

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Iterable, Iterator, Sequence

    from cardcage.host import CardInfo, Host

    from cardcage_cli.ending import Ending

__all__ = ["make_parser", "run_program"]


def run_program(argv: Sequence[str], cards: Iterable[Any], ending: Ending) -> int:
    """Parse the words *argv*, do what they say, and return the exit status; *ending* has the signals."""
    open_standard_streams(alone=ending.alone)
    words = list(argv)
    if os.environ.get(VARIABLE):
        words = ["--security", os.environ[VARIABLE], *words]  # one that was given comes later, and counts
    traceback = "--traceback" in words
    cards_found: list[CardInfo] = []
    strays: list[BaseException] = []
    try:
        from cardcage.host import Host
        from cardcage.security import HOST, OPERATOR, Act

        security = early_security(words)
        ending.taking = bool(security)  # its card may write; all others only register
        with threads_watched(strays), Host(cards, security=security, owns_process=ending.alone) as host:
            ending.taking = True
            cards_found = host.cards
            host.signals.ending = ending.held
            for signum in ending.signals:
                host.signals.claim(signum, ending.arrived)
            host.share(STRAYS, lambda: strays)
            try:
                arguments = parsed(make_parser(host), words, host)
                host.log_sink.level = getattr(arguments, "log_level", host.log_sink.level)
                host.log_sink.json = getattr(arguments, "log_json", False)
                host.mediator.ask(Act(OPERATOR, HOST, "management", ("command",)), arguments.command_name)
                if ending.alone:
                    gc.freeze()  # else the first collection looks through all that was imported
                    gc.enable()
                status = int(arguments.command(host, arguments))
                sys.stdout.flush()
            finally:
                ending.over()
            if strays:
                raise strays[0]
            return status
    except BrokenPipeError:  # "cardcage cards | head": nobody reads on, which is no failure of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Told as error:  # argparse: help (0) or a wrong argument (2)
        if error.status:
            print("outcome: bad configuration: see the lines above", file=sys.stderr)
        return error.status
    except BaseException as error:  # the one place where errors become words
        return report(error, traceback=traceback, cards=cards_found)


class Told(Exception):
    """The arguments were answered by argparse, which has said what is to be said."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(status)


def parsed(parser: ArgumentParser, words: Sequence[str], host: Host) -> Namespace:
    """Parse *words*. Raises Told where argparse itself ends the program, with what broken cards may have to do with it.

    Also for a card's command, whose argparse has the same ways; what else ends it is the card's own ``sys.exit``.
    """
    try:
        return parser.parse_args(words)
    except SystemExit as error:
        if not by_argparse(error):
            raise
        sys.stdout.flush()  # what cannot be written is told like any other error
        for one in host.broken if error.code else ():
            print(f"cardcage: {one}", file=sys.stderr)
        raise Told(int(error.code or 0)) from error


def by_argparse(error: SystemExit) -> bool:
    """True when argparse raised it: for help, a version, or a wrong argument."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and frame.tb_frame.f_globals.get("__name__") == "argparse"


def make_parser(host: Host, *, whole: bool = False) -> ArgumentParser:
    """The parser with the built-in and the registered commands.

    Args:
        whole: with the arguments of each card's command, which are added when it is parsed else.
    """
    import argparse

    from cardcage import __version__

    from cardcage_cli.later import Formatter, LaterParser

    parser = argparse.ArgumentParser(
        prog="cardcage",
        description="A virtual machine monitor in which everything that does something is a card.",
        allow_abbrev=False,
        formatter_class=Formatter,
    )
    parser.add_argument("--version", action="version", version=f"cardcage {__version__}")
    add_common_arguments(parser)
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=LaterParser, prog=parser.prog)

    def command(name: str, help: str, run: Any) -> LaterParser:
        made = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        made.then(lambda made: made.set_defaults(command=run, command_name=name, host=host))
        made.then(add_common_arguments)
        return made

    command("run", "run a machine described in TOML, by arguments, or both", run_command).then(_add_run_arguments)
    cards = command(
        "cards", "list the installed cards, their distributions, and whether each is usable here", cards_command
    )
    cards.then(
        lambda made: made.add_argument(
            "-v", "--verbose", action="store_true", help="show everything that each card offers"
        )
    )
    command("doctor", "check what this host supports, and suggest commands that enable the rest", doctor_command)
    for name in host.registry.names(CommandOffer):
        offer = host.registry.get(CommandOffer, name)
        _registered(command, offer, whole=whole)
    return parser


def _add_run_arguments(run: ArgumentParser) -> None:
    run.add_argument(
        "file", metavar="VM.toml", nargs="*", help="configuration file; later files are merged into earlier files"
    )
    add_boot_arguments(run)
    add_machine_arguments(run)


def _registered(command: Any, offer: CommandOffer, *, whole: bool) -> None:
    """A card's command; its modules are imported only when its own arguments are parsed, or the *whole* is wanted."""

    def run(host: Host, arguments: Namespace) -> int:
        function = offer.load()
        status = function(host, arguments)
        if type(status) is not int or not 0 <= status <= 255:
            what = f"gave {status!r}, expected its exit status, 0 to 255{place_of_code(function)}"
            raise CardError(f"{offer.who}: {what}")
        return status

    parser = command(offer.name, plain(offer.help), run)
    if offer.configure is None:
        return
    parse = parser.parse_known_args

    def configured() -> None:
        configure = offer.imported(offer.configure)
        Place().blamed(offer.who, lambda: configure(parser))

    if whole:
        configured()
        return

    def parse_known_args(args: Any = None, namespace: Any = None, **more: Any) -> Any:
        configured()
        parser.parse_known_args = parse
        return parse(args, namespace, **more)

    parser.parse_known_args = parse_known_args


@contextmanager
def uncollected(host: Host) -> Iterator[None]:
    """Keep the collector of cycles from what a process of our own imports and builds, now and later, because it stays:
    looking through all of it again and again is a twelfth of the start."""
    if not host.owns_process:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def run_command(host: Host, arguments: Namespace) -> int:
    """``cardcage run VM.toml``, or ``cardcage run --kernel FILE``."""
    from cardcage.errors import ConfigError

    if not arguments.file and arguments.boot_kernel is None:
        raise ConfigError("nothing to run: give a VM.toml, or a kernel with --kernel")
    if (status := detach(host, arguments)) is not None:
        return status
    sys.setswitchinterval(SWITCH_INTERVAL)
    timeout = timeout_of(arguments)
    with uncollected(host):
        from cardcage.machine import Machine

        config = draft_of(arguments, *arguments.file).config()
        machine = Machine.from_config(config, host=host)
    if machine.name != config.machine.name:
        print(f"name: {machine.name} (another machine is {config.machine.name})", file=sys.stderr, flush=True)
    print(f"accelerator: {machine.accelerator.why}", file=sys.stderr, flush=True)
    return run_machine(machine, timeout=timeout)


def cards_command(host: Host, arguments: Namespace) -> int:
    """``cardcage cards``."""
    from cardcage_cli.listing import list_cards

    return list_cards(host, verbose=arguments.verbose)


def doctor_command(host: Host, _: Namespace) -> int:
    """``cardcage doctor``."""
    from cardcage_cli.doctor import examine

    return examine(host)
