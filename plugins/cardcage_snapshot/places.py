"""Where snapshots are: names, directories that are opened without following links, and publishing one in one step."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from cardcage.errors import ConfigError, HostError, UsageError
from cardcage.units import say_size

if TYPE_CHECKING:
    from typing import Self

__all__ = ["NAME", "Folder", "Publication", "located", "printable", "snapshot_root", "state_directory"]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
NOREPLACE, EXCHANGE = 1, 2
"""Flags of renameat2(2)."""
AT_FDCWD = -100


def state_directory() -> Path:
    """``$XDG_STATE_HOME/cardcage``, else ``~/.local/state/cardcage``."""
    told = os.environ.get("XDG_STATE_HOME", "")
    return (Path(told) if os.path.isabs(told) else Path.home() / ".local" / "state") / "cardcage"


def snapshot_root() -> Path:
    """The directory of snapshots that have a name alone."""
    return state_directory() / "snapshots"


def located(where: str | os.PathLike[str]) -> Path:
    """The directory of a snapshot: text without a slash is a name below :func:`snapshot_root`, all else a path.

    Raises UsageError for a name of other letters than ``A-Z a-z 0-9 . _ -``.
    """
    if not isinstance(where, str) or "/" in where:
        path = Path(os.path.abspath(where))
        if path.name:
            return path
    elif NAME.fullmatch(where):
        return snapshot_root() / where
    what = "expected a name of letters, digits and . _ -, or a path with a slash"
    raise UsageError(f'"{os.fspath(where)}" is no name of a snapshot: {what}')


def printable(text: str) -> str:
    """Text of a file for an error or a terminal: one line, without what moves a cursor."""
    return "".join(one if one.isprintable() else "?" for one in text)


def _remove(folder: Path, *, ignore_errors: bool = False) -> None:
    """:func:`shutil.rmtree`, whose module each machine would load otherwise."""
    from shutil import rmtree

    rmtree(folder, ignore_errors=ignore_errors)


class Folder:
    """A snapshot's directory, opened: files in it are reached by their plain names, and no link is followed.

    Raises ConfigError where it is not there, or is no directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise ConfigError("there is no such snapshot", file=str(path)) from error
        except NotADirectoryError as error:
            raise ConfigError("expected the directory of a snapshot", file=str(path)) from error
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"cannot be opened: {why}", file=str(path)) from error

    def where(self, name: str) -> str:
        """The path of file *name*, for errors."""
        return str(self.path / name)

    def open(self, name: str) -> int:
        """A regular file of the directory, for reading. Raises ConfigError for anything else."""
        if not NAME.fullmatch(name):
            raise ConfigError(f"it names a file {name!r:.80}: expected one in its own directory", file=str(self.path))
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self.fd)
        except OSError as error:
            why = "is a link" if error.errno == errno.ELOOP else error.strerror
            raise ConfigError(f"a part of the snapshot cannot be opened: {why}", file=self.where(name)) from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise ConfigError("expected a regular file", file=self.where(name))
        return fd

    def read(self, name: str, most: int) -> bytes:
        """All of a file of at most *most* bytes."""
        fd = self.open(name)
        with open(fd, "rb") as file:
            size = os.fstat(fd).st_size
            if size > most:
                raise ConfigError(f"has {say_size(size)}: expected at most {say_size(most)}", file=self.where(name))
            return file.read(most)

    def close(self) -> None:
        """Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _rename(source: Path, target: Path, flags: int) -> None:
    """renameat2(2). Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flags):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(target))


class Publication:
    """A snapshot's directory while it is written: beside its place, which it takes in one step by :meth:`commit`.

    Args:
        path: the place. replace: take it from a snapshot that is there; else that is an error.

    Left without a commit, nothing of it stays. What a process that was killed left is removed by the next one that
    writes there. Raises ConfigError when the place is taken, HostError when nothing can be written there.
    """

    def __init__(self, path: Path, *, replace: bool = False) -> None:
        self.path, self._replace = path, replace
        self._taken()
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._sweep()
            self.folder = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.new")
            self.folder.mkdir(mode=0o700)
            self.fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise HostError(f"{error.filename or path}: no snapshot can be written: {error.strerror}") from error
        with suppress(OSError):  # a file system without locks: leftovers stay there
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _taken(self) -> None:
        if not os.path.lexists(self.path):
            return
        if not self._replace:
            raise ConfigError("is there already: replace it (--replace), or remove it first", file=str(self.path))
        if self.path.is_symlink() or not (self.path / "manifest.json").is_file():
            raise ConfigError("is no snapshot, and is not replaced by one", file=str(self.path))

    def _sweep(self) -> None:
        """Remove what killed processes left of this snapshot: nobody holds its lock."""
        for one in self.path.parent.glob(f".{self.path.name}.*.new"):
            with suppress(OSError):
                fd = os.open(one, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(one)
                finally:
                    os.close(fd)

    def create(self, name: str) -> int:
        """A new file of the snapshot, readable and writable. The caller closes it. Raises OSError."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(name, flags, 0o600, dir_fd=self.fd)

    def open(self, name: str) -> int:
        """A file of it that was made before, readable and writable. The caller closes it. Raises OSError."""
        return os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)

    def write(self, name: str, data: bytes) -> None:
        """A small file, whole and on stable storage. Raises OSError."""
        with open(self.create(name), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def commit(self) -> None:
        """Take the place. The files are on stable storage by then; so are their names, and the place, afterwards."""
        os.fsync(self.fd)
        if os.path.lexists(self.path) and self._replace:
            self._taken()
            try:
                _rename(self.folder, self.path, EXCHANGE)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    raise HostError(
                        f"{self.path}: this file system cannot replace a directory in one step: remove it first"
                    ) from error
                raise
        else:
            try:
                _rename(self.folder, self.path, NOREPLACE)
            except OSError as error:
                if error.errno == errno.EEXIST:
                    raise ConfigError("is there already: somebody made it meanwhile", file=str(self.path)) from error
                if error.errno != errno.EINVAL:
                    raise
                os.rename(self.folder, self.path)  # a file system without the flag: an empty directory may be replaced
        parent = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        _remove(self.folder, ignore_errors=True)  # what was not published, or what was replaced
        os.close(self.fd)
        if isinstance(error, OSError) and not isinstance(error, HostError):
            raise HostError(f"{self.path}: the snapshot cannot be written: {error.strerror or error}") from error
