"""The machine's end of the verbs: what it does when another process of its user asks.

The door has asked the security checkers whether the operator may reach the machine and give the command; the act itself
(``machine stop`` and so on) is asked about by the machine.
"""

from __future__ import annotations

import json
import os
import threading
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from attrs import asdict
from cardcage.errors import UsageError
from cardcage.machine import State
from cardcage.waiting import Event
from cardcage_fleet.session import Kind

if TYPE_CHECKING:
    from cardcage.machine import Machine
    from cardcage_fleet.session import Frame, Session

__all__ = ["console", "inspect", "kill", "only", "pause", "resume", "shutdown", "stop"]

LOOK = 1.0
"""Seconds between looks whether who reads a console is still there."""
LONGEST = 24 * 3600


def only(arguments: dict[str, Any], **known: type | tuple[type, ...]) -> None:
    """Raises UsageError for an argument that is unknown, or of another type."""
    for name, value in arguments.items():
        if name not in known:
            raise UsageError(f'no such argument: "{name}"; known: {", ".join(known) or "none"}')
        kinds = known[name]
        wanted = kinds if isinstance(kinds, tuple) else (kinds,)
        if type(value) not in wanted:
            raise UsageError(f"{name}: expected {' or '.join(one.__name__ for one in wanted)}")


def ending(machine: Machine) -> dict[str, Any]:
    """How it ended."""
    return {"outcome": str(machine.outcome) if machine.outcome is not None else "by an error"}


def stop(machine: Machine, arguments: dict[str, Any]) -> dict[str, Any]:
    """End it by its power button, and hard after *timeout* seconds."""
    only(arguments, timeout=(int, float))
    timeout = arguments.get("timeout", machine.config.machine.stop_timeout)
    if not 0 <= timeout <= LONGEST:
        raise UsageError(f"timeout: expected 0 to {LONGEST} seconds")
    if machine.state is State.RUNNING:
        machine.shutdown(timeout)
    else:
        machine.stop("asked for by the operator")
    return ending(machine)


def shutdown(machine: Machine, arguments: dict[str, Any]) -> dict[str, Any]:
    """Press the power button."""
    only(arguments)
    machine.shutdown()
    return {}


def kill(machine: Machine, arguments: dict[str, Any]) -> dict[str, Any]:
    """End it now."""
    only(arguments)
    machine.stop("killed by the operator")
    return ending(machine)


def pause(machine: Machine, arguments: dict[str, Any]) -> dict[str, Any]:
    """Bring its vCPUs out of guest code."""
    only(arguments)
    machine.pause()
    return {}


def resume(machine: Machine, arguments: dict[str, Any]) -> dict[str, Any]:
    """Let it go on."""
    only(arguments)
    machine.resume()
    return {}


def inspect(machine: Machine, arguments: dict[str, Any]) -> dict[str, Any]:
    """All about it, as values of JSON."""
    only(arguments)
    config = machine.config
    found = {
        "name": machine.name,
        "pid": os.getpid(),
        "state": str(machine.state),
        "label": machine.label,
        "waiting": dict(machine.waiting),
        "accelerator": {"name": machine.accelerator.name, "why": machine.accelerator.why, "irqchip": machine.irqchip},
        "devices": [
            {"id": one.id, "offer": one.who, "label": one.slot.label, "abilities": sorted(map(str, one.abilities))}
            for one in list(machine.devices.values())
        ],
        "config": {
            "machine": asdict(config.machine),
            "memory": {"type": config.memory.type, **config.memory.options},
            "boot": config.boot,
            "device": [{"type": one.type, "id": one.id, **one.options} for one in config.devices],
            "policy": config.policy,
            "security": {"checkers": [one.name for one in config.security], **config.guards},
        },
    }
    return dict(json.loads(json.dumps(found, default=str)))


# the console

_writers: WeakKeyDictionary[Machine, threading.Lock] = WeakKeyDictionary()
_writers_lock = threading.Lock()


def console(machine: Machine, arguments: dict[str, Any], session: Session) -> dict[str, Any]:
    """Its console: what it writes goes to the caller, and what the caller types to the guest.

    Any number read; one writes. Who reads slower than the guest writes misses what is older than the last MiB, and is
    told how much. *history* bytes of what was written before come first; without *follow*, nothing comes behind them.
    """
    only(arguments, write=bool, history=int, follow=bool)
    if not machine.console.claimed and machine.state is not State.STOPPED:
        raise UsageError(f"{machine.name}: no device of the machine has the console")
    with _writers_lock:
        writing = _writers.setdefault(machine, threading.Lock())
    write = bool(arguments.get("write"))
    if write and not writing.acquire(blocking=False):
        raise UsageError(f"{machine.name}: somebody else types on the console: read it only, or wait")
    try:
        return _read(machine, arguments, session, write)
    finally:
        if write:
            writing.release()


def _read(machine: Machine, arguments: dict[str, Any], session: Session, write: bool) -> dict[str, Any]:
    gone = Event()

    def heard(frame: Frame) -> None:
        if frame.kind is Kind.DATA and write:
            machine.console.send(frame.data)
        elif frame.kind is Kind.RESIZE and write and len(frame.data) == 4:
            resized(machine, int.from_bytes(frame.data[:2], "little"), int.from_bytes(frame.data[2:], "little"))

    now, kept = machine.console.read(0, 0)
    session.begin()
    session.listen(heard, gone.set)
    first = kept[-arguments["history"] :] if arguments.get("history", 0) > 0 else b""
    if first:
        session.send(Kind.DATA, first)
    while arguments.get("follow", True) and not gone.is_set():
        before, (now, data) = now, machine.console.read(now, LOOK)
        if lost := now - before - len(data):
            session.send(Kind.DATA, f"\r\n[{lost} bytes of the console were not read in time]\r\n".encode())
        if data:
            session.send(Kind.DATA, data)
        elif machine.state is State.STOPPED:
            break
    # The end of the machine shuts the session too, and may be noticed first.
    return ending(machine) if arguments.get("follow", True) and machine.state is State.STOPPED else {}


def resized(machine: Machine, rows: int, columns: int) -> None:
    """Tell the guest the size of the terminal behind its console, where the console's device can (virtio-console)."""
    owner = next((one for one in machine.devices.values() if one.slot.host.has_console), None)
    device: Any = getattr(getattr(owner and owner.device, "virtio", None), "device", owner and owner.device)
    if rows and columns and callable(resize := getattr(device, "resize", None)):
        with machine.lock:
            resize(columns, rows)
