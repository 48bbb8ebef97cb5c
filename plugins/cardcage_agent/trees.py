"""Directories, copied into a guest and out of it: regular files, directories and symbolic links."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from typing import TYPE_CHECKING

from cardcage_agent.errors import AgentError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cardcage_agent.files import Files

__all__ = ["DEPTH", "get_file", "get_tree", "put_file", "put_tree"]

DEPTH = 256
"""Levels of directories."""
PIECE = 1 << 20


class Budget:
    """Bytes that may still be fetched; None for no limit. Raises AgentError for more."""

    def __init__(self, limit: int | None, what: str) -> None:
        self._left, self._limit, self._what = limit, limit, what

    def take(self, size: int) -> None:
        """*size* bytes came."""
        if self._left is not None:
            self._left -= size
            if self._left < 0:
                raise AgentError(f"{self._what}: more than {self._limit} bytes")


def put_file(files: Files, source: str, target: str, timeout: float | None) -> None:
    """Copy a file, with its permission bits."""
    with open(source, "rb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        pieces: Iterator[bytes] = iter(lambda: file.read(PIECE), b"")
        files.write(target, pieces, mode=mode, timeout=timeout)


def put_tree(files: Files, source: str, target: str, timeout: float | None, depth: int = 0) -> None:
    """Copy what is in directory *source* of this host into *target* of the guest, which is made where there is none."""
    if depth == DEPTH:
        raise AgentError(f"{source}: more than {DEPTH} levels of directories")
    files.mkdir(target, mode=stat.S_IMODE(os.stat(source).st_mode), parents=True, timeout=timeout)
    for one in sorted(os.scandir(source), key=lambda entry: entry.name):
        path = f"{target.rstrip('/')}/{one.name}"
        if one.is_symlink():
            files.symlink(os.readlink(one.path), path, timeout=timeout)
        elif one.is_dir(follow_symlinks=False):
            put_tree(files, one.path, path, timeout, depth + 1)
        elif one.is_file(follow_symlinks=False):
            put_file(files, one.path, path, timeout)


def get_file(files: Files, source: str, target: str, limit: int | None, timeout: float | None) -> None:
    """Copy a file: *target* is there once it is whole."""
    handle, name = tempfile.mkstemp(dir=os.path.dirname(target) or ".", prefix=".get-")
    try:
        with open(handle, "wb") as file:
            budget = Budget(limit, files.name_of(source))
            for piece in files.chunks(source, timeout=timeout):
                budget.take(len(piece))
                file.write(piece)
            os.fchmod(file.fileno(), 0o666 & ~_umask())
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise


def get_tree(files: Files, source: str, target: str, limit: int | None, timeout: float | None) -> None:
    """Copy a directory: *target*, which must not be there, is there once it is whole.

    It is made beside, where nobody else writes. The guest chooses what is in it: a name never has a ``/``, and a link
    is made and not followed, so that nothing goes elsewhere.
    """
    if os.path.lexists(target):
        raise FileExistsError(f"{target}: exists; a directory of a guest is copied to a new one")
    scratch = tempfile.mkdtemp(dir=os.path.dirname(target.rstrip("/")) or ".", prefix=".get-")
    try:
        _fetch(files, source, scratch, Budget(limit, files.name_of(source)), timeout, 0)
        os.chmod(scratch, 0o777 & ~_umask())
        os.rename(scratch, target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _fetch(files: Files, source: str, target: str, budget: Budget, timeout: float | None, depth: int) -> None:
    if depth == DEPTH:
        raise AgentError(f"{files.name_of(source)}: more than {DEPTH} levels of directories")
    for one in files.list(source, timeout=timeout):
        path, here = f"{source.rstrip('/')}/{one.name}", os.path.join(target, one.name)
        budget.take(len(one.name) + 1)  # so that empty files are bounded, too
        if one.is_symlink:
            link = files.readlink(path, timeout=timeout)
            budget.take(len(link))
            os.symlink(link, here)
        elif one.is_dir:
            os.mkdir(here)
            _fetch(files, path, here, budget, timeout, depth + 1)
            os.chmod(here, one.mode & 0o777 & ~_umask() | 0o700)
        elif one.is_file:
            with open(here, "xb") as file:
                for piece in files.chunks(path, timeout=timeout):
                    budget.take(len(piece))
                    file.write(piece)
                os.fchmod(file.fileno(), one.mode & 0o777 & ~_umask() | 0o600)


def _umask() -> int:
    """This process's umask, which can only be read by writing it, from a file that always has it (proc(5))."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1], 8) for line in status if line.startswith("Umask:"))
