"""The lease on ksmd, which the whole host shares: who uses it, and the settings that were found.

Three files in a directory of the account: ``users``, locked shared by each machine that merges (flock(2): such a lock
ends with its holder, however that ends); ``guard``, locked while the record or ksmd's settings are changed; and the
``record`` of what was found and set. The last user puts the settings back. Should it be killed, a watcher does, a small
process that waits for the lock on ``users``. Should that be killed too, the next user finds a record without users.

This file is also the watcher's program (``python -I -S lease.py FOLDER KSM``), and therefore imports nothing that the
standard library lacks.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

TYPE_CHECKING = False  # typing is slow to import, and the watcher stays small

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

__all__ = ["KSM", "HeldError", "Lease", "read_settings", "watch"]

KSM = Path("/sys/kernel/mm/ksm")
SETTINGS = (
    *("run", "advisor_mode", "advisor_target_scan_time", "advisor_max_cpu", "pages_to_scan", "sleep_millisecs"),
    *("smart_scan", "use_zero_pages", "max_page_sharing"),
)
"""Settings that may be changed, in the order of restoring: ksmd stops first, its advisor releases pages_to_scan."""


class HeldError(Exception):
    """Others have the lease: ``str()`` says who."""


def read_settings(ksm: Path) -> dict[str, str]:
    """ksmd's settings here; of a choice (``[none] scan-time``) the chosen word."""
    found = {}
    for name in SETTINGS:
        try:
            text = (ksm / name).read_text().strip()
        except OSError:  # this kernel has no such setting
            continue
        found[name] = next((word[1:-1] for word in text.split() if word.startswith("[")), text)
    return found


class Lease:
    """One user of ksmd, or somebody who only looks.

    Args:
        folder: where the files are. ksm: ksmd's directory.
    """

    def __init__(self, folder: Path, ksm: Path = KSM) -> None:
        self._folder, self._ksm = folder, ksm
        self._record = folder / "record"
        flags = os.O_CREAT | os.O_RDWR | os.O_CLOEXEC
        self._users, self._guard = os.open(folder / "users", flags, 0o600), os.open(folder / "guard", flags, 0o600)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        fcntl.flock(self._guard, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._guard, fcntl.LOCK_UN)

    def _lock(self, how: int) -> bool:
        """True if the lock on ``users`` could be had at once."""
        try:
            fcntl.flock(self._users, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def record(self) -> dict[str, Any]:
        """The record: ``found`` and ``set`` (settings), ``group``, ``who``; empty if missing or broken."""
        try:
            table = json.loads(self._record.read_text())
            if {"found", "set", "group", "who"} <= set(table):
                return dict(table)
        except (OSError, ValueError, TypeError):  # not there, or cut short by a crash of the host
            return {}
        return {}

    def _write(self, record: dict[str, Any]) -> None:
        new = self._folder / "record.new"
        new.write_text(json.dumps(record))
        new.rename(self._record)

    def left_over(self) -> bool:
        """True if there is a record that nobody uses, and no watcher has dealt with."""
        with self._guarded():
            if not self.record() or not self._lock(fcntl.LOCK_EX):
                return False
            fcntl.flock(self._users, fcntl.LOCK_UN)
            return True

    def join(self, group: str | None, who: str, settings: dict[str, str]) -> list[str]:
        """Become a user; the first user sets *settings*; returns what the kernel refused.

        Args:
            group: who merges with whom; all users at a time are of one group. who: this user, for others to read.
            settings: name to value, in the order of setting; none are changed where ksmd runs already.

        Raises HeldError while users of another group have it.
        """
        while True:
            with self._guarded():
                alone = self._lock(fcntl.LOCK_EX)
                record = self.record()
                if alone:
                    self._put_back(record)  # left by a crash of all its users and of the watcher
                if self._lock(fcntl.LOCK_SH):
                    if alone:
                        return self._begin(group, who, settings)
                    if record.get("group") == group:
                        return []
                    fcntl.flock(self._users, fcntl.LOCK_UN)
                    held, mine = record.get("group") or "no label", group or "a machine without a label"
                    raise HeldError(
                        f"the whole host shares ksmd, and {record.get('who')} ({held}) is using it: {mine} may not"
                    )
            time.sleep(0.005)  # a watcher has the lock and waits for the guard: let it

    def _begin(self, group: str | None, who: str, settings: dict[str, str]) -> list[str]:
        found = read_settings(self._ksm)
        mine = {} if found.get("run") == "1" else {name: value for name, value in settings.items() if name in found}
        self._write({"found": found, "set": mine, "group": group, "who": who})  # before anything changes
        self._start_watcher()
        refused = []
        for name, value in mine.items():
            try:
                if found[name] != value:
                    (self._ksm / name).write_text(value)
            except OSError as error:  # no permission; max_page_sharing while there are merged pages
                refused.append(f"{name}={value}: {error.strerror}")
        return refused

    def leave(self) -> None:
        """Cease to be a user; the last user restores the settings. Idempotent."""
        if self._users < 0:
            return
        with self._guarded():
            fcntl.flock(self._users, fcntl.LOCK_UN)
            # The last, or the watcher was quicker and waits for the guard: then the lock is held exclusively.
            if self._lock(fcntl.LOCK_EX) or not self._lock(fcntl.LOCK_SH):
                self._put_back(self.record())
            fcntl.flock(self._users, fcntl.LOCK_UN)
        self.close()

    def close(self) -> None:
        """Let go of the files. Idempotent."""
        for fd in (self._users, self._guard):
            if fd >= 0:
                os.close(fd)
        self._users = self._guard = -1

    def restore(self) -> bool:
        """Restore the settings of a record that nobody uses; True if there was such a record."""
        with self._guarded():
            record = self.record()
            if not record or not self._lock(fcntl.LOCK_EX):
                return False
            self._put_back(record)
            fcntl.flock(self._users, fcntl.LOCK_UN)
            return True

    def _put_back(self, record: dict[str, Any]) -> None:
        """Restore the settings, except those that somebody else has changed since (the advisor is nobody else)."""
        now, mine, found = read_settings(self._ksm), record.get("set", {}), record.get("found", {})
        ours = {name for name in mine if now.get(name) == mine[name] != found.get(name, mine[name])}
        was, wanted, here = (one.get("advisor_mode") for one in (found, mine, now))
        if was != wanted and here in (was, wanted):  # it sets pages_to_scan, and so does the kernel when it goes
            ours.add("pages_to_scan")
        for name in (one for one in SETTINGS if one in ours and one in found):
            try:
                (self._ksm / name).write_text(found[name])
            except OSError as error:
                print(f"KSM: {name} could not be restored to {found[name]}: {error.strerror}", file=sys.stderr)
        self._record.unlink(missing_ok=True)

    # the watcher

    def _start_watcher(self) -> None:
        """A process of its own session; returns once it watches (its parent half has ended)."""
        command = [sys.executable, "-I", "-S", __file__, str(self._folder), str(self._ksm)]
        subprocess.run(command, stdin=subprocess.DEVNULL, cwd="/", start_new_session=True, check=True)

    def wait_and_restore(self) -> None:
        """Wait until nobody uses ksmd, and put the settings back unless the last user has."""
        fcntl.flock(self._users, fcntl.LOCK_EX)
        with self._guarded():
            self._put_back(self.record())


def watch(folder: str, ksm: str) -> None:
    """The watcher: goes to the background, and waits."""
    lease = Lease(Path(folder), Path(ksm))
    if os.fork():
        os._exit(0)
    null = os.open("/dev/null", os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    lease.wait_and_restore()


if __name__ == "__main__":
    watch(sys.argv[1], sys.argv[2])
