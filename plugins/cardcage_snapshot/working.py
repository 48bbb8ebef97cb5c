"""The working set of a snapshot: the pages of its RAM that a guest touches first, once it goes on.

The first machine that is restored of it notes them, in a file beside the manifest; for those that follow, the kernel
reads them ahead while the machine is built, and no vCPU waits for the disk. The file is no part of the snapshot, and
nothing is wrong without it. What is in it is anybody's word: it says only what to read early.
"""

from __future__ import annotations

import json
import os
import threading
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from attrs import define
from cardcage.errors import ConfigError, Denied
from cardcage.ram import PAGE
from cardcage.security import Act

from cardcage_snapshot.hostcalls import write_whole
from cardcage_snapshot.manifest import decoded
from cardcage_snapshot.pages import scanned
from cardcage_snapshot.places import Folder
from cardcage_snapshot.ram import digest
from cardcage_snapshot.sealing import canonical

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from cardcage.machine import Machine

    from cardcage_snapshot.manifest import Manifest
    from cardcage_snapshot.pages import Run

__all__ = ["FILE", "Recorder", "WorkingSet", "fetch", "forget", "known", "record", "without"]

FILE, VERSION = "working-set", 1
HIDDEN = "working-set.new"
RUNS, LARGEST = 8192, 1 << 30
"""Runs that are kept at most, and bytes of them in all."""
MOST = 40 * RUNS
"""Bytes of the file."""
WHOLE = 1.0
"""Seconds that a guest is watched for."""
_recorders: WeakKeyDictionary[Machine, Recorder] = WeakKeyDictionary()


@define
class WorkingSet:
    """Sorted *runs* of RAM, offset and bytes, that a guest touched in its first *seconds*."""

    runs: list[Run]
    seconds: float


def known(folder: Folder, manifest: Manifest) -> WorkingSet | None:
    """The working set as the snapshot's file has it; None without one.

    Raises ConfigError for one that is damaged, or is another snapshot's.
    """
    if not os.path.lexists(folder.path / FILE):
        return None
    where = folder.where(FILE)
    outer = decoded(folder.read(FILE, MOST), where)
    match outer:
        case {"cardcage working set": 1, "snapshot": of, "sum": sum, "seconds": float(seconds), "runs": list(runs)}:
            pass
        case _:
            raise ConfigError(f"no working set: expected one of version {VERSION}", file=where)
    if digest(canonical([of, seconds, runs])) != sum:
        raise ConfigError("is damaged: its sum is not that of its contents", file=where)
    if of != manifest.sum or not 0 <= seconds <= WHOLE:
        raise ConfigError("is of another snapshot", file=where)
    return WorkingSet(list(_checked(runs, manifest.memory, where)), seconds)


def _checked(runs: list[Any], size: int, where: str) -> Iterator[Run]:
    """Runs of pages in a file as runs of bytes. Raises ConfigError."""
    last = held = 0
    for one in runs:
        match one:
            case [int(first), int(count)] if last <= first and count > 0 and (first + count) * PAGE <= size:
                last, held = first + count, held + count * PAGE
                yield first * PAGE, count * PAGE
            case _:
                raise ConfigError("its runs are out of place", file=where)
    if held > LARGEST or len(runs) > RUNS:
        raise ConfigError(f"more than {RUNS} runs, or {LARGEST} bytes", file=where)


