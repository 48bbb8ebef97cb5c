"""Commands of a machine's life, and those that look at its memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal

from cardcage.machine import Machine, State
from cardcage.memory import GuestMemoryError
from cardcage.security import OPERATOR, Act

from cardcage_qmp.control import Expiry
from cardcage_qmp.errors import QmpError
from cardcage_qmp.session import Session
from cardcage_qmp.walk import translate

__all__ = [
    "cont",
    "inject_nmi",
    "memsave",
    "pmemsave",
    "quit",
    "set_action",
    "stop",
    "system_powerdown",
    "system_reset",
]

PIECE = 1 << 20
"""Bytes that are read at once, and a page more."""


def quit(session: Session) -> None:
    """End the machine."""
    control = session.control
    control.quitted.set()
    control.began.set()
    if (device := control.kept()) is not None:
        device.end()
    session.machine.stop("quit")


def stop(session: Session) -> None:
    """Pause; nothing where it does not run."""
    machine = session.machine
    if machine.state is State.RUNNING or machine.waiting:
        machine.pause()
    elif machine.state is State.STOPPED:
        raise ended(machine)


def cont(session: Session) -> None:
    """Go on after a pause, or start a machine that waits for this."""
    machine = session.machine
    if (who := session.control.elsewhere) is not None and machine.state in (State.BUILT, State.PAUSED):
        who.cont()
    elif machine.state is State.PAUSED:
        if session.control.kept() is not None:
            raise QmpError("Resetting the Virtual Machine is required: the guest powered itself off")
        machine.resume()
    elif machine.state is State.BUILT:
        if session.control.held:
            session.control.held = False
            session.control.began.set()  # who has the machine starts it, on a thread of its own
            session.control.ran.wait(60)
    elif machine.state is State.STOPPED:
        raise ended(machine)


def ended(machine: Machine) -> QmpError:
    """The error about a machine that has ended."""
    return QmpError(f"Resetting the Virtual Machine is required: {machine.outcome or 'it failed'}")


def system_reset(session: Session) -> None:
    """Reset."""
    machine = session.machine
    if machine.state is State.BUILT:
        return  # nothing ran: it is as after a reset
    if machine.state is State.STOPPED:
        raise ended(machine)
    session.control.because("host-qmp-system-reset")
    machine.reset()


def system_powerdown(session: Session) -> None:
    """Press the power button."""
    session.machine.shutdown()
    session.control.emit("POWERDOWN")


def set_action(
    session: Session,
    reboot: Literal["reset", "shutdown"] | None = None,
    shutdown: Literal["poweroff", "pause"] | None = None,
    panic: Literal["pause", "shutdown", "exit-failure", "none"] | None = None,
    watchdog: Expiry | None = None,
) -> None:
    """The action upon something that the guest did: what the machine was made for; ``shutdown`` and ``watchdog`` at any
    time.

    A machine that pauses at its end is there, with its memory, until it is told to quit.
    """
    config = session.machine.config.machine
    made = {
        "reboot": (reboot, "shutdown" if config.on_reset == "stop" else "reset"),
        "panic": (panic, "shutdown" if config.on_panic == "stop" else "none"),
    }
    for name, (wanted, there) in made.items():
        if wanted is not None and wanted != there:
            raise QmpError(f"Parameter '{name}' is '{there}' for as long as this machine lives")
    if watchdog is not None:
        session.control.set_expiry(watchdog)
    if shutdown is not None:
        session.control.keep(shutdown == "pause")


def inject_nmi(session: Session) -> None:
    """An NMI to each processor."""
    machine = session.machine
    if machine.state not in (State.RUNNING, State.PAUSED):
        raise QmpError(f"the machine is {machine.state}")
    for vcpu in machine.vcpus:
        machine.inject_nmi(vcpu.index)


def pmemsave(session: Session, val: int, size: int, filename: str) -> None:
    """Write guest-physical memory to a file."""
    _save(session, val, size, filename, lambda address: address)


def memsave(session: Session, val: int, size: int, filename: str, cpu_index: int = 0) -> None:
    """Write memory to a file, by the addresses of a processor that does not run."""
    machine = session.machine
    if not 0 <= cpu_index < len(machine.vcpus):
        raise QmpError(f"Parameter 'cpu-index' expects a CPU number, 0 to {len(machine.vcpus) - 1}")
    if machine.state is State.RUNNING:
        raise QmpError("registers can be read while the machine is paused: stop it first")
    state = machine.vcpus[cpu_index].get_state()
    _save(session, val, size, filename, lambda address: translate(machine.memory, state, address))


def _save(session: Session, address: int, size: int, filename: str, physical: Callable[[int], int | None]) -> None:
    machine = session.machine
    if size < 0 or address < 0 or address + size > 1 << 64:
        raise QmpError("Parameter 'size' expects a range of addresses")
    if size > machine.config.machine.memory:
        raise QmpError(f"Parameter 'size' expects at most the machine's memory, {machine.config.machine.memory}")
    machine.mediator.ask(
        Act(OPERATOR, machine.label, "image", ("create", "write"), {"path": filename, "machine": machine.name}),
        filename,
    )
    pieces: list[tuple[int, int]] = []
    while size:
        length = min(size, 4096 - address % 4096)
        try:
            where = physical(address)
            if where is None or not machine.memory.contains(where, length):
                raise QmpError(f"Invalid addr 0x{address:x} specified")
            before, held = pieces[-1] if pieces else (0, 0)
            if 0 < held < PIECE and before + held == where and machine.memory.contains(before, held + length):
                pieces[-1] = before, held + length
            else:
                pieces.append((where, length))
        except GuestMemoryError as error:
            raise QmpError(f"Invalid addr 0x{address:x} specified") from error
        address, size = address + length, size - length
    fd = os.open(filename, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        for where, length in pieces:
            try:
                file.write(machine.memory.read(where, length))
            except GuestMemoryError as error:
                raise QmpError(f"Invalid addr 0x{where:x} specified") from error
