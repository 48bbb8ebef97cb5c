"""Tests in guests, one after another: python benchmarks/guests.py [--tests 200] [--accel tcg] [--memory 192M].

A module of so many tests that take the fixture ``guest`` and run a command each, in a pytest of its own. Rows: the
whole run, with booting; and from test to test, the median and the best.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

from paired import median

SOURCE = """
import pytest

@pytest.mark.parametrize("number", range({tests}))
def test_it(guest, number):
    assert not guest.files.exists("/here")
    guest.run(["touch", "/here"], check=True)
"""


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=int, default=200)
    parser.add_argument("--accel", default="tcg")
    parser.add_argument("--memory", default="192M")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "test_it.py").write_text(SOURCE.format(tests=given.tests))
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml", "found.xml"]
        words += ["--cardcage-accel", given.accel, "--cardcage-memory", given.memory]
        began = time.perf_counter()
        done = subprocess.run(words, cwd=folder, stdout=subprocess.PIPE, text=True)
        whole = time.perf_counter() - began
        if done.returncode:
            print(done.stdout)
            return done.returncode
        tests = [float(one.attrib["time"]) for one in ElementTree.parse(Path(folder, "found.xml")).iter("testcase")]
    print(f"  {len(tests)} tests, in all    {whole:.1f} s")
    print(f"  from test to test  {1000 * median(tests):.0f} ms ({1000 * min(tests):.0f}); a command is run in it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
