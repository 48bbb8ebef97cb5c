"""File system calls of a process, with their flags, as acts on one directory whose ends can be compared.

Nothing but the standard library is needed: a guest runs ``python share_calls.py ROOT SCRIPTS`` too, which prints the
outcomes of each script as JSON.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import shutil
import socket
import stat
import struct
import sys
from hashlib import md5
from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)
OMIT, NOW = (1 << 30) - 2, (1 << 30) - 1
FOLLOW, EMPTY, NOFOLLOW, EACCESS = 0x400, 0x1000, 0x100, 0x200
CWD = -100


def checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result


def about(found: os.stat_result) -> list[int]:
    """What of a file's attributes is a matter of what was done to it."""
    size = 0 if stat.S_ISDIR(found.st_mode) else found.st_size
    return [found.st_mode, found.st_nlink, found.st_uid, found.st_gid, size, found.st_rdev]


class OpenFiles:
    """Acts on what is open in the directory *root*: ``held`` are descriptors that stay so from act to act."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.held: dict[int, int] = {}

    def at(self, name: str) -> str:
        return os.path.join(self.root, name)

    def fd(self, slot: int) -> int:
        if slot not in self.held:
            raise OSError(errno.EBADF, "")
        return self.held[slot]

    def open(self, slot: int, name: str, flags: int, mode: int) -> list[int]:
        fd = os.open(self.at(name), flags | os.O_NONBLOCK, mode)  # of a FIFO too
        self.drop(slot)
        self.held[slot] = fd
        return about(os.fstat(fd))

    def drop(self, slot: int) -> None:
        if slot in self.held:
            os.close(self.held.pop(slot))

    def drop_all(self) -> None:
        for slot in list(self.held):
            self.drop(slot)

    def read(self, slot: int, offset: int, size: int) -> str:
        return md5(os.pread(self.fd(slot), size, offset)).hexdigest()

    def write(self, slot: int, offset: int, size: int, how: int) -> int:
        return os.pwritev(self.fd(slot), [b"w" * (size // 2), b"v" * (size - size // 2)], offset, how)

    def set_flags(self, slot: int, flags: int) -> None:
        fcntl.fcntl(self.fd(slot), fcntl.F_SETFL, flags)

    def seek(self, slot: int, offset: int, whence: int) -> int:
        if stat.S_ISDIR(os.fstat(self.fd(slot)).st_mode):
            return 0  # each file system counts the places in a directory as it likes
        return os.lseek(self.fd(slot), offset, whence)

    def allocate(self, slot: int, mode: int, offset: int, length: int) -> None:
        checked(LIBC.fallocate(self.fd(slot), mode, ctypes.c_int64(offset), ctypes.c_int64(length)))

    def copy(self, slot: int, to: int, at: int, to_at: int, length: int) -> int:
        return os.copy_file_range(self.fd(slot), self.fd(to), length, at, to_at)

    def send(self, slot: int, to: int, at: int, length: int) -> int:
        return os.sendfile(self.fd(to), self.fd(slot), at, length)

    def map(self, slot: int, offset: int) -> int:
        with mmap.mmap(self.fd(slot), 4096) as view:
            view[offset % 4096] = 77
            view.flush()
        return 77

    def sync(self, slot: int, call: str) -> None:
        if call == "range":
            checked(LIBC.sync_file_range(self.fd(slot), ctypes.c_int64(0), ctypes.c_int64(0), 7))
        elif call == "advise":
            os.posix_fadvise(self.fd(slot), 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            (os.fdatasync if call == "data" else os.fsync)(self.fd(slot))

    def lock(self, slot: int, call: str) -> None:
        if call == "whole":
            fcntl.flock(self.fd(slot), fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            fcntl.lockf(self.fd(slot), fcntl.LOCK_SH if call == "shared" else fcntl.LOCK_EX, 10, 5)

    def about_open(self, slot: int) -> list[int]:
        return about(os.fstat(self.fd(slot)))

    def truncate_open(self, slot: int, size: int) -> None:
        os.ftruncate(self.fd(slot), size)

    def chmod_open(self, slot: int, mode: int) -> None:
        os.fchmod(self.fd(slot), mode)

    def chown_open(self, slot: int, user: int, group: int) -> None:
        os.fchown(self.fd(slot), user, group)

    def times_open(self, slot: int, accessed: int, modified: int) -> list[int]:
        os.utime(self.fd(slot), ns=(accessed, modified))
        found = os.fstat(self.fd(slot))
        return [found.st_atime_ns, found.st_mtime_ns]

    def link_open(self, slot: int, name: str) -> None:
        link = f"/proc/self/fd/{self.fd(slot)}".encode()
        checked(LIBC.linkat(CWD, link, CWD, self.at(name).encode(), FOLLOW))

    def list_open(self, slot: int) -> list[str]:
        return sorted(os.listdir(self.fd(slot)))


class Names(OpenFiles):
    """Acts that make, move and remove names."""

    def mkdir(self, name: str, mode: int) -> None:
        os.mkdir(self.at(name), mode)

    def mknod(self, name: str, mode: int, device: int) -> None:
        os.mknod(self.at(name), mode, device)

    def bind(self, name: str) -> None:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(self.at(name))

    def symlink(self, name: str, target: str) -> None:
        os.symlink(target, self.at(name))

    def readlink(self, name: str) -> str:
        return os.readlink(self.at(name))

    def link(self, name: str, to: str, flags: int) -> None:
        checked(LIBC.linkat(CWD, self.at(name).encode(), CWD, self.at(to).encode(), flags))

    def unlink(self, name: str) -> None:
        os.unlink(self.at(name))

    def rmdir(self, name: str) -> None:
        os.rmdir(self.at(name))

    def rename(self, name: str, to: str, flags: int) -> None:
        checked(LIBC.renameat2(CWD, self.at(name).encode(), CWD, self.at(to).encode(), flags))

    def listing(self, name: str) -> list[Any]:
        with os.scandir(self.at(name)) as found:
            return sorted([one.name, one.is_symlink(), one.is_dir(follow_symlinks=False)] for one in found)

    def names(self, name: str) -> list[str]:
        return sorted(os.listdir(self.at(name)))

    def copy_tree(self, name: str, to: str) -> str:
        try:
            shutil.copytree(self.at(name), self.at(to), symlinks=True)
        except shutil.Error as error:
            return f"{len(error.args[0])} could not be copied"
        return "copied"


class Direct(Names):
    """Acts on attributes too; where *follow* is false, on those of a symbolic link itself."""

    def about(self, name: str, follow: bool) -> list[int]:
        return about(os.stat(self.at(name), follow_symlinks=follow))

    def access(self, name: str, mode: int, flags: int) -> int:
        checked(LIBC.faccessat(CWD, self.at(name).encode(), mode, flags))
        return mode

    def chmod(self, name: str, mode: int) -> None:
        os.chmod(self.at(name), mode)

    def chown(self, name: str, user: int, group: int, follow: bool) -> None:
        os.chown(self.at(name), user, group, follow_symlinks=follow)

    def truncate(self, name: str, size: int) -> None:
        os.truncate(self.at(name), size)

    def times(self, name: str, accessed: list[int], modified: list[int], follow: bool) -> list[int]:
        times = struct.pack("<4q", *accessed, *modified)
        checked(LIBC.utimensat(CWD, self.at(name).encode(), times, 0 if follow else NOFOLLOW))
        found = os.stat(self.at(name), follow_symlinks=follow)
        set_ = zip((found.st_atime_ns, found.st_mtime_ns), (accessed[1], modified[1]), strict=True)
        return [0 if given in (NOW, OMIT) else moment for moment, given in set_]

    def _kept(self, name: str, key: str, follow: bool, code: int) -> None:
        """A share keeps attributes other than ``user.*`` of files and directories alone (docs/virtio.md)."""
        mode = os.stat(self.at(name), follow_symlinks=follow).st_mode
        if key.startswith("trusted.") and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise OSError(code, "")

    def set_attribute(self, name: str, key: str, size: int, flags: int, follow: bool) -> None:
        self._kept(name, key, follow, errno.EPERM)
        os.setxattr(self.at(name), key, b"v" * size, flags, follow_symlinks=follow)

    def attribute(self, name: str, key: str, follow: bool) -> str:
        return os.getxattr(self.at(name), key, follow_symlinks=follow).decode()

    def attribute_room(self, name: str, key: str, room: int) -> int:
        return checked(
            LIBC.getxattr(self.at(name).encode(), key.encode(), ctypes.create_string_buffer(room or 1), room)
        )

    def remove_attribute(self, name: str, key: str, follow: bool) -> None:
        self._kept(name, key, follow, errno.EPERM)
        os.removexattr(self.at(name), key, follow_symlinks=follow)

    def attributes(self, name: str, follow: bool) -> list[str]:
        return sorted(os.listxattr(self.at(name), follow_symlinks=follow))

    def room(self, name: str) -> int:
        return os.statvfs(self.at(name)).f_namemax


def outcome(acts: Any, act: str, *values: Any) -> Any:
    """The act's result, or its error's name."""
    try:
        return getattr(acts, act)(*values)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    except ValueError as error:  # of mmap, for a file that is too short
        return str(error)


def tree(root: str) -> dict[str, Any]:
    """All that is below *root*: attributes, data, targets, extended attributes."""
    found: dict[str, Any] = {}
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            path = os.path.join(folder, name)
            one = os.lstat(path)
            data = ""
            if stat.S_ISREG(one.st_mode):
                with open(path, "rb") as file:
                    data = md5(file.read()).hexdigest()
            elif stat.S_ISLNK(one.st_mode):
                data = os.readlink(path)
            keys = sorted(os.listxattr(path, follow_symlinks=False))
            values = [[key, os.getxattr(path, key, follow_symlinks=False).decode()] for key in keys]
            found[os.path.relpath(path, root)] = [*about(one), data, values]
    return found


def furnish(root: str) -> None:
    """A file of 10,000 bytes, a directory with one file, and links to both and to nothing."""
    os.makedirs(os.path.join(root, "d"))
    for name in ("a", "d/a"):
        with open(os.path.join(root, name), "wb") as file:
            file.write(name.encode() * (10_000 // len(name)))
    for name, target in (("l", "a"), ("m", "d"), ("n", "nowhere")):
        os.symlink(target, os.path.join(root, name))


def play(acts: Any, script: list[list[Any]]) -> list[Any]:
    """The outcomes of one script."""
    ends = [outcome(acts, *act) for act in script]
    acts.drop_all()
    return ends


def main() -> None:
    root, scripts = sys.argv[1], sys.argv[2]
    with open(scripts) as file:
        todo = json.load(file)
    os.umask(0)
    for at, script in enumerate(todo):
        folder = os.path.join(root, str(at))
        furnish(folder)
        print(json.dumps([play(Direct(folder), script), tree(folder)]))


if __name__ == "__main__":
    main()
