"""Word to the service manager (sd_notify(3)): the machine runs, or ends. Its socket is connected before the jail."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

from cardcage.machine import State
from cardcage.security import HOST, OPERATOR, Act

if TYPE_CHECKING:
    from cardcage.machine import Machine

__all__ = ["VARIABLE", "notify"]

VARIABLE = "NOTIFY_SOCKET"


def notify(machine: Machine) -> None:
    """Tell ``$NOTIFY_SOCKET`` of *machine* from now on; a log line says where nobody can be told.

    Raises Denied.
    """
    address = os.environ[VARIABLE]
    machine.mediator.ask(Act(OPERATOR, HOST, "socket", ("connect",)), f"unix:{address}")
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        peer.connect(f"\0{address[1:]}" if address.startswith("@") else address)
    except OSError as error:
        peer.close()
        machine.log.warning("the service manager cannot be told", socket=address, problem=error.strerror)
        return
    name, began = machine.name, False

    def told(state: State) -> None:
        nonlocal began
        word = {State.RUNNING: "runs", State.PAUSED: "is paused", State.STOPPED: "has ended"}.get(state)
        if word is None:
            return
        lines = [f"STATUS=machine {name} {word}"]
        if state is State.RUNNING and not began:
            began = True
            lines.append("READY=1")
        elif state is State.STOPPED:
            lines.append("STOPPING=1")
        with suppress(OSError):  # it does not listen any more
            peer.send("\n".join(lines).encode())

    machine.observers.add("state", told)
    machine.defer(peer.close)
