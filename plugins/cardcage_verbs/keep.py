"""Files of a bounded size that keep what was written last: back end ``char:log``, and a detached machine's log."""

from __future__ import annotations

import fcntl
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import field
from attrs.validators import ge
from cardcage.config import HostPath
from cardcage.security import Needs
from cardcage.units import Size
from cardcage.values import frozen
from cardcage_fleet.roster import Roster
from cardcage_fleet.rundir import run_directory

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.device import Slot
    from cardcage.machine import Machine
    from cardcage_cli import Detaching

__all__ = ["KeptFile", "LogOptions", "is_written", "keep_log", "log_of", "open_log", "parse_path"]

SIZE = 1 << 20
LOGS = 64
"""Logs of machines that ended which are kept."""


@frozen
class LogOptions:
    """Options of ``char:log``.

    Attributes:
        path: the file; the one before it gets ``.1`` behind its name.
        size: bytes of each of the two, at least 4K.
    """

    path: HostPath
    size: Size = field(default=Size(SIZE), validator=ge(Size(4096)))


def parse_path(text: str) -> dict[str, object]:
    """Shorthand: ``"log:PATH"``."""
    return {"path": text}


class KeptFile:
    """A file that is begun anew when it is full. Thread-safe.

    Args:
        size: bytes that fill it.
        others: descriptors that follow to the new file, where they are of the old one.
        held: keep the file locked until the process ends (:func:`is_written`): it must not be closed before.

    Attributes:
        fd: open for writing; the same number for the life of this object, whatever file it is.
    """

    def __init__(self, path: Path, size: int, others: tuple[int, ...] = (), held: bool = False) -> None:
        self.path, self._size, self._others, self._held, self._lock = path, size, others, held, threading.Lock()
        self.fd = self._open()
        self._hold()

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(self.path, flags, 0o600)

    def write(self, data: bytes) -> None:
        """Add *data*, as far as the disk takes it."""
        for at in range(0, len(data), 4096):
            with suppress(OSError):  # a full disk is no reason to stop a machine
                os.write(self.fd, data[at : at + 4096])
            self.turn()

    def turn(self) -> None:
        """Begin anew if the file is full."""
        with self._lock, suppress(OSError):
            full = os.fstat(self.fd)
            if full.st_size < self._size:
                return
            os.rename(self.path, f"{self.path}.1")
            fresh = self._open()
            for fd in (self.fd, *self._others):
                if os.path.samestat(os.fstat(fd), full):
                    os.dup2(fresh, fd, inheritable=fd != self.fd)
            os.close(fresh)
            self._hold()  # last: a close of any descriptor of a file lets go of it (fcntl(2))

    def _hold(self) -> None:
        if self._held:
            fcntl.lockf(self.fd, fcntl.LOCK_EX)  # who looks (is_written) has it for a moment

    def close(self) -> None:
        """Close it; it stays where it is."""
        os.close(self.fd)


class LogBackend:
    """``char:log``."""

    def __init__(self, file: KeptFile) -> None:
        self._file = file

    def start(self, received: Callable[[bytes], None], /) -> None:
        """Nothing will be received."""

    def write(self, data: bytes, /) -> None:
        self._file.write(data)

    def needs(self) -> Needs:
        """Files are made and renamed in its directory."""
        return Needs(write=(os.path.dirname(os.path.abspath(self._file.path)),))

    def close(self) -> None:
        self._file.close()


class ProcessLog(LogBackend):
    """The log of a detached machine: the process's own streams go there too, so that it stays when the machine ends."""

    def close(self) -> None:
        """The file is closed when the process ends."""


def open_log(slot: Slot, options: LogOptions) -> LogBackend:
    """Back end ``char:log``. Raises OSError."""
    slot.host.ask("image", options.path, ("create", "write"))
    return LogBackend(KeptFile(Path(options.path), options.size))


# a detached machine


def log_of(name: str) -> Path:
    """Where a detached machine's log is kept: ``logs/NAME.log`` in the run directory."""
    return run_directory("logs") / f"{name.replace('/', '_')}.log"


def keep_log(machine: Machine, leaving: Detaching) -> None:
    """Open the log of a machine that is about to be left running; its console goes there, unless it goes elsewhere."""
    path = log_of(machine.name)
    tidy(path.parent)
    for old in (path, Path(f"{path}.1")):
        old.unlink(missing_ok=True)
    file = KeptFile(path, SIZE // 2, (1, 2), held=True)
    leaving.output, leaving.written = file.fd, file.turn
    if machine.console.claimed and machine.console.forward is None:
        machine.console.connect(ProcessLog(file))


def is_written(path: Path) -> bool:
    """True while the process of a detached machine, and not a copy of it (fork), has more to say in its log.

    It holds the log by a lock of fcntl(2), which ends with the process: how a machine ended is said once it has given
    all back, its place on the roster too.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def tidy(folder: Path) -> None:
    """Remove the oldest logs of machines that run no more."""
    alive = {log_of(one.name).name for one in Roster().read()[0]}
    found: list[tuple[float, Path]] = []
    for path in folder.glob("*.log"):
        with suppress(OSError):  # another process tidies too
            if path.name not in alive:
                found.append((path.stat().st_mtime, path))
    for _, path in sorted(found)[: -LOGS or None]:
        for one in (path, Path(f"{path}.1")):
            one.unlink(missing_ok=True)
