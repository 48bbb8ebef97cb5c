"""fork(2) between imports: a module that another thread is importing has a lock whose holder the new process lacks."""

from __future__ import annotations

import _imp
import os
import sys
from threading import get_ident
from time import monotonic, sleep
from typing import Any

from cardcage.errors import HostError

__all__ = ["fork_between_imports"]

PATIENCE, LOOK = 30.0, 0.001
"""Seconds that imports may take, and between looks whether one is under way."""


def fork_between_imports() -> int:
    """:func:`os.fork`, once no other thread imports anything. Raises OSError, HostError after half a minute.

    Python makes the lock of all imports anew in the child, but not those of single modules: an import there of one that
    was being imported would never end. That lock is needed to begin to import a module, and it is held here meanwhile.
    """
    locks: Any = getattr(sys.modules.get("_frozen_importlib"), "_module_locks", {})
    until = monotonic() + PATIENCE
    while True:
        _imp.acquire_lock()
        try:
            importing = [name for name, lock in list(locks.items()) if _of_another(lock())]
            if not importing:
                return os.fork()
        finally:
            _imp.release_lock()
        if monotonic() > until:
            raise HostError(f"modules are being imported for {PATIENCE:g} s: {', '.join(sorted(importing))[:200]}")
        sleep(LOOK)


def _of_another(lock: Any) -> bool:
    """True where another thread has a module's lock: this one goes on in the child, and so does its import."""
    return getattr(lock, "owner", None) not in (None, get_ident())
