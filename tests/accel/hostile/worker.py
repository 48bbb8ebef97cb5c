"""A worker: runs cases one after the other and says on standard output, a line of JSON each, what comes of them.

It may die at any moment: whoever started it knows the case from its last "case" line.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import resource
import shutil
import subprocess
import sys
from collections import Counter

from hostile.case import Case, random_case
from hostile.world import Finding, World

__all__ = ["main"]

GROWTH = 1 << 30
"""Resident bytes that a worker may gain over what its first cases took."""


def say(**about: object) -> None:
    sys.stdout.write(json.dumps(about) + "\n")
    sys.stdout.flush()


def resident() -> int:
    """Resident bytes now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _where() -> str:
    """What each thread runs, where there is a debugger: for whoever looks for the cause."""
    if not (debugger := shutil.which("gdb")):
        return ""
    command = [
        debugger,
        "-p",
        str(os.getpid()),
        "-batch",
        "-ex",
        "thread apply all x/3i $pc",
        "-ex",
        "info proc mappings",
    ]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    wanted = [
        line.strip()
        for line in text.splitlines()
        if line.startswith("=>") or "_native.so" in line or "cardcage-code" in line
    ]
    return " | " + " | ".join(wanted)


def run(case: Case, templates: str) -> tuple[Finding | None, Counter[str]]:
    """One case in this process."""
    world = World(case, templates)
    try:
        world.run()
    except Finding as finding:
        if finding.kind in ("deaf", "deadlock"):
            say(finding=finding.kind, detail=finding.detail + _where())
            os._exit(9)  # its threads would never end
        return finding, world.counts
    finally:
        if not any(one.is_alive() for one in world._threads):
            world.close()
    return None, world.counts


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--step", type=int, default=1)
    parser.add_argument("--count", type=int, default=1 << 60)
    parser.add_argument("--cpus", type=int, default=4)
    parser.add_argument("--case-seconds", type=float, default=0.5)
    parser.add_argument("--theme")
    parser.add_argument("--templates", default="none")
    parser.add_argument("--replay", help="a case in JSON")
    options = parser.parse_args()
    faulthandler.enable()
    if "TCG_FENCES" in os.environ:
        from hostile.fences import fence

        fence()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    baseline = 0
    for i in range(options.count):
        if options.replay:
            case = Case.from_json(options.replay)
        else:
            case = random_case(options.first + i * options.step, options.cpus, options.case_seconds)
            if options.theme and case.theme not in options.theme.split(","):
                continue
        say(case=case.to_json())
        finding, counts = run(case, options.templates)
        if finding is not None:
            say(finding=finding.kind, detail=finding.detail)
        say(done=dict(counts))
        now = resident()
        if i == 5:
            baseline = now
        if i > 5 and baseline and now - baseline > GROWTH:
            say(finding="growth", detail=f"{now >> 20} MiB resident, {baseline >> 20} after the first cases")
            return 0
    say(bye=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
