"""``cardcage migrate`` and ``cardcage incoming``."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from cardcage.errors import ConfigError, HostError
from cardcage.machine import Machine
from cardcage.units import Duration, Size, say_size
from cardcage_cli import SWITCH_INTERVAL, run_machine, timeout_of
from cardcage_fleet import command, converse, find
from cardcage_fleet.session import Kind

from cardcage_migrate.incoming import Arrival, Incomplete
from cardcage_migrate.reach import connect, parse
from cardcage_migrate.relay import relayed

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from cardcage.host import Host

    from cardcage_migrate.reach import Waiting

__all__ = ["configure", "configure_incoming", "run", "run_incoming"]

ACTS = ("cancel", "show", "recover")
URI = "unix:PATH, tcp:HOST:PORT, exec:COMMAND, fd:NUMBER or file:PATH"
DAY = 24 * 3600.0


def configure(parser: ArgumentParser) -> None:
    """Add the arguments of ``cardcage migrate``."""
    parser.add_argument("machine", metavar="NAME", help=f"the machine; or one of {', '.join(ACTS)}, and then its name")
    parser.add_argument("uri", metavar="URI", help=f"where to: {URI}")
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
    place, entry = parse(arguments.uri), find(arguments.machine)
    limits: dict[str, Any] = {"strategy": arguments.timeout_strategy, "throttle": not arguments.no_throttle}
    for key, kind in (("bandwidth", Size), ("downtime", Duration), ("timeout", Duration)):
        if (text := getattr(arguments, key)) is not None:
            try:
                limits[key] = int(kind(text)) if kind is Size else float(kind(text))
            except ValueError as error:
                raise ConfigError(str(error), key=f"--{key}") from error
    peer, one_way = connect(place, arguments.tls_dir, arguments.tls_hostname)
    channel: Any = relayed(peer) if arguments.tls_dir is not None else peer  # type: ignore[arg-type]  # TLS gave it
    if one_way:
        print("nothing can come back on this: the machine stands still here then, until it is ended", file=sys.stderr)
    told: dict[str, Any] = {}
    with converse(entry, "migrate", {"uri": str(place), "limits": limits}, DAY, fds=[channel.fileno()]) as session:
        channel.close() if place.scheme != "exec" else None
        while (frame := session.receive()) is not None and frame.kind is Kind.DATA:
            with suppress(ValueError):
                told = json.loads(frame.data)
                _show(told, arguments.json)
        if not arguments.json and sys.stderr.isatty():
            print(file=sys.stderr)
        over = frame is None and told.get("status") == "completed"  # it ended before it could say so
        found = told if over else session.result(frame)
    if place.scheme == "exec":
        peer.close()
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
    if told.get("throttle"):
        parts.append(f"vCPUs held up {told['throttle']} %")
    print("\r\x1b[K" + ", ".join(parts), end="", file=sys.stderr, flush=True)


def _act(act: str, arguments: Namespace) -> int:
    found = command(find(arguments.uri), "migrate-act", {"act": act})
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
