"""Both ends: the machine's, on a thread of its own, and the caller's."""

import threading
from argparse import ArgumentParser, Namespace
from typing import Any

from cardcage.host import Host
from cardcage.machine import Machine, State
from cardcage.units import Duration
from cardcage_fleet import Session, converse, find
from cardcage_fleet.session import Kind


def beat(machine: Machine, arguments: dict[str, Any], session: Session) -> dict[str, Any]:
    """Send a line for each beat, until there were enough, the caller is gone or the machine has ended."""
    rate = 1 / arguments["every"]  # the mistake: 0 is a number of seconds, too
    gone = threading.Event()
    session.begin(rate=rate)
    session.listen(lambda frame: None, gone.set)
    beats = 0
    while beats < arguments["count"] and machine.state != State.STOPPED and not gone.wait(1 / rate):
        beats += 1
        session.send(Kind.DATA, f"{machine.name} {machine.state} {beats}\n".encode())
    return {"beats": beats}


def configure(parser: ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("name", metavar="NAME", help="a running machine")
    parser.add_argument("--every", metavar="TIME", default="1s", help="time between two beats")
    parser.add_argument("--count", metavar="N", type=int, default=1 << 31, help="how many beats")


def run(host: Host, arguments: Namespace) -> int:
    """Print each beat."""
    asked = {"every": float(Duration(arguments.every)), "count": arguments.count}
    with converse(find(arguments.name), "pulse", asked) as talk:
        while (frame := talk.receive()) is not None and frame.kind is Kind.DATA:
            print(frame.data.decode(), end="", flush=True)
        print(f"{talk.result(frame)['beats']} beats at {talk.told['rate']:g} Hz")
    return 0
