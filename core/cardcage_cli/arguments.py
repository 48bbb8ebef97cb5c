"""Arguments that describe a machine, the same for each command that makes a machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cardcage._config.places import Place
from cardcage.errors import CardError, ConfigError
from cardcage.registry import FlagOffer

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from cardcage.config import Draft
    from cardcage.host import Host

__all__ = ["add_boot_arguments", "add_common_arguments", "add_machine_arguments", "draft_of", "timeout_of"]


def add_common_arguments(parser: ArgumentParser) -> None:
    """``--log-level --log-json --traceback --security``."""
    import argparse

    group = parser.add_argument_group("diagnosis")
    levels = ("debug", "info", "warning", "error")
    group.add_argument("--log-level", choices=levels, default=argparse.SUPPRESS, help="lowest level to write to stderr")
    group.add_argument("--log-json", action="store_true", default=argparse.SUPPRESS, help="write logs as JSON lines")
    group.add_argument(
        "--traceback", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    group.add_argument(
        "--security",
        metavar="CARD",
        default=argparse.SUPPRESS,
        help="security card to ask for permission, such as default; short for --set policy.security=CARD",
    )


def add_boot_arguments(parser: ArgumentParser) -> None:
    """``--kernel --initrd --append``: keys of ``[boot]``, for a machine that needs no file of its own."""
    group = parser.add_argument_group("boot")
    group.add_argument("--kernel", metavar="FILE", dest="boot_kernel", help="bzImage, PVH or Multiboot kernel")
    group.add_argument(
        "--initrd",
        metavar="FILE",
        dest="boot_initrd",
        action="append",
        help="initrd, or Multiboot module with its arguments; may be repeated",
    )
    group.add_argument("--append", metavar="TEXT", dest="boot_append", help="the kernel's command line")


def add_machine_arguments(parser: ArgumentParser) -> None:
    """``--name --set --accel --memory --cpus --timeout --detach``, and the flags that cards registered.

    The parser of a registered command has its host as the default ``host``.
    """
    group = parser.add_argument_group("machine")
    group.add_argument("--name", metavar="NAME", help="name of the machine, for listings, logs and its MAC addresses")
    group.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="assignments",
        help="set a configuration key: machine.cpus=4, device.root.readonly=true",
    )
    group.add_argument("--accel", metavar="NAME[,NAME]", help="accelerators to try, in this order")
    group.add_argument("--memory", "-m", metavar="SIZE", help="RAM, such as 512M or 2G")
    group.add_argument("--cpus", metavar="N", help="number of virtual processors")
    group.add_argument(
        "--timeout", metavar="TIME", help="stop after this time, such as 60, 90s or 5m (exit status 124)"
    )
    group.add_argument(
        "--detach", "-d", action="store_true", help="return once the machine runs, print its name, and leave it running"
    )
    host = parser.get_default("host")
    if host is None:
        return
    shorthands = parser.add_argument_group("shorthands")
    for offer in sorted(host.registry.offers(FlagOffer), key=lambda one: one.name):
        name = offer.name
        if name in parser._option_string_actions:  # the command's own argument, which counts in that command
            continue
        shorthands.add_argument(
            name,
            metavar=offer.metavar,
            action="append",
            default=[],
            dest=f"flag:{name}",
            help=plain(offer.help),
        )


def plain(text: str) -> str:
    """*text* as argparse shows it: a percent sign is nothing special in a card's help."""
    return text.replace("%", "%%")


def draft_of(arguments: Namespace, *files: Any) -> Draft:
    """A draft: *files* first, then the registered flags, the named arguments and ``--set``. Raises ConfigError."""
    from cardcage.config import Draft

    draft = Draft()
    for path in files:
        draft.add_file(path)
    for name, texts in vars(arguments).items():
        if not name.startswith("flag:") or not texts:
            continue
        flag = name.removeprefix("flag:")
        offer = arguments.host.registry.get(FlagOffer, flag)
        for text in texts:
            draft.add(_fragment(offer, text, Place(f"{flag} {text}"), arguments.host), origin=f"{flag} {text}")
    if arguments.name is not None:
        draft.add({"machine": {"name": arguments.name}}, origin="--name")
    if arguments.accel is not None:
        draft.add({"machine": {"accel": [one for one in arguments.accel.split(",") if one]}}, origin="--accel")
    if arguments.memory is not None:
        draft.add({"machine": {"memory": arguments.memory}}, origin="--memory")
    if arguments.cpus is not None:
        cpus = arguments.cpus
        number = cpus.isascii() and cpus.isdigit() and len(cpus) < 20
        draft.add({"machine": {"cpus": int(cpus) if number else cpus}}, origin="--cpus")
    for key in ("kernel", "initrd", "append"):
        if (value := getattr(arguments, f"boot_{key}", None)) is not None:
            draft.add({"boot": {key: value}}, origin=f"--{key}")
    if (security := getattr(arguments, "security", None)) is not None:
        draft.add({"policy": {"security": security}}, origin="--security")
    for text in arguments.assignments:
        draft.set(text)
    for spec in draft.security() if arguments.host is not None else ():
        if spec not in arguments.host.security:
            raise spec.place.error(
                "a security card is loaded before all others: name it in a file that ends in .toml, or by --security"
            )
    return draft


def _fragment(offer: FlagOffer, text: str, place: Place, host: Host) -> dict[str, Any]:
    """What a flag's *text* stands for. Raises ConfigError, or CardError for what is wrong with the flag itself."""
    parse = offer.load()
    try:
        found = place.blamed(offer.who, lambda: parse(text, host) if offer.asks else parse(text))
    except ConfigError as error:
        raise host.blame(error) from error.__cause__
    except CardError as error:
        if isinstance(error.__cause__, ValueError):
            raise place.error(str(error.__cause__)) from error
        raise
    if not isinstance(found, dict):
        raise CardError(f"{offer.who}: gave {found!r} for {text!r}, expected a table{place_of_code(parse)}")
    return found


def place_of_code(function: Any) -> str:
    """`` (in FUNCTION, FILE:LINE)`` of a function of Python's; empty for anything else."""
    code = getattr(function, "__code__", None)
    return f" (in {code.co_name}, {code.co_filename}:{code.co_firstlineno})" if code is not None else ""


def timeout_of(arguments: Namespace) -> float | None:
    """``--timeout`` in seconds. Raises ConfigError."""
    if arguments.timeout is None:
        return None
    from cardcage.units import Duration

    try:
        return Duration(arguments.timeout)
    except ValueError as error:
        raise ConfigError(str(error), file="--timeout") from error
