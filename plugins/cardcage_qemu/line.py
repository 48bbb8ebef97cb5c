"""QEMU's command line, option by option, into a configuration."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from attrs import field
from cardcage.errors import ConfigError, near
from cardcage.values import define
from cardcage_qmp.about import MODELS

from cardcage_qemu import backends
from cardcage_qemu.board import settle
from cardcage_qemu.keyval import Options, parse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["MODELS", "QUIET", "Line", "translate"]

COM = ((0x3F8, 4), (0x2F8, 3), (0x3E8, 4), (0x2E8, 3))
"""Port and interrupt of the serial ports, in their order."""
QUIET: dict[str, str | None] = {
    "nodefaults": None,
    "no-user-config": None,
    "nographic": None,
    "display": "none",
    "vga": "none",
    "vnc": "none",
    "parallel": "none",
    "msg": "",
    "L": "",
    "overcommit": "mem-lock=off cpu-pm=off",
    "usb": None,
    "audiodev": "",
}
"""Options that change nothing here at these values (any, where there are none); None: they take no value."""
GLOBALS = (
    "kvm-pit.lost_tick_policy=delay",
    "PIIX4_PM.disable_s3=1",
    "PIIX4_PM.disable_s4=1",
    "PIIX4_PM.disable_s3=0",
    "PIIX4_PM.disable_s4=0",
    "virtio-mmio.force-legacy=false",
)
"""Properties of devices by their type that say what is so anyway."""
REFUSED = {
    "fda": "cardcage has no floppy disks",
    "tpmdev": "cardcage has no TPM",
    "spice": "cardcage has no display",
}


@define
class Line:
    """The options so far, and their result.

    Attributes:
        machine, boot, memory, security: tables of the configuration. devices: its devices.
        accelerators: names, in the order to try.
        chardevs, drives, netdevs, shares, objects, fdsets: by their ids; a drive with its device's options.
        flash: chips by their unit. below: the nodes that a node of -blockdev stands on, by its name.
        cards: what -netdev each network card has, by the card's id. hub: the parts of -net, by their types.
        board: what -machine says of its parts, with where. wires: devices whose names say ``pci`` or ``mmio``.
        micro: the board is microvm. silent: it has no serial port.
        watchdogs: of the devices. expiry: what they do.
        buses: virtio consoles by id, each its ports by number.
        names: what QMP calls what stands behind a device, by its id.
        warnings: lines about what is not quite what was asked for.
        temporary: -snapshot. freeze: -S. linger: -no-shutdown. daemonize, pidfile: as they say.
        console: standard input and output are the console's.
        incoming: where a machine comes from that this one is to become: a URI, or ``defer`` for QMP's word.
        loadvm: the tag of the snapshot that it goes on from.
    """

    machine: dict[str, Any] = field(factory=lambda: {"memory": "128M"})
    boot: dict[str, Any] = field(factory=dict)
    memory: dict[str, Any] = field(factory=dict)
    security: dict[str, Any] = field(factory=dict)
    devices: list[dict[str, Any]] = field(factory=list)
    monitors: list[dict[str, Any]] = field(factory=list)
    accelerators: list[str] = field(factory=list)
    chardevs: dict[str, dict[str, Any]] = field(factory=dict)
    drives: dict[str, tuple[dict[str, Any], dict[str, Any]]] = field(factory=dict)
    nodes: dict[str, dict[str, Any]] = field(factory=dict)
    netdevs: dict[str, dict[str, Any]] = field(factory=dict)
    shares: dict[str, dict[str, Any]] = field(factory=dict)
    objects: dict[str, dict[str, Any]] = field(factory=dict)
    cards: dict[str, str] = field(factory=dict)
    hub: dict[str, dict[str, Any]] = field(factory=dict)
    fdsets: dict[int, int] = field(factory=dict)
    buses: dict[str, dict[int, tuple[dict[str, Any], str, str]]] = field(factory=dict)
    hosts: dict[str, dict[str, Any]] = field(factory=dict)
    names: dict[str, str] = field(factory=dict)
    smbios: dict[str, str] = field(factory=dict)
    firmware: dict[str, Any] = field(factory=dict)
    rtc: dict[str, str] = field(factory=dict)
    flash: dict[int, dict[str, Any]] = field(factory=dict)
    below: dict[str, set[str]] = field(factory=dict)
    board: dict[str, tuple[str, Options]] = field(factory=dict)
    wires: list[tuple[Options, dict[str, Any], str]] = field(factory=list)
    watchdogs: list[dict[str, Any]] = field(factory=list)
    expiry: str = "reset"
    later: list[Callable[[], None]] = field(factory=list)
    warnings: list[str] = field(factory=list)
    serials: int = 0
    temporary: bool = False
    freeze: bool = False
    linger: bool = False
    daemonize: bool = False
    pidfile: str = ""
    incoming: str = ""
    loadvm: str = ""
    console: bool = False
    nographic: bool = False
    bare: bool = False
    micro: bool = False
    silent: bool = False
    plain: bool = False

    # what the parts say

    def char(self, options: Options, name: str) -> dict[str, Any]:
        """The character device *name*. Raises ConfigError."""
        if name not in self.chardevs:
            raise backends.unknown(options, "-chardev", name, self.chardevs)
        return self.chardevs[name]

    def char_for(self, options: Options, name: str) -> Any:
        """The char spec of a device on the character device *name*."""
        return self.spec(options, self.char(options, name))

    def spec(self, options: Options, table: dict[str, Any]) -> Any:
        """The char spec of a device: text where it needs no more."""
        found = backends.device_spec(options, table)
        return found["type"] if len(found) == 1 else found

    def serial_port(self, device: dict[str, Any], index: int | None = None) -> None:
        """Give a serial port its place, and standard input and output as the machine's console."""
        at = self.serials if index is None else index
        self.serials = max(self.serials, at) + 1
        if "port" not in device and 0 < at < len(COM):
            device["port"], device["irq"] = COM[at]
        if device.get("char") == "stdio" and not self.console:
            device["char"], self.console = "console", True

    def disc_drive(self, options: Options, spec: dict[str, Any], more: dict[str, Any], id: str | None) -> None:
        """A CD-ROM drive with the image of *spec* in it. Raises ConfigError."""
        if "file" not in spec or more.keys() - {"serial"}:
            raise options.error("a CD-ROM drive: cardcage has it with a file, without werror and rerror")
        name = id or f"cd{sum(one['type'] == 'virtio-cdrom' for one in self.devices)}"
        drive = {"format": "raw", **spec, "readonly": True}
        drive.pop("discard", None)
        self.warnings.append(f"{options.option}: the guest finds its CD-ROM drive behind virtio SCSI, not on IDE")
        self.names[name] = name
        self.devices.append({"type": "virtio-cdrom", "id": name, "drive": drive, **more})

    def flash_chip(self, options: Options, spec: dict[str, Any], unit: int | None) -> None:
        """Flash: chip 0 ends at 4 GiB and is what the machine boots, chip 1 lies below it. Raises ConfigError."""
        at = len(self.flash) if unit is None else unit
        if at not in (0, 1) or at in self.flash:
            raise options.error(f"unit={at}: expected two chips at most, 0 and 1, each once")
        if "file" not in spec or spec.get("format", "raw") != "raw":
            raise options.error("flash: cardcage has it in raw files")
        self.flash[at] = spec

    def _flash(self) -> None:
        if self.flash and 0 not in self.flash:
            raise ConfigError("expected unit=0, which the machine boots", file="-drive if=pflash")
        for at, spec in sorted(self.flash.items()):
            chip = {"type": "pflash", "file": spec["file"]}
            if at:
                chip["below"] = self.flash[0]["file"]
            else:
                self.boot["firmware"] = spec["file"]
            if not spec.get("readonly"):
                self.devices.append(chip)
            elif at:
                self.devices.append({**chip, "readonly": True})

    def serial_bus(self, id: str, device: dict[str, Any]) -> None:
        """A virtio console, whose ports come."""
        self.buses[id], self.hosts[id] = {}, device
        device["id"] = id
        self.devices.append(device)

    # the end

    def config(self) -> dict[str, Any]:
        """The configuration's tables. Raises ConfigError."""
        for one in self.later:
            one()
        self.later.clear()
        self._flash()
        self._consoles()
        for disk in self.devices if self.temporary else ():
            if disk["type"] == "virtio-blk" and not any(disk["drive"] is one for one in self.nodes.values()):
                backends.make_temporary(disk["drive"])
        if self.incoming:
            self._wait_for_disks()
        for watchdog in self.watchdogs if self.expiry != "reset" else ():
            watchdog["action"] = self.expiry
        settle(self)
        if self.bare:
            self.machine["platform"], self.machine["memory"] = "none", "1M"
        elif not self.boot:
            from cardcage_boot.firmware import find_bios  # most are given a kernel

            self.boot["firmware"] = find_bios()
            if not self.boot["firmware"]:
                raise ConfigError("give -kernel or -bios: no SeaBIOS is installed here")
        if self.accelerators:
            self.machine["accel"] = self.accelerators
        if self.nographic and not self.serials and not self.plain and not self.bare and not self.silent:
            self.devices.insert(0, {"type": "isa-serial", "char": "console"})
            self.console = True
        self.machine["console"] = "stdio" if self.console else "none"
        extra = {"smbios": self.smbios, "fw_cfg": self.firmware, "rtc": self.rtc}
        devices = [{"type": name, **table} for name, table in extra.items() if table]
        monitors = [{"type": "qmp", **one} for one in self.monitors]
        if monitors and self.names:
            monitors[0]["names"] = self.names
        if late := self._late():
            self.security["open_later"] = [*self.security.get("open_later", []), *late]
        found: dict[str, Any] = {"machine": self.machine, "memory": self.memory, "boot": self.boot}
        found |= {"security": self.security, "device": [*devices, *self.devices, *monitors]}
        return {name: table for name, table in found.items() if table}

    def _late(self) -> list[str]:
        """Image files that no device has yet: ``device_add`` may name their drives."""
        files = {spec["file"] for spec, _ in self.drives.values() if isinstance(spec.get("file"), str)}
        late = (one for one in files - {*_texts(self.devices)} if not one.startswith("/proc/"))  # not -add-fd's
        return sorted(one for one in late if os.path.isfile(one))

    def _wait_for_disks(self) -> None:
        """Disks that the guest writes are another machine's until it comes, and its memory may come after it."""
        from cardcage_migrate.expecting import waiting_drive, waiting_memory

        waiting_memory(self.memory)
        for disk in self.devices:
            if disk["type"] != "virtio-blk" or disk.get("readonly") or disk["drive"].get("readonly"):
                continue
            if disk["drive"].get("type") != "temporary":
                disk["drive"] = waiting_drive(disk["drive"])

    def _consoles(self) -> None:
        for id, ports in self.buses.items():
            device = self.hosts[id]
            first = ports.get(0)
            device["char"] = first[0]["char"] if first else "null"
            numbers = [one for one in sorted(ports) if one]
            if numbers != list(range(1, len(numbers) + 1)):
                raise ConfigError(f"ports of {id} are {numbers}: expected 1, 2, 3 ...", file="-device virtserialport")
            if numbers:
                device["ports"] = [
                    {key: value for key, value in ports[at][0].items() if value not in ("", False)} for at in numbers
                ]
            for at in sorted(ports):
                self.names[f"{id}.{at}" if at else id] = ports[at][1]

    def notes(self) -> list[str]:
        """Options that are no part of the configuration."""
        found = []
        if self.incoming:
            found.append(f"-incoming {self.incoming}: RAM, state and disks come from another machine")
        if self.loadvm:
            found.append(f"-loadvm {self.loadvm}: goes on from a snapshot")
        if self.freeze:
            found.append("-S: QMP's cont, or gdb's continue, starts the machine")
        if self.linger:
            found.append("-no-shutdown: the machine stays after its guest's power-off, until QMP's quit")
        return found


