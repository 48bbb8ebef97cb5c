"""``cardcage doctor``: memory that comes while its guest runs."""

from __future__ import annotations

import errno
import os

from cardcage_snapshot.faults import DEVICE, opened_faults

__all__ = ["faults"]


def faults() -> tuple[bool, str, str]:
    """Can the kernel's faults in guest memory be caught? Compressed snapshots and post-copy ask for it."""
    try:
        os.close(opened_faults())
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOSYS):
            return False, "this kernel cannot poison pages of userfaultfd", "Linux 6.6 or later"
        command = f"sudo setfacl -m u:{os.geteuid()}:rw {DEVICE}, or: sudo sysctl vm.unprivileged_userfaultfd=1"
        return False, f"{DEVICE}: {error.strerror}", command
    return True, "userfaultfd catches the kernel's faults, too", ""
