"""QMP commands that add to a machine what ``-device``, ``-netdev``, ``-chardev``, ``-blockdev`` and ``-object`` do.

A node or network is a description, as on the command line: its device opens what it names. That keeps each with the
label and the grants of the device that uses it.
"""

from __future__ import annotations

import os
import stat
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from cardcage_migrate.credentials import credentials
from cardcage_qmp import QmpError, Session
from cardcage_qmp.control import present

from cardcage_qemu import options
from cardcage_qemu.devices import add_device
from cardcage_qemu.keyval import Options, of_table
from cardcage_qemu.line import Line
from cardcage_qemu.nodes import BlockdevOptions, ChardevBackend, ChardevReturn, Netdev, ObjectOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cardcage.machine import Machine

__all__ = [
    "MEANT",
    "blockdev_add",
    "blockdev_del",
    "chardev_add",
    "chardev_remove",
    "device_add",
    "netdev_add",
    "netdev_del",
    "object_add",
    "object_del",
]

MEANT = "qemu:line"
"""The key by which a host shares the command line of its next machine, as ``line``."""
MOST = 1024
"""Nodes, networks and objects of a machine, each: a peer can add no more."""


class Added:
    """All that a machine was made of, and that was added to it; under a lock, that no callback of the machine takes."""

    def __init__(self, line: Line) -> None:
        self.line, self.lock = line, threading.Lock()
        self.sets: dict[str, str] = {}
        """The set of descriptors of each node that has one: in a jail, two that had the same would share its lock."""
        self.chars: dict[str, str | None] = dict.fromkeys(line.chardevs)
        """By the name of a character back end, the device that it was added for; None: it was there from the start."""

    def close(self) -> None:
        """Close what networks were given that nobody forgot."""
        for one in self.line.netdevs.values():
            for fd in one.pop("fds", ()):
                os.close(fd)


def added(machine: Machine) -> Added:
    """All that *machine* is made of, in QEMU's words."""
    known: WeakKeyDictionary[Machine, Added] = machine.host.share("qemu:added", WeakKeyDictionary)
    with machine.lock:
        if machine not in known:
            known[machine] = Added(machine.host.share(MEANT, dict).pop("line", None) or Line())
            machine.defer(known[machine].close)
        return known[machine]


@contextmanager
def changed(session: Session) -> Iterator[Added]:
    """All that the machine is made of, for a change that no other peer makes meanwhile."""
    found = added(session.machine)
    with found.lock:
        yield found


def fdsets(session: Session, line: Line) -> dict[int, int]:
    """Descriptors by their sets: those of ``-add-fd``, and those that peers added."""
    with session.control.lock:
        return {**line.fdsets, **{number: there[0][0] for number, there in session.control.fdsets.items() if there}}


def device_add(
    session: Session, rest: dict[str, Any], /, driver: str, bus: str | None = None, id: str | None = None
) -> None:
    """Add a device; a guest that runs is told. *rest* are properties of the device, as ``-device`` has them."""
    words = {"driver": driver, "bus": bus, "id": id, **rest}
    given = of_table("device_add", {key: value for key, value in words.items() if value is not None})
    machine = session.machine
    if id is not None and id in machine.devices:
        raise QmpError(f"Duplicate device ID '{id:.100}'")
    with changed(session) as there:
        if isinstance(node := rest.get("drive"), str):
            _unused(session, there.line, node)
        table, label = _table(there, given, rest)
        cards = dict(there.line.cards)
        try:
            plugged = machine.add(table.pop("type"), **table)
        except BaseException:
            there.line.cards = cards
            raise
        there.line.names.pop(plugged.id, None)  # of one that had its id before
        if label is not None:
            session.control.names[plugged.id] = label
        if isinstance(network := rest.get("netdev"), str):
            there.line.cards[plugged.id] = network
        if isinstance(char := rest.get("chardev"), str) and there.chars.get(char, "") is not None:
            there.chars[char] = plugged.id


