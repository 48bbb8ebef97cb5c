"""Faults of the kernel, which takes a right that not every user has: the syscall for who may trace others or where
``vm.unprivileged_userfaultfd`` says so, or /dev/userfaultfd."""

from __future__ import annotations

import errno

from cardcage.errors import HostError
from cardcage_snapshot.faults import DEVICE, opened_faults

__all__ = ["open_faults"]


def open_faults() -> int:
    """A descriptor for :class:`cardcage_snapshot.faults.Faults`. Raises HostError, in one line that says how it can be
    allowed."""
    try:
        return opened_faults(removals=False)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOSYS):
            raise HostError("post-copy: it takes Linux 6.6 or later here (UFFDIO_POISON)") from error
        raise HostError(
            f"post-copy: this user may not catch faults of the kernel in memory that is missing: give it {DEVICE} "
            f"({error.strerror}), or set vm.unprivileged_userfaultfd=1"
        ) from error
