"""Files whose lock ends with their holder: flock(2), which the kernel lets go of however a process ends."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from cardcage.values import define

__all__ = ["HeldFile", "hold", "is_held", "is_held_by", "is_locked"]


@define(eq=False)
class HeldFile:
    """A file that is ours while this is open.

    Attributes:
        path: where it is. fd: the open file, locked; -1 once closed.
    """

    path: Path
    fd: int

    def close(self) -> None:
        """Remove the file, and let go. Idempotent."""
        if self.fd >= 0:
            self.path.unlink(missing_ok=True)  # while it is still locked: nobody else has it
            os.close(self.fd)
            self.fd = -1


def hold(path: Path) -> HeldFile | None:
    """Make the file at *path*, or take over one left behind; None when somebody holds it. Raises OSError."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            there = os.stat(path)
        except (BlockingIOError, FileNotFoundError) as error:
            os.close(fd)
            if isinstance(error, BlockingIOError):
                return None
            continue  # its last holder removed it between our open and our lock
        if there.st_ino == os.fstat(fd).st_ino:
            return HeldFile(path, fd)
        os.close(fd)


def is_held(path: Path) -> bool:
    """True while somebody holds the file at *path*. Raises OSError, but not for a file that is not there."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    try:
        return is_locked(fd)
    finally:
        os.close(fd)


def is_locked(fd: int) -> bool:
    """True while another open file has *fd*'s file locked; a lock that was free is let go of when *fd* is closed."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def is_held_by(pid: int, path: Path) -> bool:
    """True when process *pid* has the file at *path* open, and it was that process that locked it.

    Both by the kernel's word (``fdinfo`` in proc(5)): what the file says of its holder may be anybody's. False for a
    process that is gone, or that is not ours to look at.
    """
    try:
        there = os.lstat(path)
        numbers = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return False
    for number in numbers:
        with suppress(OSError):  # it has closed this one meanwhile
            if os.path.samestat(os.stat(f"/proc/{pid}/fd/{number}"), there):
                lines = Path(f"/proc/{pid}/fdinfo/{number}").read_text().splitlines()
                if any(line.startswith("lock:") and line.split()[2:6:3] == ["FLOCK", str(pid)] for line in lines):
                    return True
    return False
