"""The machines that run on this host, of this user, in whichever process: a private directory with a folder for each.

A machine's folder is the only one that its process may write in its jail, and the copies that are made of it there have
their files in it too; its name says whose it is. So a guest that broke out can lie about its own machine, and about no
other: what is in a folder has the name of the folder's machine, with more behind it or not.

The file of a machine is locked (flock) by its process for as long as it lives, so that one left behind by a process
that was killed is known for what it is, whatever became of its pid. It says what /proc cannot: which memory of which
process is whose. A machine with a balloon also has a socket, which answers with what the guest gave when it is asked.

The directory is the run directory (:mod:`cardcage_fleet.rundir`): another user can neither see nor add to it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import time
import weakref
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import asdict, field, fields
from cardcage.values import frozen
from cardcage_jail import is_ours, listen_at

from cardcage_fleet.held import is_locked
from cardcage_fleet.rundir import run_directory

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

__all__ = ["BROKERS", "Record", "Roster", "RosterEntry", "ask", "connected", "is_ours"]

MOST = 16384
"""Bytes of an entry or an answer: what is longer is not ours."""
PID_MAX = 1 << 22
"""Linux has no higher process id."""
MACHINES = "machines"
"""Of the run directory: with the machines' folders, whose names are a process, a number, this mark, and a name."""
BROKERS = "brokers"
"""Of the run directory, with the sockets of jails' brokers."""
MARK, MARKED = "+", 180
FILES = 4096
"""Files of a folder that are looked at: a machine and a thousand copies have three each."""
KEPT = 24 * 3600
"""Seconds that an entry of a machine that was killed waits for somebody to read of it."""


@frozen
class RosterEntry:
    """A machine on the roster.

    Attributes:
        name, pid, state, accelerator, label: the machine's. backend: where its memory comes from (``memory.type``).
        size: bytes of RAM. promised: bytes of it that admission counts (not those out of a pool of huge pages).
        cpus: number of vCPUs, 0 for unknown.
        start: address of RAM in the process, 0 before there is any. balloon: whether its socket can be asked.
        priority: ``machine.priority``. group: path of its memory cgroup, empty for none.
        group_folder: where that is mounted. group_version: 1 or 2.
        oom_kills: how many processes of the group the OOM killer had ended when the machine was made; -1 for unknown.
        since: seconds since 1970. namespace: of the process ids.
        code: name of the memfd with the accelerator's generated code, empty without any.
        file: the entry's file; set when it is read.
    """

    name: str
    pid: int
    size: int
    state: str = "built"
    accelerator: str = ""
    label: str = ""
    backend: str = ""
    promised: int = 0
    start: int = 0
    balloon: bool = False
    cpus: int = 0
    priority: int = 0
    group: str = ""
    group_folder: str = ""
    group_version: int = 0
    oom_kills: int = -1
    since: float = 0.0
    namespace: str = ""
    code: str = ""
    file: str = field(default="", eq=False)

    @property
    def broker(self) -> str:
        """Where files are lent to the machine (:func:`cardcage_jail.lend`), by the name of its folder, not its word."""
        folder = Path(self.file).parent
        return str(folder.parent.parent / BROKERS / folder.name.partition(MARK)[0])

    @property
    def here(self) -> bool:
        """True when :attr:`pid` means the same process to us."""
        return self.namespace == pid_namespace()


