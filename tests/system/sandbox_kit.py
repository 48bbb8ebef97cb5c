"""What tests of sandboxes wait for: the ends of processes, and of templates with all that they made."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cardcage_fleet.roster import Roster
from cardcage_sandbox import stop_templates


def ends(pid: int) -> bool:
    """Wait for the end of a process."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], 60)[0])
    finally:
        os.close(fd)


@contextmanager
def own_templates(runtime: Path) -> Iterator[None]:
    """Templates' processes of the test's own, of which nothing is left."""
    runtime.parent.chmod(0o700)
    try:
        yield
    finally:
        stop_templates()
    end = time.monotonic() + 30
    while Roster().read()[0]:  # a copy that was being made ends once it finds nobody there
        assert time.monotonic() < end, "a machine is left"
