"""The host's limit to a machine's RAM."""

from __future__ import annotations

import os

from cardcage.errors import ConfigError
from cardcage.memory import PAGE

GIB = 1 << 30


def check_ram(size: int, *, limited: bool = True) -> int:
    """Check a configured amount of RAM against the host (when it is *limited* by that).

    Raises :exc:`~cardcage.errors.ConfigError`.
    """
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size < 1 << 20:
        raise ConfigError(f"{int(size)} bytes of memory is too little: expected at least 1M")
    if size % PAGE:
        raise ConfigError(f"expected a multiple of {PAGE} bytes, got {size}")
    if limited and size > total:
        raise ConfigError(f"{size / GIB:.1f} GiB of memory is more than this host has ({total / GIB:.1f} GiB)")
    return size