def pid_namespace() -> str:
    """The mark of this process's namespace of process ids."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


class Roster:
    """The directory. Raises HostError when there is none that is private to this user.

    Args:
        directory: another than the run directory.
        known: what was read before, by file; a dictionary that is handed from one roster to the next.
    """

    def __init__(
        self, directory: Path | None = None, known: dict[Path, tuple[bytes, RosterEntry]] | None = None
    ) -> None:
        self.directory = directory if directory is not None else run_directory()
        self._known = {} if known is None else known

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else adds a machine while the block runs: admission decides in it. Waits for others."""
        fd = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def add(self, entry: RosterEntry) -> Record:
        """Put a machine of this process on the roster, until the record is closed."""
        machines = self.directory / MACHINES
        machines.mkdir(mode=0o700, exist_ok=True)
        taken = {one.partition(MARK)[0] for one in os.listdir(machines)}
        number = 0
        while True:
            if (stem := f"{os.getpid()}-{number}") not in taken:
                folder = machines / f"{stem}{MARK}{mark_of(entry.name)}"
                with suppress(FileExistsError):
                    folder.mkdir(mode=0o700)
                    return Record(folder / f"{stem}.json", asdict(entry))
            number += 1

    def read(self) -> tuple[list[RosterEntry], list[RosterEntry], list[str]]:
        """The machines that live, those that ended without a word, and what is wrong with files there."""
        alive: list[RosterEntry] = []
        ended: list[RosterEntry] = []
        problems: list[str] = []
        paths = [path for folder in self._folders() for path in entries_in(folder)]
        for gone in self._known.keys() - set(paths):
            del self._known[gone]
        for path in paths:
            try:
                text, lives = read_entry(path)
                entry = self._parsed(path, text)
                if not is_marked(path.parent.name, entry.name):
                    raise ValueError("in the folder of a machine with another name")
            except FileNotFoundError:
                continue  # closed while we looked
            except (OSError, ValueError) as error:
                problems.append(f"{path}: no entry of a machine: {error}")
                continue
            (alive if lives else ended).append(entry)
        return alive, ended, problems

    def _folders(self) -> list[Path]:
        """The machines' folders; none for a process in its jail."""
        with suppress(FileNotFoundError, PermissionError), os.scandir(self.directory / MACHINES) as found:
            return sorted(Path(one.path) for one in found if MARK in one.name)
        return []

    def _parsed(self, path: Path, text: bytes) -> RosterEntry:
        """The entry in *text*; a file that did not change is not parsed again."""
        known = self._known.get(path)
        if known is None or known[0] != text:
            known = self._known[path] = text, parse_entry(text, str(path))
        return known[1]

    def forget(self, entry: RosterEntry) -> None:
        """Take the entry of a machine that ended without a word off the roster."""
        leave(Path(entry.file), os.getpid())

    def tidy(self, ended: list[RosterEntry]) -> None:
        """Forget those that ended a day ago, and that nobody asked about; and the folders of those that are gone."""
        for entry in ended:
            if time.time() - entry.since > KEPT:
                with suppress(OSError):
                    if time.time() - os.stat(entry.file).st_mtime > KEPT:
                        self.forget(entry)
        for folder in self._folders():
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def mark_of(name: str) -> str:
    """A machine's name, or the beginning of a long one, as the name of its folder has it."""
    from urllib.parse import quote

    return quote(printable(name), safe=" ")[:MARKED]


def is_marked(folder: str, name: str) -> bool:
    """True when a machine called *name* may be in *folder*: it is that one's, or a copy of it."""
    mark, given = folder.partition(MARK)[2], mark_of(name)
    return given == mark or given.startswith(mark if len(mark) == MARKED else f"{mark}-")


def entries_in(folder: Path) -> list[Path]:
    """Entries in a machine's folder, as many as there may be: whoever broke out may have put anything there."""
    found: list[Path] = []
    with suppress(OSError), os.scandir(folder) as files:
        for _, one in zip(range(FILES), files, strict=False):
            if one.name.endswith(".json") and not one.name.startswith("."):
                found.append(Path(one.path))
    return sorted(found)


def read_entry(path: Path) -> tuple[bytes, bool]:
    """Return an entry's text, and True when its machine lives. Raises OSError or ValueError for what is none."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid():
            raise ValueError("not a file of this user's")
        text = os.pread(fd, MOST + 1, 0)
        lives = is_locked(fd)
    finally:
        os.close(fd)
    return text, lives


def parse_entry(text: bytes, file: str = "") -> RosterEntry:
    """An entry out of what a file holds, which may be anything. Raises ValueError."""
    if len(text) > MOST:
        raise ValueError(f"longer than {MOST} bytes")
    table = load(text)
    kinds: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "bool": (bool,), "float": (int, float)}
    values: dict[str, Any] = {}
    for one in fields(RosterEntry):
        if one.name == "file" or one.name not in table:
            continue
        value = table[one.name]
        kind = str(one.type)
        if type(value) not in kinds[kind]:
            raise ValueError(f"{one.name}: expected {kind}")
        if isinstance(value, int) and not -(1 << 62) < value < 1 << 62:
            raise ValueError(f"{one.name}: out of range")
        values[one.name] = printable(value) if isinstance(value, str) else value
    missing = [name for name in ("name", "pid", "size") if name not in values]
    if missing or not 0 < values["pid"] <= PID_MAX or values["size"] < 0 or values.get("start", 0) < 0:
        raise ValueError(f"{', '.join(missing) or 'pid, size or start'}: expected, or out of range")
    return RosterEntry(**values, file=file)


def printable(text: str) -> str:
    """*text* without what moves a terminal's cursor."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def load(text: bytes) -> dict[str, Any]:
    """A table out of JSON. Raises ValueError for anything else, however deep."""
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError("no table")
    return found


