"""Landlock: which files a process may still open, by the kernel's own rules (landlock(7))."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from stat import S_ISDIR
from typing import TYPE_CHECKING

from cardcage.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["READ", "REMOVE", "WRITE", "abi", "make_ruleset"]

CREATE_RULESET, ADD_RULE = 444, 445
CREATE_RULESET_VERSION = 1
PATH_BENEATH = 1

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE = (1 << bit for bit in range(6))
MAKE_CHAR, MAKE_DIR, MAKE_REG, MAKE_SOCK, MAKE_FIFO, MAKE_BLOCK, MAKE_SYM = (1 << bit for bit in range(6, 13))
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
OF_FILES = WRITE_FILE | READ_FILE | TRUNCATE | EXECUTE | IOCTL_DEV
"""Rights that a rule about a file, not a directory, may have."""

READ = READ_FILE | READ_DIR
REMOVE = REMOVE_FILE
WRITE = READ | WRITE_FILE | TRUNCATE | REFER | REMOVE_DIR | REMOVE_FILE
WRITE |= MAKE_DIR | MAKE_REG | MAKE_SOCK | MAKE_FIFO | MAKE_SYM | MAKE_CHAR  # of character devices, only whiteouts

FILES = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
"""First version of the interface to the file system rights that it knows."""
BIND_TCP, CONNECT_TCP = 1, 2
SCOPE_ABSTRACT_UNIX = 1


class _Attributes(ctypes.Structure):
    """``struct landlock_ruleset_attr``."""

    _fields_ = (("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    """``struct landlock_path_beneath_attr``."""

    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def _syscall(number: int, *values: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    found: int = libc.syscall(ctypes.c_long(number), *values)
    return found


def abi() -> int:
    """The version of the kernel's Landlock, 0 without it."""
    found = _syscall(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(CREATE_RULESET_VERSION))
    return max(found, 0)


def make_ruleset(rules: Iterable[tuple[str, int]], *, inet: bool, unix: bool) -> int:
    """A ruleset that allows *rules* only, ``(path, rights)``, as a file descriptor. Missing paths are left out.

    Args:
        inet: TCP connections may be made, or waited for.
        unix: abstract Unix sockets of other processes may be reached, where the kernel can tell (version 6).

    Raises HostError.
    """
    version = abi()
    handled = FILES[max(one for one in FILES if one <= version)]
    net = 0 if version < 4 or inet else CONNECT_TCP | BIND_TCP
    attributes = _Attributes(handled, net, 0 if version < 6 or unix else SCOPE_ABSTRACT_UNIX)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = _syscall(CREATE_RULESET, ctypes.byref(attributes), ctypes.c_size_t(size), ctypes.c_uint32(0))
    if ruleset < 0:
        raise HostError(f"jail: the kernel made no Landlock ruleset: {os.strerror(ctypes.get_errno())}")
    try:
        for path, rights in rules:
            with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                _allow(ruleset, path, rights & handled)
    except BaseException:
        os.close(ruleset)
        raise
    return ruleset


def _allow(ruleset: int, path: str, rights: int) -> None:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not S_ISDIR(os.fstat(fd).st_mode):
            rights &= OF_FILES
        beneath = _PathBeneath(rights, fd)
        if rights and _syscall(
            ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(PATH_BENEATH), ctypes.byref(beneath), ctypes.c_uint32(0)
        ):
            raise HostError(f"jail: {path}: no rule can be made of it: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(fd)
