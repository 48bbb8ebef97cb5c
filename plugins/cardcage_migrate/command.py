"""``cardcage migrate`` and ``cardcage incoming``."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from cardcage.errors import ConfigError, HostError, UsageError
from cardcage.machine import Machine
from cardcage.units import Duration, Size, say_size
from cardcage_cli import SWITCH_INTERVAL, run_machine, timeout_of
from cardcage_fleet import command, converse, find
from cardcage_fleet.session import Kind

from cardcage_migrate.incoming import Arrival, Incomplete
from cardcage_migrate.limits import MODES
from cardcage_migrate.reach import Program, connect, parse
from cardcage_migrate.relay import relayed, relayed_later

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from cardcage.host import Host
    from cardcage_fleet import RosterEntry

    from cardcage_migrate.reach import Place, Waiting

__all__ = ["configure", "configure_incoming", "run", "run_incoming"]

ACTS = ("cancel", "show", "recover", "postcopy")
URI = "unix:PATH, tcp:HOST:PORT, exec:COMMAND, fd:NUMBER or file:PATH"
DAY = 24 * 3600.0


def configure(parser: ArgumentParser) -> None:
    """Add the arguments of ``cardcage migrate``."""
    parser.add_argument("machine", metavar="NAME", help=f"the machine; or one of {', '.join(ACTS)}, and then its name")
    parser.add_argument("uri", metavar="URI", help=f"where to: {URI}")
    parser.add_argument("again", metavar="URI", nargs="?", help="recover: where to connect, for memory that is missing")
    parser.add_argument(
        "--mode",
        choices=MODES,
        default="precopy",
        help="memory first (precopy), the guest first (postcopy), or the guest once that takes too long (hybrid)",
    )
    parser.add_argument("--postcopy", action="store_const", const="postcopy", dest="mode", help="--mode postcopy")
    parser.add_argument("--bandwidth", metavar="SIZE", help="bytes a second, while the guest runs (100M)")
    parser.add_argument("--downtime", metavar="TIME", help="how long the guest may stand still: 300ms by default")
    parser.add_argument("--timeout", metavar="TIME", help="until that has to be possible: 1h by default")
    parser.add_argument(
        "--timeout-strategy",
        choices=("cancel", "force"),
        default="cancel",
        help="then give it up, or let the guest stand still for longer",
    )
    parser.add_argument("--no-throttle", action="store_true", help="do not hold up vCPUs that write too fast")
    parser.add_argument("--tls-dir", metavar="DIR", help="with ca-cert.pem, client-cert.pem and client-key.pem")
    parser.add_argument("--tls-hostname", metavar="NAME", default="", help="name in the destination's certificate")
    parser.add_argument("--json", action="store_true", help="print the end as JSON")


def configure_incoming(parser: ArgumentParser) -> None:
    """Add the arguments of ``cardcage incoming``."""
    parser.add_argument("uri", metavar="URI", help=f"where to wait: {URI}")
    parser.add_argument("--name", help="name of the machine; by default that of the source's")
    parser.add_argument("--accel", action="append", metavar="NAME", help="accelerator to try; may be given again")
    parser.add_argument("--config", metavar="VM.toml", help="the machine's configuration, instead of the source's")
    parser.add_argument("--trust", action="store_true", help="take the configuration of a machine of somebody else's")
    parser.add_argument("--any-cpu", action="store_true", help="go on where the processor lacks features it had")
    parser.add_argument("--tls-dir", metavar="DIR", help="with ca-cert.pem, server-cert.pem and server-key.pem")
    parser.add_argument("--timeout", metavar="TIME", help="end the machine after this time (60s, 5m)")


def run(host: Host, arguments: Namespace) -> int:
    """Carry out ``cardcage migrate``; the process's status. Raises the project's errors."""
    if arguments.machine in ACTS:
        return _act(arguments.machine, arguments)
    if arguments.again is not None:
        raise UsageError(f"{arguments.again}: expected NAME and one URI")
    place, entry = parse(arguments.uri), find(arguments.machine)
    limits: dict[str, Any] = {"strategy": arguments.timeout_strategy, "throttle": not arguments.no_throttle}
    limits["mode"] = arguments.mode
    for key, kind in (("bandwidth", Size), ("downtime", Duration), ("timeout", Duration)):
        if (text := getattr(arguments, key)) is not None:
            try:
                limits[key] = int(kind(text)) if kind is Size else float(kind(text))
            except ValueError as error:
                raise ConfigError(str(error), key=f"--{key}") from error
    command(entry, "migrate-act", {"act": "check", "uri": str(place), "limits": limits})
    with ExitStack() as end:
        ends, one_way = [], False
        one, one_way = _connected(place, arguments, end)
        ends.append(one)
        if arguments.mode != "precopy":  # for the pages
            ends.append(_connected(place, arguments, end, later=True)[0])
        if one_way:
            text = "nothing can come back on this: the machine stands still here then, until it is ended"
            print(text, file=sys.stderr)
        found = _followed(entry, "migrate", {"uri": str(place), "limits": limits}, ends, arguments, end)
    return _told(entry, found, arguments)


def _connected(place: Place, arguments: Namespace, end: ExitStack, *, later: bool = False) -> tuple[Any, bool]:
    """A connection for the machine, which is closed here at the end; *later* somebody is at its other end."""
    if later and arguments.tls_dir is not None:
        made: Any = relayed_later(lambda: connect(place, arguments.tls_dir, arguments.tls_hostname)[0])  # type: ignore[arg-type,return-value]  # TLS gives it
        end.callback(made.close)
        return made, False
    peer, one_way = connect(place, arguments.tls_dir, arguments.tls_hostname)
    channel: Any = relayed(peer) if arguments.tls_dir is not None else peer  # type: ignore[arg-type]  # TLS gave it
    end.callback(channel.close)
    return channel, one_way


def _followed(
    entry: RosterEntry, what: str, words: dict[str, Any], ends: list[Any], arguments: Namespace, end: ExitStack
) -> dict[str, Any]:
    """Give the machine the connections, and show how far it is; the end's words."""
    told: dict[str, Any] = {}
    with converse(entry, what, words, DAY, fds=[one.fileno() for one in ends]) as session:
        if not any(isinstance(one, Program) for one in ends):
            end.close()  # the machine's alone: its end is to be heard
        while (frame := session.receive()) is not None and frame.kind is Kind.DATA:
            with suppress(ValueError):
                told = json.loads(frame.data)
                _show(told, arguments.json)
        if not arguments.json and sys.stderr.isatty():
            print(file=sys.stderr)
        over = frame is None and told.get("status") == "completed"  # it ended before it could say so
        return told if over else dict(session.result(frame))


