"""The tests as the gate runs them: ``python tests/gate.py [ARGUMENT OF PYTEST ...]``.

Guests, kernel threads and other people's servers share the machine with the tests, and with three test processes on two
cores something may come later than anybody foresaw. Of 13,000 runs of tests in a gate, one or two failed so, each gate
others. At most :data:`MOST` that failed are therefore run once more, one after another with nothing beside them, and
have to pass then. They are named at the end, with what they printed before it: each has a fault, in it or in what it
tests, that is to be found.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["MOST", "main"]

MOST = 3
"""Tests that may fail at first. More is no accident."""
TESTS_FAILED = 1
ALONE = ("--last-failed", "-n", "0", "--dist", "no")


def run(cache: str, *words: str) -> int:
    """Run pytest, which keeps in *cache* what failed; its exit status."""
    return subprocess.run([sys.executable, "-m", "pytest", "-o", f"cache_dir={cache}", *words], check=False).returncode


def main(words: list[str]) -> int:
    """Run the tests, and a few that failed again. Returns pytest's exit status."""
    with tempfile.TemporaryDirectory(prefix="cardcage-gate-") as cache:
        status = run(cache, *words)
        kept = Path(cache, "v", "cache", "lastfailed")
        failed = sorted(json.loads(kept.read_text())) if kept.exists() else []
        if status != TESTS_FAILED or not 0 < len(failed) <= MOST:
            return status
        print(f"\n{len(failed)} failed beside others; once more, alone:", *failed, sep="\n  ", flush=True)
        status = run(cache, *words, *ALONE)
    print("\nFAILED BESIDE OTHERS" + (", and passed alone:" if status == 0 else ":"), *failed, sep="\n  ", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