class Record:
    """A machine on the roster: its locked file, and its socket."""

    def __init__(self, path: Path, entry: dict[str, Any]) -> None:
        self._table, self._path = {**entry, "file": str(path)}, path
        self._size, self._texts = 0, dict[str, bytes]()
        self._socket: socket.socket | None = None
        hidden = path.with_name(f".{path.name}")
        self._fd = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._write()
            self._leave = weakref.finalize(self, leave, path, os.getpid())  # for a program that ends without close()
            os.link(hidden, path)  # seen only now that it is locked, so that nobody takes it for one left behind
        except BaseException as error:
            if isinstance(error, FileExistsError):  # another machine's of this process
                self._leave.detach()
            os.close(self._fd)
            raise
        finally:
            os.unlink(hidden)

    @property
    def entry(self) -> RosterEntry:
        """Its contents now."""
        return RosterEntry(**self._table)

    def _write(self) -> None:
        if (state := self._table["state"]) not in self._texts:  # a debugger's steps come here twice each
            self._texts[state] = json.dumps(self._table).encode()
        text = self._texts[state].ljust(self._size)
        if len(text) > self._size:
            self._size = len(text)
            os.ftruncate(self._fd, self._size)
        os.pwrite(self._fd, text, 0)

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self._path.parent

    def update(self, **changes: Any) -> None:
        """Say something new about the machine. Nothing once closed."""
        if self._fd >= 0:
            self._table |= changes
            if changes.keys() != {"state"}:
                self._texts.clear()
            self._write()

    def listen(self) -> socket.socket:
        """Open the socket that :func:`ask` finds. The caller answers with :meth:`answer` whenever it is readable."""
        self._socket = listen_at(str(self._path.with_suffix(".sock")))
        self.update(balloon=True)
        return self._socket

    def answer(self, tell: Callable[[], dict[str, int]]) -> None:
        """Take one caller, and tell it. A caller of another user's is sent away; none is waited for."""
        if self._socket is None:
            return
        with suppress(OSError):  # the caller went away, or does not read: its own loss
            caller, _ = self._socket.accept()
            with caller:
                if is_ours(caller):
                    caller.setblocking(False)
                    caller.send(json.dumps(tell()).encode())

    def abandon(self) -> int:
        """This is a forked process, and the entry the parent's: let go of it. The descriptor of its socket, or -1."""
        self._leave.detach()
        os.close(self._fd)
        self._fd = -1  # the lock is the parent's alone: it was the open file's
        peer, self._socket = self._socket, None
        fd = -1 if peer is None else peer.fileno()
        if peer is not None:
            peer.close()
        return fd

    def copy(self, facts: dict[str, Any]) -> Record:
        """Put a copy of the machine on the roster, with other *facts*: a machine of this process, which was forked. Its
        entry is in the machine's folder, which this process may write also in a jail. Raises OSError."""
        for number in range(FILES):
            with suppress(FileExistsError):  # left behind by a process that was killed
                return Record(self.folder / f"{os.getpid()}-{number}.json", self._table | facts)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self.folder))

    def close(self) -> None:
        """Off the roster. Idempotent."""
        if self._fd < 0:
            return
        if self._socket is not None:
            self._socket.close()
        self._leave()
        os.close(self._fd)
        self._fd = -1


def leave(path: Path, pid: int) -> None:
    """Take a machine of process *pid* off the roster; its forked children leave it there.

    In its jail the process may not remove the folder: whoever adds a machine next does.
    """
    if os.getpid() == pid:
        for suffix in (".sock", ".control"):
            path.with_suffix(suffix).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        with suppress(OSError):  # copies of it are there
            path.parent.rmdir()


def connected(path: Path, timeout: float) -> socket.socket:
    """A socket that is connected to who listens at *path*; each of its acts takes up to *timeout*. Raises OSError."""
    import socket

    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    folder = os.open(path.parent, os.O_PATH | os.O_CLOEXEC)
    try:
        peer.settimeout(timeout)
        peer.connect(f"/proc/self/fd/{folder}/{path.name}")
    except BaseException:
        peer.close()
        raise
    finally:
        os.close(folder)
    return peer


def ask(entry: RosterEntry, timeout: float = 0.2) -> dict[str, int] | None:
    """The figures of the machine's balloon, bytes by name; ``None`` when it has none, or does not answer in time."""
    if not entry.balloon:
        return None
    try:
        with connected(Path(entry.file).with_suffix(".sock"), timeout) as peer:
            text = b""
            while len(text) <= MOST and (part := peer.recv(4096)):
                text += part
        found = load(text)
    except (OSError, ValueError):
        return None
    return {str(name): value for name, value in found.items() if type(value) is int and 0 <= value < 1 << 62}
