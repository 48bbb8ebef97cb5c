"""The cache folder: whole things appear in it at once, and two runs may use it at the same time."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cardcage.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["cache_root", "locked", "publish_file", "publish_folder"]


def cache_root() -> Path:
    """``$XDG_CACHE_HOME/cardcage``, by default ``~/.cache/cardcage``; made when it is not there.

    (freedesktop.org, XDG Base Directory Specification: a relative path there is ignored.) Raises HostError.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "cardcage"
        root.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        raise HostError(
            f"the cache directory cannot be created: {error}; set XDG_CACHE_HOME to a writable directory"
        ) from error
    return root


@contextmanager
def locked(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock file *path*; *waiting* is called once when another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield  # closing the file gives the lock back


def publish_file(path: Path, data: bytes, advice: str = "; XDG_CACHE_HOME moves the cache") -> None:
    """Write a file that appears whole or not at all. Raises HostError, which ends with *advice*."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise HostError(f"{path.parent}: cannot be written: {error.strerror}{advice}") from error


@contextmanager
def publish_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill; leaving the block without an error gives it the name *path*, replacing what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=path.parent, prefix=".new-"))
    try:
        yield fresh
        fresh.chmod(0o755)
        if path.exists():
            path.rename(fresh.with_name(f"{fresh.name}-old"))
        fresh.rename(path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(fresh.with_name(f"{fresh.name}-old"), ignore_errors=True)
