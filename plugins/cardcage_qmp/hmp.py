"""Lines of QEMU's human monitor: what scripts send, each carried out by the QMP command that it stands for."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any, get_origin

from cardcage.errors import CardcageError
from cardcage.machine import State
from cardcage.pairs import parse_repeated
from cardcage.units import Size

from cardcage_qmp import HmpCommand
from cardcage_qmp.errors import QmpError
from cardcage_qmp.schema import members_of, tables_of, tag_of
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
OF_ID = {"device_del": "device_del", "netdev_del": "netdev_del", "object_del": "object-del"}
"""Words that take an id."""
OF_PAIRS = {
    "device_add": ("device_add", "driver"),
    "netdev_add": ("netdev_add", "type"),
    "object_add": ("object-add", "qom-type"),
}
"""Words that take what an option of the command line takes, with the key of its first part."""


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
    if name == "block_resize" and len(rest) == 2:
        session.run("block_resize", {"device": rest[0], "size": _size(rest[1])})
        return ""
    if name in OF_ID and len(rest) == 1:
        session.run(OF_ID[name], {"id": rest[0]})
        return ""
    if name in OF_PAIRS and len(rest) == 1:
        command, first = OF_PAIRS[name]
        try:
            pairs = parse_repeated(rest[0], first=first)
        except ValueError as error:
            raise QmpError(str(error)) from error
        session.run(command, _arguments(session, command, pairs))
        return ""
    offered = _offered(session)
    at = f"info {rest[0]}" if name == "info" and rest else name
    if at in offered:
        offer, given = offered[at], words[len(at.split()) :]
        session.ask(at)
        return str(session.carried_out(offer, lambda: offer.load()(session, given)))
    if name in ("help", "?"):
        rows = [*sorted(WORDS), "balloon MEGABYTES", "block_resize DEVICE SIZE", *(f"{one} ID" for one in OF_ID)]
        rows += [f"{one} {first.upper()},KEY=VALUE..." for one, (_, first) in OF_PAIRS.items()]
        rows += [one.help or one.name for one in offered.values()]
        return "".join(f"{one}\n" for one in (*rows, *(f"info {at}" for at in INFO)))
    if name == "info" and rest:
        if rest[0] in INFO:
            return INFO[rest[0]](session, cpu)
        return f"unknown command: 'info {rest[0]:.60}'\n"
    return f"unknown command: '{name:.60}'\n"


def _offered(session: Session) -> dict[str, HmpCommand]:
    """The words of other cards."""
    offers = session.machine.host.registry.offers(HmpCommand)
    return {one.name: one for one in sorted(offers, key=lambda one: one.name)}


def _size(text: str) -> int:
    """Bytes; of a number alone, megabytes."""
    try:
        return int(Size(f"{text}M" if text.isascii() and text.isdigit() else text))
    except ValueError as error:
        raise QmpError(str(error)) from error


def _arguments(session: Session, command: str, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """A command's arguments by its schema, of text: ``on`` for true, a list for a key that may come again, and
    tables for dotted keys."""
    known = session.control.table.commands.get(command)
    if known is None or known.boxed is None:
        return dict(pairs)
    tables = tables_of(known.boxed)
    tag, chosen = tag_of(tables)
    members = {name: kind for name, kind, _ in members_of(chosen.get(dict(pairs).get(tag, ""), tables[0]))}
    found: dict[str, Any] = {}
    for key, text in pairs:
        kind = members.get(key)
        if get_origin(kind) is list:
            found.setdefault(key, []).append({"str": text})
        elif kind is bool and text in ("on", "off"):
            found[key] = text == "on"
        elif kind is int and text.isascii() and text.isdigit() and len(text) < 19:
            found[key] = int(text)
        else:
            *path, last = key.split(".")
            table = found
            for one in path:
                table = table.setdefault(one, {})
                if not isinstance(table, dict):
                    raise QmpError(f'"{key}": "{one}" is already given as text')
            table[last] = text
    return found


def _pci(session: Session, _: int) -> str:
    lines = []
    for bus in session.run("query-pci", {}):
        for one in bus["devices"]:
            lines.append(f"  Bus {one['bus']:2d}, device {one['slot']:3d}, function {one['function']}:\n")
            id = one["id"]
            lines.append(
                f"    Class {one['class_info']['class']:04x}: PCI device {id['vendor']:04x}:{id['device']:04x}\n"
            )
            for bar in one["regions"]:
                end = bar["address"] + bar["size"] - 1
                kind = "I/O" if bar["type"] == "io" else f"{64 if bar['mem_type_64'] else 32} bit memory"
                lines.append(f"      BAR{bar['bar']}: {kind} at 0x{bar['address']:08x} [0x{end:08x}].\n")
            lines.append(f'      id "{one["qdev_id"]}"\n')
    return "".join(lines)


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
    "pci": _pci,
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
