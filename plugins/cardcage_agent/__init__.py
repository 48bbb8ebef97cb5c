"""Card ``agent``: a small agent of our own in the guest, and the verbs that it gives a machine.

::

    from cardcage_agent import Machine

    with Machine.debian(memory="512M") as vm:
        vm.start()
        print(vm.run("uname -a", text=True).stdout)

``cardcage.Machine`` has the same verbs, which type checkers do not see there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.hookspecs import hookimpl
from cardcage.lazy import lazy_names
from cardcage_boot import GuestProgramOffer

if TYPE_CHECKING:
    from cardcage.machine import Machine as PlainMachine
    from cardcage.registry import Registry

    from cardcage_agent.errors import AgentError, AgentTimeout, NoAgent, ProtocolError
    from cardcage_agent.files import FileInfo, Files
    from cardcage_agent.process import Popen
    from cardcage_agent.verbs import Agent, Machine
    from cardcage_agent.watching import FileEvent, Watch

__all__ = [
    "Agent",
    "AgentError",
    "AgentTimeout",
    "FileEvent",
    "FileInfo",
    "Files",
    "Machine",
    "NoAgent",
    "Popen",
    "ProtocolError",
    "Watch",
]

PORT = "org.cardcage.agent.0"
DEVICE = {"type": "virtio-console", "id": "agent", "char": "null", "ports": [{"name": PORT, "char": "agent"}]}
VERBS = {
    "agent": "the agent itself: ping, set_time, reseed, freeze",
    "aio": "the calls that wait, for await",
    "files": "files of the guest: read, write, list, stat, rename, remove, mkdir",
    "run": "run a command in the guest, as subprocess.run",
    "popen": "start a command in the guest, as subprocess.Popen",
    "put": "copy a file or a directory into the guest",
    "get": "copy a file or a directory out of the guest",
    "ssh_config": "OpenSSH's configuration for the guest, which needs no network",
}


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer the back end of the agent's port, the program for the guest, and the verbs."""
    registry.backend("char", "agent", "cardcage_agent.link:open_link", help="the host's end of the guest agent's port")
    registry.backend(
        "char", "qemu-agent", "cardcage_agent.qga:open_qga", help="the host's end of the port of QEMU's guest agent"
    )
    registry.add(
        GuestProgramOffer(
            "agent", "cardcage_agent.program:program", devices=(DEVICE,), help="runs commands and moves files"
        )
    )
    registry.verb("qga", "cardcage_agent.verbs:Verbs.qga", help="QEMU's guest agent, where the guest runs that")
    for name, text in VERBS.items():
        registry.verb(name, f"cardcage_agent.verbs:Verbs.{name}", help=text)


@hookimpl
def cardcage_built(machine: PlainMachine) -> None:
    """Tell the link when the machine ends, so that nobody waits for its guest any longer."""
    for link in [machine.services[name] for name in ("agent", "qga") if name in machine.services]:
        from cardcage_agent.ending import watch

        watch(machine, link)


__getattr__ = lazy_names(
    "cardcage_agent",
    errors="AgentError AgentTimeout NoAgent ProtocolError",
    files="FileInfo Files",
    process="Popen",
    verbs="Agent Machine",
    watching="FileEvent Watch",
)
