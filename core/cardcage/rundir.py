"""Where processes of one account meet on this host: small files with locks that end with whoever holds them."""

from __future__ import annotations

import os
from pathlib import Path

from cardcage.errors import HostError

__all__ = ["run_directory"]


def run_directory(name: str) -> Path:
    """``/run/cardcage/name`` for root, ``$XDG_RUNTIME_DIR/cardcage/name`` for others; made when it is not there.

    Raises HostError where there is none, or where another account could write to it.
    """
    above = Path("/run") if os.geteuid() == 0 else Path(os.environ.get("XDG_RUNTIME_DIR") or "/nowhere")
    if not above.is_dir():
        raise HostError("processes cannot meet here: XDG_RUNTIME_DIR names no directory")
    path = above / "cardcage" / name
    try:
        for folder in (path.parent, path):
            folder.mkdir(mode=0o700, exist_ok=True)
            found = folder.lstat()
            if found.st_uid != os.geteuid() or found.st_mode & 0o022 or not folder.is_dir() or folder.is_symlink():
                raise HostError(f"{folder}: not a directory that only this account writes to")
    except OSError as error:
        raise HostError(f"{path}: {error.strerror}") from error
    return path
