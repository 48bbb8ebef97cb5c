"""``cardcage doctor``: the device of Linux KVM, and how this user could open it."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["kvm_device", "remedy"]

DEVICE = "/dev/kvm"


def kvm_device(device: str = DEVICE) -> tuple[bool, str, str]:
    """Can ``/dev/kvm`` be opened? What would help is told by the node's own owner, group and mode."""
    try:
        node = os.stat(device)
    except OSError:
        return False, f"{device} does not exist", _module()
    if not stat.S_ISCHR(node.st_mode):
        return False, f"{device} is not a device", f"sudo rm {device} && sudo mknod {device} c 10 232"
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except PermissionError:
        pass
    except OSError as error:
        return False, f"{device}: {error.strerror}", _module()
    else:
        return True, f"{device} can be opened", ""
    owner, group = _name(pwd.getpwuid, node.st_uid), _name(grp.getgrgid, node.st_gid)
    found = f"{device}: permission denied: it is {owner}:{group}, mode {stat.S_IMODE(node.st_mode):04o}"
    return False, found, remedy(device, node)


def remedy(device: str, node: os.stat_result) -> str:
    """A command that lets this user open the node *device*, whose owner, group and mode are *node*'s."""
    user, group = _name(pwd.getpwuid, os.geteuid()), _name(grp.getgrgid, node.st_gid)
    if os.geteuid() == 0:
        return f"give the container {device} (docker run --device {device})"  # root is refused by nothing else
    if node.st_gid == 0 or node.st_mode & 0o060 != 0o060:
        return f"sudo setfacl -m u:{user}:rw {device}"  # no group that one should be in has it
    if user in _members(node.st_gid):
        return f"log in again, or: newgrp {group}"
    return f"sudo usermod -aG {group} {user}, then log in again"


def _name(find: Callable[[int], Sequence[Any]], number: int) -> str:
    try:
        return str(find(number)[0])
    except KeyError:
        return str(number)


def _members(group: int) -> list[str]:
    try:
        return grp.getgrgid(group).gr_mem
    except KeyError:
        return []


def _module() -> str:
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        flags = []
    for flag, module in (("vmx", "kvm_intel"), ("svm", "kvm_amd")):
        if flag in flags:
            return f"sudo modprobe {module}"
    return "switch virtualization on in the firmware; in a virtual machine, nested virtualization on its host"
