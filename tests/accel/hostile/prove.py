"""The proof that the fuzzer finds what it is for: each kept patch puts a fault back, and is found.

A patch begins with a sentence, and a line ``finds: REGEX`` about the findings that show its fault.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

from hostile.supervise import Report, Supervisor
from hostile.variants import make

__all__ = ["PATCHES", "prove"]

PATCHES = sorted((Path(__file__).parent / "patches").glob("*.patch"))


def prove(
    patch: Path, *, seconds: float = 900.0, jobs: int = 2, seed: int = 1, build: str = "product"
) -> Report | None:
    """The first finding that shows the fault of *patch*, with the seconds it took; None when there was none in time."""
    found = re.search(r"^finds: (.*)$", patch.read_text(), re.M)
    assert found is not None, patch
    wanted, end = re.compile(found[1]), time.monotonic() + seconds
    variant, begun = make(build, (patch,)), time.monotonic()
    while (left := end - time.monotonic()) > 0:
        for report in Supervisor(variant, seed, jobs, ["--cpus", "4"]).run(left, stop_after=1, quiet=True):
            if wanted.search(f"{report.kind}: {report.detail}"):
                report.seconds = time.monotonic() - begun
                return report
            seed = max(seed, report.case.seed) + jobs
    return None
