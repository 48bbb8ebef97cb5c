"""Where the host's own kernel runs SELinux: what that is, and this process's real label."""

from __future__ import annotations

from pathlib import Path

from cardcage.errors import HostError

__all__ = ["check", "enter", "running"]

FILESYSTEM = Path("/sys/fs/selinux")
CURRENT = Path("/proc/self/attr/current")


def running() -> str | None:
    """``enforcing``, ``permissive``, or None where the kernel does not run SELinux."""
    try:
        return "enforcing" if (FILESYSTEM / "enforce").read_text().strip() == "1" else "permissive"
    except OSError:
        return None


def check() -> tuple[bool, str, str]:
    """A line of ``cardcage doctor``."""
    mode = running()
    if mode is None:
        enable = "boot the host with security=selinux and a policy that knows svirt_t"
        return False, "this kernel does not run SELinux: labels hold inside cardcage only", enable
    return True, f"{mode}; this process is {CURRENT.read_text().rstrip(chr(0)).strip()}", ""


def enter(label: str) -> None:
    """Give this process the real *label* (setcon(3)), which has to be done before it has threads.

    Raises HostError where the host's policy does not allow it.
    """
    try:
        CURRENT.write_text(label)
    except OSError as error:
        raise HostError(f"the host's SELinux does not let this process become {label}: {error.strerror}") from error
