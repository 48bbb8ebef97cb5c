"""``cardcage ksm``, and the line of ``cardcage doctor``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cardcage.errors import HostError
from cardcage_fleet.rundir import run_directory

from cardcage_ksm.lease import KSM, Lease, read_settings

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from cardcage.host import Host

__all__ = ["check", "configure", "run"]


def configure(parser: ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "--restore", action="store_true", help="restore the settings of ksmd after a machine was killed"
    )


def run(host: Host, arguments: Namespace) -> int:
    """Print, or restore. Raises HostError without KSM, or where the lease cannot be read."""
    settings = read_settings(KSM)
    if not settings:
        raise HostError(f"this kernel has no KSM: {KSM} is not there")
    lease = Lease(run_directory("ksm"))
    try:
        if arguments.restore:
            print("the settings of ksmd are restored" if lease.restore() else "there was nothing to restore")
            return 0
        record = lease.record()
        print(f"ksmd      {'runs' if settings['run'] == '1' else 'does not run'}")
        shared, sharing, zero = (_number(name) for name in ("pages_shared", "pages_sharing", "ksm_zero_pages"))
        page = os.sysconf("SC_PAGE_SIZE")
        print(
            f"saved     {(sharing + zero) * page >> 20} MiB ({shared} pages stand for {shared + sharing}, {zero} zeros)"
        )
        print(f"settings  {' '.join(f'{name}={value}' for name, value in settings.items() if name != 'run')}")
        if record:
            state = "left over: cardcage ksm --restore" if lease.left_over() else "in use"
            print(f"lease     {record['group'] or 'without a label'}, first {record['who']} ({state})")
    finally:
        lease.close()
    return 0


def _number(name: str) -> int:
    try:
        return int((KSM / name).read_text())
    except (OSError, ValueError):  # not in this kernel
        return 0


def check_kernel() -> tuple[bool, str, str]:
    """For ``doctor``: ksmd's state. The policy starts it where that is permitted."""
    try:
        run = (KSM / "run").read_text().strip()
    except OSError:
        return False, "this kernel has no KSM", "a kernel with CONFIG_KSM=y"
    return (
        run == "1",
        f"run is {run}, {_number('pages_sharing')} pages shared",
        "echo 1 | sudo tee /sys/kernel/mm/ksm/run",
    )


def check() -> tuple[bool, str, str]:
    """For ``doctor``: settings that nobody uses any more."""
    try:
        lease = Lease(run_directory("ksm"))
    except (HostError, OSError) as error:
        return True, f"not available to this account ({error}): the settings of ksmd stay unchanged", ""
    try:
        if lease.left_over():
            return False, "ksmd still has the settings of a machine that is gone", "cardcage ksm --restore"
        return True, "in use" if lease.record() else "free", ""
    finally:
        lease.close()
