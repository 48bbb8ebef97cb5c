"""The directory: a file for each machine, locked by its process, so that the lock ends when the process does."""

import fcntl
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attrs import asdict, evolve, frozen
from cardcage.errors import HostError


@frozen
class Entry:
    """A machine. ``memory`` is in bytes."""

    name: str
    pid: int
    memory: int
    state: str = "built"


class Ledger:
    """The machines of this user. Raises HostError where no private directory can be kept."""

    def __init__(self) -> None:
        runtime = os.environ.get("XDG_RUNTIME_DIR")
        self.folder = Path(runtime, "ledger-card") if runtime else Path(f"/tmp/ledger-card-{os.geteuid()}")
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            found = self.folder.lstat()
        except OSError as error:
            raise HostError(f"{self.folder}: no ledger can be kept there: {error.strerror}") from error
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise HostError(f"{self.folder}: expected a directory of this user's with mode 0700")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else reads the ledger, adds to it or takes from it while the block runs."""
        fd = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def read(self) -> tuple[list[Entry], list[tuple[Entry, Path]]]:
        """The machines that live, and those whose process died, with their files. For use while it is locked."""
        alive: list[Entry] = []
        dead: list[tuple[Entry, Path]] = []
        for path in sorted(self.folder.glob("*.json")):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                entry = Entry(**json.loads(os.read(fd, 1 << 16)))
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                dead.append((entry, path))
            except BlockingIOError:
                alive.append(entry)
            except (ValueError, TypeError):  # its process died while it wrote
                dead.append((Entry(path.name, 0, 0), path))
            finally:
                os.close(fd)
        return alive, dead


class Record:
    """The entry of a machine of this process. To be made while the ledger is locked."""

    def __init__(self, ledger: Ledger, entry: Entry) -> None:
        self._ledger, self.entry = ledger, entry
        numbers = (ledger.folder / f"{os.getpid()}-{at}.json" for at in range(1 << 16))
        self._path = next(path for path in numbers if not path.exists())
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        self.update(entry.state)

    def update(self, state: str) -> None:
        """Write the machine's state, in one piece; nothing once abandoned."""
        if self._fd < 0:
            return
        self.entry = evolve(self.entry, state=str(state))
        text = json.dumps(asdict(self.entry)).encode()
        os.pwrite(self._fd, text.ljust(os.fstat(self._fd).st_size), 0)

    def abandon(self) -> None:
        """This is a forked process: the entry, and its lock, are the parent's."""
        os.close(self._fd)
        self._fd = -1

    def close(self) -> None:
        """Take the machine off the ledger."""
        if self._fd >= 0:
            with self._ledger.locked():
                self._path.unlink(missing_ok=True)
                os.close(self._fd)
