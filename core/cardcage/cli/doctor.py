"""``cardcage doctor``: what this host can do, with the one command that would enable the rest."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cardcage.assembly import probe_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cardcage.host import Host

__all__ = ["CHECKS", "examine"]

Finding = tuple[bool, str, str]
"""(whether it works, what was found, what would enable it)."""


def examine(host: Host) -> int:
    """Print each check. Returns 0 when a machine can run here, else 70."""
    rows = list(findings(host))
    wide = max(len(name) for name, _ in rows)
    for name, (works, found, enable) in rows:
        print(f"{'yes' if works else 'no ':3}  {name:{wide}}  {found}")
        if not works and enable:
            print(f"     {'':{wide}}  enable: {enable}")
    usable = any(works for name, (works, _, _) in rows if name.startswith("accelerator "))
    return 0 if usable and rows[0][1][0] else 70


def findings(host: Host) -> Iterator[tuple[str, Finding]]:
    """The core's checks, each accelerator's probe, and what cards registered."""
    yield "platform", CHECKS["platform"]()
    for name in host.registry.names("accelerator"):
        _, probe = probe_of(host.registry.get("accelerator", name))
        text = f"{probe.speed}{': ' + probe.reason if probe.reason else ''}" if probe.usable else probe.reason
        yield f"accelerator {name}", (probe.usable, text, "")
    for name, check in CHECKS.items():
        if name != "platform":
            yield name, check()
    for name in host.registry.names("check"):
        try:
            yield name, host.registry.get("check", name).load()()
        except Exception as error:  # a card's check that breaks is itself a finding
            yield name, (False, f"the check failed: {type(error).__name__}: {error}", "")


def _platform() -> Finding:
    right = sys.platform == "linux" and platform.machine() == "x86_64"
    text = f"{platform.system()} {platform.release()} {platform.machine()}, Python {platform.python_version()}"
    return right, text, "run it on Linux on x86-64"


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _kvm() -> Finding:
    if not os.path.exists("/dev/kvm"):
        return False, "/dev/kvm does not exist", "modprobe kvm_intel || modprobe kvm_amd  (or nested virtualization)"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False, "/dev/kvm: permission denied", f"sudo usermod -aG kvm {os.environ.get('USER', '$USER')}"
    return True, "/dev/kvm can be opened", ""


def _ksm() -> Finding:
    run = _read("/sys/kernel/mm/ksm/run")
    if run is None:
        return False, "this kernel has no KSM", "a kernel with CONFIG_KSM=y"
    pages = _read("/sys/kernel/mm/ksm/pages_sharing") or "0"
    return run == "1", f"run is {run}, {pages} pages shared", "echo 1 | sudo tee /sys/kernel/mm/ksm/run"


def _huge_pages() -> Finding:
    text = _read("/sys/kernel/mm/transparent_hugepage/enabled")
    if text is None:
        return False, "this kernel has no transparent huge pages", "a kernel with CONFIG_TRANSPARENT_HUGEPAGE=y"
    enable = "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
    return "[never]" not in text, f"transparent: {text}", enable


def _userfaultfd() -> Finding:
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(323, os.O_CLOEXEC | os.O_NONBLOCK | 1)  # UFFD_USER_MODE_ONLY
    if fd < 0:
        return False, os.strerror(ctypes.get_errno()), "sudo sysctl vm.unprivileged_userfaultfd=1"
    os.close(fd)
    return True, "system call works (user mode faults)", ""


def _tap() -> Finding:
    if not os.path.exists("/dev/net/tun"):
        return False, "/dev/net/tun does not exist", "sudo modprobe tun"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return False, "/dev/net/tun: permission denied", "sudo chmod 666 /dev/net/tun"
    return True, "/dev/net/tun can be opened (creating a tap needs CAP_NET_ADMIN)", ""


def _landlock() -> Finding:
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(444, None, ctypes.c_size_t(0), 1)  # landlock_create_ruleset, LANDLOCK_CREATE_RULESET_VERSION
    if version < 0:
        return (
            False,
            os.strerror(ctypes.get_errno()),
            "boot the host with lsm=landlock,... (CONFIG_SECURITY_LANDLOCK=y)",
        )
    return True, f"ABI version {version}", ""


CHECKS: dict[str, Callable[[], Finding]] = {
    "platform": _platform,
    "kvm device": _kvm,
    "KSM": _ksm,
    "huge pages": _huge_pages,
    "userfaultfd": _userfaultfd,
    "tap": _tap,
    "Landlock": _landlock,
}
"""The core's own checks, in the order they are printed."""