def fetch(fd: int, runs: Iterable[Run]) -> threading.Thread:
    """Have the kernel read these parts of a file, on a thread that ends by itself."""

    def read() -> None:
        try:
            with suppress(OSError):  # a file system that does not read ahead
                for offset, size in runs:
                    os.posix_fadvise(kept, offset, size, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(kept)

    kept = os.dup(fd)
    thread = threading.Thread(target=read, name="snapshot-ahead", daemon=True)
    thread.start()
    return thread


def without(runs: Iterable[Run], others: Iterable[Run]) -> list[Run]:
    """Parts of sorted *runs* that are in none of the sorted *others*."""
    found, left = [], list(reversed(list(others)))
    for offset, size in runs:
        at, end = offset, offset + size
        while left and left[-1][0] < end:
            start, length = left[-1]
            if at < start:
                found.append((at, start - at))
            at = max(at, start + length)
            if start + length > end:
                break
            left.pop()
        if at < end:
            found.append((at, end - at))
    return found


class Recorder:
    """Notes what a restored machine's guest touches, from now on, for a second of its time or until it ends.

    Args:
        path: the snapshot's directory. manifest: the snapshot's. before: the seconds that are known already.
        others: parts of its RAM that are there anyway. opened: opens the file now, for a process that can reach nothing
            of the directory by then.
    """

    def __init__(
        self,
        machine: Machine,
        path: Path,
        manifest: Manifest,
        before: float,
        others: list[Run],
        opened: Callable[[], int] | None = None,
    ) -> None:
        self._machine, self._path, self._sum, self._before = machine, path, manifest.sum, before
        self._others, self._block = others, machine.memory.ranges[0].block
        self._fd = -1 if opened is None else opened()
        with machine.lock:
            self._began = machine.clock.now()
            self._timer = machine.clock.timer(lambda: machine.loop.post(self.note))
            self._timer.arm(self._began + int(WHOLE * 1e9))
        machine.defer(self.note)
        _recorders[machine] = self

    def note(self) -> None:
        """Write it down, once."""
        if _recorders.get(self._machine) is not self:
            return
        with self._machine.lock:
            seconds = min((self._machine.clock.now() - self._began) / 1e9, WHOLE)
            self._leave()
        with suppress(OSError, ConfigError):  # before Linux 6.7, nobody may write there, or it is gone: there is none
            if seconds > self._before:
                self._write(without(scanned(self._block, own=False), self._others), seconds)
        self._shut()

    def _write(self, runs: list[Run], seconds: float) -> None:
        """Raises OSError, ConfigError."""
        longest = sorted(runs, key=lambda run: -run[1])[:RUNS]
        held = 0
        kept = [(offset, size) for offset, size in longest if (held := held + size) <= LARGEST]
        pages = [[offset // PAGE, size // PAGE] for offset, size in sorted(kept)]
        sum = digest(canonical([self._sum, seconds, pages]))
        table = {"cardcage working set": VERSION, "snapshot": self._sum, "sum": sum, "seconds": seconds, "runs": pages}
        data = json.dumps(table).encode()
        if self._fd >= 0:
            os.ftruncate(self._fd, 0)
            write_whole(self._fd, data, 0)
        else:
            os.close(_replaced(self._path, data))

    def _leave(self) -> None:
        _recorders.pop(self._machine, None)
        self._timer.cancel()

    def _shut(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def close(self) -> None:
        """Watch no longer. Under the machine's lock."""
        self._leave()
        self._shut()


def _replaced(path: Path, data: bytes) -> int:
    """Put a file with *data* there in place of any other, in one step; its descriptor. Raises OSError, ConfigError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with Folder(path) as folder:
        fd = os.open(HIDDEN, flags, 0o600, dir_fd=folder.fd)
        try:
            write_whole(fd, data, 0)
            os.rename(HIDDEN, FILE, src_dir_fd=folder.fd, dst_dir_fd=folder.fd)
        except BaseException:
            os.close(fd)
            raise
    return fd


def _opened(path: Path, had: WorkingSet | None) -> int:
    """The file, to be written later: what is there stays until then, an empty one is no working set."""
    if had is not None:
        with suppress(OSError):
            return os.open(path / FILE, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    return _replaced(path, b"")


def record(machine: Machine, path: Path, manifest: Manifest, had: WorkingSet | None, others: list[Run]) -> None:
    """Note what the guest of *machine*, which was restored, touches, where *had* is less than that and it may be."""
    before = had.seconds if had is not None else 0.0
    jailed = machine.host.owns_process or "jail" in machine.config.guards  # it will reach nothing of the directory
    if before >= WHOLE or not os.access(path, os.W_OK):
        return
    facts = {"machine": machine.name, "readonly": False}
    with suppress(Denied, OSError, ConfigError):  # nobody may write there, or it is gone
        machine.mediator.ask(Act(machine.label, machine.label, "image", ("create", "write"), facts), str(path / FILE))
        Recorder(machine, path, manifest, before, others, partial(_opened, path, had) if jailed else None)


def forget(machine: Machine) -> None:
    """This is a forked process: what it touches is no restored machine's first second."""
    if (one := _recorders.get(machine)) is not None:
        one.close()
