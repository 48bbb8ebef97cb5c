"""Lines of QEMU's human monitor: what scripts send, each carried out by the QMP command that it stands for."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from cardcage.errors import CardcageError
from cardcage.machine import State

from cardcage_qmp.errors import QmpError
from cardcage_qmp.session import VERSION, Session
from cardcage_qmp.wire import MOST, TooMuch

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Prompt", "human_monitor_command"]

WORDS = {
    "quit": "quit",
    "q": "quit",
    "stop": "stop",
    "s": "stop",
    "cont": "cont",
    "c": "cont",
    "system_reset": "system_reset",
    "system_powerdown": "system_powerdown",
    "nmi": "inject-nmi",
}


def human_monitor_command(session: Session, command_line: str, cpu_index: int | None = None) -> str:
    """Carry out a line of the human monitor; returns what it would print."""
    return said(session, command_line, cpu_index or 0)


def said(session: Session, line: str, cpu: int = 0) -> str:
    """Run *line*; return what it prints."""
    try:
        words = shlex.split(line)
    except ValueError as error:
        return f"Error: {error}\r\n"
    if not words:
        return ""
    try:
        text = _carried_out(session, words, cpu)
    except CardcageError as error:
        return f"Error: {error}\r\n"
    return text.replace("\n", "\r\n")


def _carried_out(session: Session, words: list[str], cpu: int) -> str:
    name, *rest = words
    if name in WORDS and not rest:
        session.run(WORDS[name], {})
        return ""
    if name == "balloon" and len(rest) == 1 and rest[0].isascii() and rest[0].isdigit() and len(rest[0]) < 12:
        session.run("balloon", {"value": int(rest[0]) << 20})
        return ""
    if name in ("help", "?"):
        return "".join(f"{one}\n" for one in (*sorted(WORDS), "balloon MEGABYTES", *(f"info {at}" for at in INFO)))
    if name == "info" and rest:
        if rest[0] in INFO:
            return INFO[rest[0]](session, cpu)
        return f"unknown command: 'info {rest[0]:.60}'\n"
    return f"unknown command: '{name:.60}'\n"


def _status(session: Session, _: int) -> str:
    found = session.run("query-status", {})
    if found["running"]:
        return "VM status: running\n"
    why = "" if found["status"] == "paused" else f" ({found['status']})"
    return f"VM status: paused{why}\n"


def _version(session: Session, _: int) -> str:
    found = session.run("query-version", {})
    return f"{'.'.join(str(one) for one in VERSION)}{found['package']}\n"


def _cpus(session: Session, cpu: int) -> str:
    return "".join(
        f"{'*' if one['cpu-index'] == cpu else ' '} CPU #{one['cpu-index']}: thread_id={one['thread-id']}\n"
        for one in session.run("query-cpus-fast", {})
    )


def _kvm(session: Session, _: int) -> str:
    found = session.run("query-kvm", {})
    return f"kvm support: {'enabled' if found['enabled'] else 'disabled' if found['present'] else 'not compiled'}\n"


def _block(session: Session, _: int) -> str:
    lines = []
    for one in session.run("query-block", {}):
        what = "[not inserted]"
        if image := one.get("inserted"):
            what = f"{image['file']} ({image['drv']}{', read-only' if image['ro'] else ''})"
        lines.append(f"{one['device']}: {what}\n")
        lines.append(f"    Attached to:      {one['qdev']}\n")
        if one["removable"]:
            state = f"{'' if one['locked'] else 'not '}locked, tray {'open' if one['tray_open'] else 'closed'}"
            lines.append(f"    Removable device: {state}\n")
    return "\n".join(lines)


def _chardev(session: Session, _: int) -> str:
    return "".join(f"{one['label']}: filename={one['filename']}\n" for one in session.run("query-chardev", {}))


def _balloon(session: Session, _: int) -> str:
    return f"balloon: actual={session.run('query-balloon', {})['actual'] >> 20}\n"


def _registers(session: Session, cpu: int) -> str:
    """Registers, in QEMU's order. A machine that runs is paused for it, and goes on."""
    machine = session.machine
    if not 0 <= cpu < len(machine.vcpus):
        raise QmpError(f"CPU #{cpu} not available")
    if machine.state is not State.RUNNING:
        return shown(machine.vcpus[cpu].get_state())
    machine.pause()
    try:
        return shown(machine.vcpus[cpu].get_state())
    finally:
        machine.resume()


def shown(state: Any) -> str:
    """A processor's registers as text."""
    registers, system = state.registers, state.system
    rows = (
        "rax rbx rcx rdx".split(),
        "rsi rdi rbp rsp".split(),
        "r8 r9 r10 r11".split(),
        "r12 r13 r14 r15".split(),
    )
    lines = [" ".join(f"{one.upper():3}={getattr(registers, one):016x}" for one in row) for row in rows]
    halted = int(state.events.halted)
    lines.append(f"RIP={registers.rip:016x} RFL={registers.rflags:08x} CPL={system.cs.selector & 3} HLT={halted}")
    for name in "es cs ss ds fs gs ldt tr".split():
        one = getattr(system, name)
        lines.append(f"{name.upper():3}={one.selector:04x} {one.base:016x} {one.limit:08x}")
    for name in ("gdt", "idt"):
        table = getattr(system, name)
        lines.append(f"{name.upper()}=     {table.base:016x} {table.limit:08x}")
    lines.append(f"CR0={system.cr0:08x} CR2={system.cr2:016x} CR3={system.cr3:016x} CR4={system.cr4:08x}")
    lines.append(" ".join(f"DR{at}={value:016x}" for at, value in zip((0, 1, 2, 3, 6, 7), state.debug, strict=True)))
    lines.append(f"EFER={system.efer:016x}")
    return "\n".join(lines) + "\n"


INFO: dict[str, Callable[[Session, int], str]] = {
    "balloon": _balloon,
    "block": _block,
    "chardev": _chardev,
    "cpus": _cpus,
    "kvm": _kvm,
    "name": lambda session, _: f"{session.run('query-name', {})['name']}\n",
    "registers": _registers,
    "status": _status,
    "uuid": lambda session, _: f"{session.run('query-uuid', {})['UUID']}\n",
    "version": _version,
}


class Prompt:
    """A peer that types lines."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._held = b""

    def greeting(self) -> bytes:
        """The greeting."""
        version = ".".join(str(one) for one in VERSION)
        return f"QEMU {version} monitor - type 'help' for more information\r\n(qemu) ".encode()

    def feed(self, data: bytes) -> list[bytes]:
        """Whole lines. Raises TooMuch."""
        *lines, self._held = (self._held + data).split(b"\n")
        if len(self._held) > MOST:
            raise TooMuch("a line without an end")
        return lines

    def answer(self, line: bytes) -> bytes:
        """Run a line; return what it prints, and the next prompt."""
        text = said(self._session, line.decode("utf-8", "replace").strip("\r"))
        return f"{text}(qemu) ".encode("utf-8", "replace")
