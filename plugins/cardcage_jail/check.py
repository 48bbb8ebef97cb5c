"""The line of ``cardcage doctor``."""

from __future__ import annotations

from cardcage_jail import landlock, seccomp

__all__ = ["jail"]


def jail() -> tuple[bool, str, str]:
    """Landlock and seccomp."""
    version, filters = landlock.abi(), seccomp.is_offered()
    there = [f"Landlock {version}" if version else "no Landlock", "seccomp" if filters else "no seccomp"]
    enable = "a kernel with CONFIG_SECURITY_LANDLOCK, named in lsm=, and CONFIG_SECCOMP_FILTER"
    return bool(version and filters), ", ".join(there), enable
