"""The run directory: where processes of one account meet on this host, by small files with locks."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cardcage.errors import HostError

__all__ = ["run_directory"]


def run_directory(name: str = "") -> Path:
    """Return a directory that only this user can see, made when it is not there: *name* below the run directory.

    It is ``$XDG_RUNTIME_DIR/cardcage``, else ``/run/user/UID/cardcage`` (for root ``/run/cardcage``), else
    ``/tmp/cardcage-UID``. Raises HostError where it cannot be made, or is not this user's own with mode 0700.
    """
    top = _top()
    for folder in (top, top / name) if name else (top,):
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            found = folder.lstat()
        except FileExistsError as error:  # a file, or a link to one
            raise HostError(f"{folder}: expected a directory of this user's with mode 0700") from error
        except OSError as error:
            raise HostError(f"{folder}: no run directory can be kept there: {error.strerror}") from error
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise HostError(f"{folder}: expected a directory of this user's with mode 0700")
    return top / name


def _top() -> Path:
    user, runtime = os.geteuid(), os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime):
        return Path(runtime, "cardcage")
    parents = [Path(f"/run/user/{user}"), *([Path("/run")] if user == 0 else [])]
    for parent in parents:
        if os.access(parent, os.W_OK):
            return parent / "cardcage"
    return Path(f"/tmp/cardcage-{user}")
