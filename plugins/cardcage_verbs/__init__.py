"""Card ``verbs``: what people do with machines that run: list, stop, pause, look at, log in, and leave them running.

Each verb is a command of the command line, and a command that a running machine takes by its control socket
(:mod:`cardcage_fleet.control`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from cardcage.hookspecs import hookimpl
from cardcage.registry import Offer
from cardcage_fleet import ControlOffer, SessionOffer

if TYPE_CHECKING:
    from cardcage.machine import Machine
    from cardcage.registry import Registry

COMMANDS = {
    "ps": "list the machines that run",
    "stop": "end machines: by their power button, and hard after a time",
    "shutdown": "press the power button of machines",
    "kill": "end machines at once, as pulling the plug does",
    "pause": "bring machines to a stand",
    "resume": "let paused machines go on",
    "inspect": "show all about a machine that runs",
    "console": "attach this terminal to a machine's console",
    "exec": "run a command in a machine's guest, by the agent there",
    "logs": "show what a machine wrote on its console, and what was said of it",
    "completion": "print completions for a shell: of commands, flags, files and names of machines",
    "man": "show the manual pages, or write them",
}
MODULES = {
    "ps": "listing",
    "console": "console",
    "exec": "execute",
    "logs": "logs",
    "completion": "shell",
    "man": "shell",
}
CONTROLS = ("stop", "shutdown", "kill", "pause", "resume", "inspect")


class ProcessOffer(Offer):
    """The keys of ``[policy.process]``, a table of the machine's own process."""

    kind: ClassVar[str] = "process"


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer the commands, what machines do at them, and the back end ``char:log``."""
    for name, text in COMMANDS.items():
        place = f"cardcage_verbs.{MODULES.get(name, 'acts')}"
        registry.command(name, f"{place}:run_{name}", configure=f"{place}:configure_{name}", help=text)
    for name in CONTROLS:
        registry.add(ControlOffer(name, f"cardcage_verbs.machine:{name}", help=COMMANDS[name]))
    registry.policy_key("process", help="cpus, nice and cgroup of the machine's process")
    registry.add(ProcessOffer("process", None, options="cardcage_verbs.process:ProcessOptions"))
    registry.add(SessionOffer("console", "cardcage_verbs.machine:console", help="the console: its output, and typing"))
    registry.add(SessionOffer("exec", "cardcage_verbs.running:execute", help="a command in the guest"))
    registry.backend(
        "char",
        "log",
        "cardcage_verbs.keep:open_log",
        options="cardcage_verbs.keep:LogOptions",
        shorthand="cardcage_verbs.keep:parse_path",
        help="a file of a bounded size: begun anew when it is full, with the one before beside it",
    )


@hookimpl(tryfirst=True)  # the roster says which control group it is in
def cardcage_admit(machine: Machine) -> None:
    """Give the machine's process its CPUs, niceness and control group."""
    if "process" in machine.config.policy:
        from cardcage_verbs.process import apply

        apply(machine)


@hookimpl(tryfirst=True)  # the console is connected before others look at it
def cardcage_built(machine: Machine) -> None:
    """Give the words and the console of a machine that is left running (``--detach``) a file; tell systemd of it."""
    import os

    from cardcage_cli import detaching

    if (leaving := detaching(machine.host)).asked:
        from cardcage_verbs.keep import keep_log

        keep_log(machine, leaving)
    if machine.host.owns_process and os.environ.get("NOTIFY_SOCKET"):
        from cardcage_verbs.notify import notify

        notify(machine)