def _told(entry: RosterEntry, found: dict[str, Any], arguments: Namespace) -> int:
    if arguments.json:
        print(json.dumps(found))
    else:
        cost = f"{say_size(int(found['sent']))} in {float(found['total']):.1f} s"
        stood = f"stood still for {float(found['downtime']) * 1000:.0f} ms"
        print(f"{entry.name}: {found['status']}; {cost}; {stood}")
    return 0


def _show(told: dict[str, Any], quiet: bool) -> None:
    if quiet or not sys.stderr.isatty():
        return
    parts = [
        str(told.get("status")),
        f"pass {told.get('passes')}",
        f"sent {say_size(int(told.get('sent', 0)))}",
        f"left {say_size(int(told.get('remaining', 0)))}",
        f"{say_size(int(told.get('rate', 0)))}/s",
    ]
    if told.get("asked"):
        parts.append(f"{told['asked']} pages waited for")
    if told.get("throttle"):
        parts.append(f"vCPUs held up {told['throttle']} %")
    print("\r\x1b[K" + ", ".join(parts), end="", file=sys.stderr, flush=True)


def _act(act: str, arguments: Namespace) -> int:
    entry = find(arguments.uri)
    if act == "recover":
        found = command(entry, "migrate-act", {"act": "show"})
        if arguments.again is not None or found.get("status") == "postcopy-paused":
            place = parse(arguments.again or str(found.get("uri")))
            with ExitStack() as end:
                channel, _ = _connected(place, arguments, end)
                told = _followed(entry, "migrate-resume", {"uri": str(place)}, [channel], arguments, end)
            return _told(entry, told, arguments)
    elif arguments.again is not None:
        raise UsageError(f"{arguments.again}: expected {act} and NAME")
    found = command(entry, "migrate-act", {"act": act})
    if arguments.json or act == "show":
        print(json.dumps(found, indent=None if arguments.json else 1))
    return 0


def run_incoming(host: Host, arguments: Namespace) -> int:
    """Carry out ``cardcage incoming``; the process's status. Raises the project's errors."""
    timeout = timeout_of(arguments)
    sys.setswitchinterval(SWITCH_INTERVAL)
    arrival = Arrival(
        Machine,
        arguments.uri,
        arguments.name,
        arguments.accel,
        arguments.config,
        arguments.trust,
        arguments.any_cpu,
        host,
        console="stdio",
        may_pause=False,
    )

    def waiting(door: Waiting) -> None:
        port = f" (port {door.port})" if door.place.scheme == "tcp" else ""
        print(f"waiting at {door.place}{port}", file=sys.stderr, flush=True)

    arrival.wait(arguments.tls_dir, None, waiting)
    try:
        machine = arrival.machine()
    except Incomplete as error:
        print(f"cardcage: {error}", file=sys.stderr, flush=True)
        machine = error.machine
        if not arrival.await_recovery():
            machine.dismantle()
            raise HostError(f"{machine.name} was ended before it was recovered") from error
    print(f"name: {machine.name}\naccelerator: {machine.accelerator.why}", file=sys.stderr, flush=True)
    return run_machine(machine, timeout=timeout, console=None)
