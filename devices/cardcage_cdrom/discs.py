"""Discs of machines that run: ``cardcage cdrom NAME FILE``, whose file the caller opens for a machine in its jail."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Any

from cardcage.errors import ConfigError, UsageError
from cardcage_fleet.control import find
from cardcage_fleet.session import converse

from cardcage_cdrom.device import Cdrom

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from cardcage.device import Slot
    from cardcage.host import Host
    from cardcage.machine import Machine
    from cardcage_fleet.session import Session

__all__ = ["change", "configure", "run"]


def drives(machine: Machine) -> dict[str, tuple[Cdrom, Slot]]:
    """The CD-ROM drives of a machine by their ids."""
    found: dict[str, tuple[Cdrom, Slot]] = {}
    for name, one in list(machine.devices.items()):
        inner = getattr(getattr(one.device, "virtio", None), "device", None)
        if isinstance(inner, Cdrom):
            found[name] = inner, one.slot
    return found


def change(machine: Machine, arguments: dict[str, Any], session: Session) -> dict[str, Any]:
    """Change the disc in drive *device* (where there are several) to the file that came along, or eject it.

    *force*: also where the guest has locked the tray. Raises UsageError; Denied where the drive may not read the file.
    """
    if other := sorted(arguments.keys() - {"device", "force"}):
        raise UsageError(f"no such argument: {', '.join(other)}; known: device, force")
    name, force, known = arguments.get("device"), arguments.get("force", False), drives(machine)
    if not isinstance(force, bool) or not isinstance(name, str | None):
        raise UsageError("device: expected text; force: expected true or false")
    if not known or (name is not None and name not in known):
        which = f'drive "{name}"' if known else "CD-ROM drive"
        raise UsageError(f"{machine.name}: no {which}" + (f"; known: {', '.join(known)}" if known else ""))
    if name is None and len(known) > 1:
        raise UsageError(f"{machine.name}: several drives: say which: {', '.join(known)}")
    drive, slot = known[name or next(iter(known))]
    fd = None
    if session.fds:
        fd = session.fds[0]
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UsageError("a disc is a regular file")
        slot.host.ask("image", os.readlink(f"/proc/self/fd/{fd}"), ("open", "read"), readonly=True)
        session.fds.pop(0)
    try:
        drive.change(fd, force=force)
    except ValueError as error:
        raise UsageError(f"{machine.name}: {error}, or use --force") from error
    return {}


def configure(parser: ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("name", metavar="NAME", help="a running machine: its name, pid, or number (PID-0)")
    parser.add_argument("file", metavar="FILE", nargs="?", help="the ISO image to put in; without one, eject")
    parser.add_argument("--device", metavar="ID", help="the drive, where there are several")
    parser.add_argument("--force", action="store_true", help="also while the guest has locked the tray")


def run(host: Host, arguments: Namespace) -> int:
    """Change the disc."""
    asked: dict[str, Any] = {"force": arguments.force}
    if arguments.device is not None:
        asked["device"] = arguments.device
    fds = []
    try:
        if arguments.file is not None:
            fds.append(os.open(arguments.file, os.O_RDONLY | os.O_CLOEXEC))
        with converse(find(arguments.name), "cdrom", asked, fds=fds):
            return 0
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=arguments.file) from error
    finally:
        for fd in fds:
            os.close(fd)
