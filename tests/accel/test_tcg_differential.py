"""The translator beside the real processor, in short form; ``python tests/accel/tcg_fuzz.py FILE`` is the long one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import tcg_fuzz

COUNT = 2000
SEED = 20


@pytest.mark.parametrize("bits", [64, 32])
def test_instructions_do_what_the_processor_does(bits: int) -> None:
    """Encodings of real binaries, and changed ones, leave the state that this host's processor leaves."""
    encodings = tcg_fuzz.collect([Path("/bin/ls")], bits=bits, avx=False, mutate=1, seed=SEED)
    random.Random(SEED).shuffle(encodings)
    fuzzer = tcg_fuzz.Fuzzer(SEED, avx=False, bits=bits)
    differ = []
    for raw in encodings[:COUNT]:
        case = fuzzer.case([raw])
        if case is not None and (difference := fuzzer.check(case)):
            differ.append(fuzzer.explain(case, difference))
    assert fuzzer.runs > COUNT // 2
    assert not differ, "\n".join(differ)