def _table(there: Added, given: Options, rest: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The device's table, and what QMP calls what stands behind it. Raises ConfigError; nothing is changed then."""
    line = there.line
    before, names, buses = list(line.devices), dict(line.names), dict(line.buses)
    line.wires.clear()
    try:
        add_device(line, given)
        if any(wire == "mmio" for _, _, wire in line.wires):
            raise given.error("virtio over MMIO comes with the machine: say the name that ends in -pci")
        found = [one for one in line.devices if not any(one is other for other in before)]
        if len(found) != 1 or len(line.buses) > len(buses):
            raise given.error("cardcage has no ports and consoles that come later")
        return found[0], line.names.get(found[0].get("id", ""))
    finally:
        line.devices[:], line.names, line.buses = before, names, buses


def netdev_add(session: Session, netdev: Netdev, /) -> None:
    """Describe a network, for a card that is added then."""
    table: dict[str, Any] = dict(netdev)
    id = table["id"]
    with changed(session) as there:
        if id in there.line.netdevs:
            raise QmpError(f"Duplicate ID '{id:.100}' for netdev")
        _room(there.line.netdevs, "networks")
        forwards = table.pop("hostfwd", [])
        words = [one for key in ("fd", "fds") if key in table for one in table.pop(key).split(":")]
        if unknown := [one for one in words if one not in session.fds]:
            raise QmpError(f"File descriptor named '{unknown[0]:.100}' has not been found")
        if len(set(words)) < len(words):
            raise QmpError("Parameter 'fds' expects each name once")
        if words:
            table["fds"] = ":".join(str(session.fds[one]) for one in words)
        given = of_table("netdev_add", table)
        given.pairs += [("hostfwd", one["str"]) for one in forwards]
        options.on_netdev(there.line, given)
        for name in words:  # they are the network's now
            del session.fds[name]


def netdev_del(session: Session, id: str) -> None:
    """Forget a network that no card uses."""
    with changed(session) as there:
        if id not in there.line.netdevs:
            raise QmpError(f"Device '{id:.100}' not found", "DeviceNotFound")
        for card, network in list(there.line.cards.items()):
            if card not in session.machine.devices:
                del there.line.cards[card]
            elif network == id:
                raise QmpError(f"Network '{id}' is in use by device '{card}'")
        for fd in there.line.netdevs.pop(id).get("fds", ()):
            os.close(fd)


def chardev_add(session: Session, id: str, backend: ChardevBackend) -> ChardevReturn:
    """Describe a character back end, for a device that is added then."""
    with changed(session) as there:
        if id in there.line.chardevs:
            raise QmpError(f"Chardev with id '{id:.100}' already exists")
        _room(there.line.chardevs, "character back ends")
        options.on_chardev(there.line, of_table("chardev-add", {"id": id, "backend": backend}))
        return {}


def chardev_remove(session: Session, id: str) -> None:
    """Forget a character back end that no device uses."""
    with changed(session) as there:
        if id not in there.line.chardevs:
            raise QmpError(f"Chardev '{id:.100}' not found")
        if id in there.chars and ((user := there.chars[id]) is None or user in session.machine.devices):
            raise QmpError(f"Chardev '{id}' is busy")
        del there.line.chardevs[id]
        there.chars.pop(id, None)


def blockdev_add(session: Session, node: BlockdevOptions, /) -> None:
    """Describe an image, for a disk that is added then, or for an image that stands on it."""
    table: dict[str, Any] = dict(node)
    name = table["node-name"]
    with changed(session) as there:
        line = there.line
        if name in line.drives:
            raise QmpError(f"Duplicate nodes with node-name='{name:.100}'")
        _room(line.drives, "nodes")
        if isinstance(path := table.get("filename"), str):
            if not path.startswith("/dev/fdset/"):
                _there(path)
            elif path in there.sets.values():
                raise QmpError(f"'{path:.100}' is used by another node")
        sets, line.fdsets = line.fdsets, fdsets(session, line)
        try:
            options.on_blockdev(line, of_table("blockdev-add", table))
        finally:
            line.fdsets = sets
        if isinstance(path, str) and path.startswith("/dev/fdset/"):
            there.sets[name] = path


def _there(path: str) -> None:
    """Raises QmpError where *path* is no image's."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise QmpError(f"Could not open '{path}': {error.strerror}") from error
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise QmpError(f"Could not open '{path}': expected a file or a block device")


def blockdev_del(session: Session, node_name: str) -> None:
    """Forget an image that no disk uses, and no other image."""
    with changed(session) as there:
        line = there.line
        if node_name not in line.drives:
            raise QmpError(f"Failed to find node with node-name='{node_name:.100}'")
        if above := next((name for name, below in line.below.items() if node_name in below), None):
            raise QmpError(f"Node '{node_name}' is busy: node is used as part of '{above}'")
        _unused(session, line, node_name)
        del line.drives[node_name]
        there.sets.pop(node_name, None)
        line.nodes.pop(node_name, None)
        line.below.pop(node_name, None)


def _unused(session: Session, line: Line, node: str) -> None:
    """Raises QmpError where a device has *node*."""
    names = {**line.names, **session.control.names}
    for one in present(session.machine):
        if names.get(one.id) == node:
            raise QmpError(f"Node {node} is in use by device '{one.id}'")


def object_add(session: Session, made: ObjectOptions, /) -> None:
    """Describe an object, as ``-object`` does: entropy for a device, a secret, certificates for a migration."""
    table: dict[str, Any] = dict(made)
    id = table["id"]
    with changed(session) as there:
        if id in there.line.objects:
            raise QmpError(f"attempt to add duplicate property '{id:.100}' to object (type 'container')")
        _room(there.line.objects, "objects")
        options.on_object(there.line, of_table("object-add", table))
        if (read := there.line.objects[id].get("credentials")) is not None:
            credentials(session.machine)[id] = read


def object_del(session: Session, id: str) -> None:
    """Forget an object."""
    with changed(session) as there:
        if id not in there.line.objects:
            raise QmpError(f"object '{id:.100}' not found")
        del there.line.objects[id]
        credentials(session.machine).pop(id, None)


def _room(there: dict[str, Any], what: str) -> None:
    if len(there) >= MOST:
        raise QmpError(f"{MOST} {what} are there already")