def translate(words: Sequence[str]) -> Line:
    """QEMU's *words*, without the program's name. Raises ConfigError that names the option."""
    from cardcage_qemu.options import OPTIONS

    line, at = Line(), 0
    pairs = []
    while at < len(words):
        word = words[at]
        name = word[2:] if word.startswith("--") else word[1:]
        if not word.startswith("-") or word == "-":
            raise ConfigError("a disk image alone: cardcage has no IDE disks: say -drive file=...,if=virtio", file=word)
        at += 1
        if name not in OPTIONS:
            what = REFUSED.get(name, f"no such option.{near(name, OPTIONS)}")
            raise ConfigError(what, file=f"-{name}")
        takes, handler, first = OPTIONS[name]
        text = ""
        if takes:
            if at == len(words):
                raise ConfigError("expected a value", file=f"-{name}")
            text = words[at]
            at += 1
        pairs.append((name, handler, first, text))
    # What others name comes before what names it, wherever it stands: as in QEMU.
    order = {name: number for number, name in enumerate("add-fd object chardev blockdev drive netdev fsdev".split())}
    for name, handler, first, text in sorted(pairs, key=lambda one: order.get(one[0], len(order))):
        handler(line, parse(f"-{name}", text, first) if first is not None else Options(f"-{name}", text, []))
    return line


def _texts(value: Any) -> Iterator[str]:
    """All text in a table."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)
