"""``cardcage sandbox``: make, list, use and end sandboxes, and serve them."""

from __future__ import annotations

import sys
import time
from subprocess import TimeoutExpired
from typing import TYPE_CHECKING

from cardcage.errors import UsageError
from cardcage.units import Duration, say_size

from cardcage_sandbox.client import Sandbox
from cardcage_sandbox.template import Template, load_template, stop_templates

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Callable
    from typing import TextIO

    from cardcage.host import Host

__all__ = ["add_template", "configure", "create", "run"]

NOT_FOUND, LATE = 127, 124
"""Statuses for a program that is not there, and for a command whose time is over."""


def configure(parser: ArgumentParser) -> None:
    """The arguments."""
    acts = parser.add_subparsers(dest="act", metavar="ACT", required=True)
    create = acts.add_parser("create", help="make a sandbox, and print its name")
    add_template(create)
    create.add_argument("--timeout", metavar="TIME", default="5m", help="how long it lives (5m)")
    create.add_argument("--metadata", metavar="NAME=VALUE", action="append", default=[], help="may be repeated")
    acts.add_parser("list", help="the sandboxes that there are")
    run = acts.add_parser("run", help="run a command in a sandbox, or in a new one that ends with it")
    add_template(run)
    run.add_argument("--in", dest="id", metavar="ID", help="the sandbox")
    run.add_argument("--timeout", metavar="TIME", default="60s", help="how long the command may take (60s)")
    run.add_argument("--user", "-u", metavar="USER", help="the guest's user")
    run.add_argument("words", metavar="COMMAND", nargs="+", help="the command, behind --; one word is for a shell")
    keep = acts.add_parser("snapshot", help="keep a sandbox as it is, for create --snapshot")
    keep.add_argument("id", metavar="ID", help="the sandbox")
    keep.add_argument("where", metavar="SNAPSHOT", help="name of the snapshot, or a path with a slash")
    keep.add_argument("--replace", action="store_true", help="replace one that is there")
    kill = acts.add_parser("kill", help="end sandboxes")
    kill.add_argument("ids", metavar="ID", nargs="+", help="their names")
    acts.add_parser("stop", help="end all sandboxes, and the templates' processes")
    serve = acts.add_parser("serve", help="an HTTP face for the e2b SDK")
    serve.add_argument("--host", metavar="ADDRESS", default="127.0.0.1", help="where to listen (127.0.0.1)")
    serve.add_argument("--port", metavar="PORT", type=int, default=3000, help="likewise (3000); 0 for any")
    serve.add_argument("--key-file", metavar="FILE", help="the key; else CARDCAGE_SANDBOX_KEY, or a new one")
    serve.add_argument("--template", metavar="FILE", action="append", default=[], help="besides base; may be repeated")
    serve.add_argument("--debug", action="store_true", help="a sandbox for whoever asks, on port 49983 (E2B_DEBUG)")


def add_template(parser: ArgumentParser) -> None:
    """The arguments that say of what a sandbox is made."""
    parser.add_argument("--template", metavar="FILE", default="base", help="base, or a TOML file")
    for name, text in (("memory", "size of its RAM"), ("disk", "size of its files, which are in the RAM")):
        parser.add_argument(f"--{name}", metavar="SIZE", help=text)
    parser.add_argument("--cpus", metavar="COUNT", type=int, help="virtual processors")
    parser.add_argument("--root", metavar="PATH", help="its root: a directory, a tar archive or an OCI image layout")
    parser.add_argument(
        "--snapshot", metavar="SNAPSHOT", help="what a sandbox of this template was kept as: it goes on"
    )
    parser.add_argument(
        "--egress",
        metavar="WHERE",
        action="append",
        help="a name or addresses that it may reach: pypi.org, *.pythonhosted.org, 10.1.0.0/16:5432; may be repeated",
    )


def run(host: Host, arguments: Namespace) -> int:
    """Do what is asked for."""
    match arguments.act:
        case "create":
            print(create(arguments, arguments.timeout, dict(_pair(one) for one in arguments.metadata)).id)
        case "list":
            _list()
        case "run":
            return _run(arguments)
        case "snapshot":
            made = Sandbox.connect(arguments.id).snapshot(arguments.where, replace=arguments.replace)
            print(f"{made.path}: {say_size(made.stored)}")
        case "kill":
            found = [Sandbox.connect(one) for one in arguments.ids]
            ended = [one.kill() for one in found]
            return 0 if all(ended) else 1
        case "stop":
            stop_templates()
        case "serve":
            from cardcage_sandbox.serving import serve

            known = [Template(), *(load_template(one) for one in arguments.template)]
            return serve(arguments, {one.name: one for one in known})
    return 0


def create(arguments: Namespace, timeout: str, metadata: dict[str, str] | None = None) -> Sandbox:
    """A sandbox as the arguments of :func:`add_template` have it."""
    limits = {name: getattr(arguments, name) for name in ("memory", "disk", "cpus", "root", "egress", "snapshot")}
    return Sandbox.create(arguments.template, timeout=timeout, metadata=metadata, **limits)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise UsageError(f'--metadata: expected NAME=VALUE, got "{text}"')
    return name, value


def _list() -> None:
    rows = [("ID", "TEMPLATE", "STATE", "AGE", "LEFT", "MEMORY", "METADATA")]
    now = time.time()
    for one in Sandbox.list():
        pairs = ",".join(f"{name}={value}" for name, value in one.metadata.items())
        ages = f"{now - one.started:.0f}s", f"{max(one.ends - now, 0):.0f}s"
        rows.append((one.id, one.template, one.state, *ages, say_size(one.memory), ascii(pairs)[1:-1]))
    widths = [max(len(row[at]) for row in rows) for at in range(6)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[6]]).rstrip())


def _run(arguments: Namespace) -> int:
    try:
        timeout = float(Duration(arguments.timeout))
    except ValueError as error:
        raise UsageError(f"--timeout: {error}") from error
    words = arguments.words[0] if len(arguments.words) == 1 else arguments.words
    sandbox = Sandbox.connect(arguments.id) if arguments.id else create(arguments, f"{min(timeout + 60, 86400)}s")
    try:
        with sandbox.commands.run(words, background=True, user=arguments.user, timeout=timeout) as command:
            done = command.wait(on_stdout=_writer(sys.stdout), on_stderr=_writer(sys.stderr))
    except TimeoutExpired:
        print(f"cardcage: the command took more than {timeout:g} s, and was killed", file=sys.stderr)
        return LATE
    except OSError as error:
        print(f"cardcage: {error.filename}: {error.strerror}", file=sys.stderr)
        return NOT_FOUND
    finally:
        if not arguments.id:
            sandbox.kill()
    return done.exit_code if done.exit_code >= 0 else 128 - done.exit_code


def _writer(stream: TextIO) -> Callable[[str], object]:
    def write(text: str) -> None:
        stream.write(text)
        stream.flush()

    return write
