"""The long form of the differential: ``python tests/accel/tcg_million.py --cases 1000000 --jobs 2 [FILE...]``.

Random instructions out of real programs and changed ones, in all three widths, alone and four in a block, from random
states: operands and code that cross pages, pages that are missing or can only be read, addresses that are not
canonical, misaligned ones, division, SIMD and x87 exceptions, alignment checks. The command ends with what differed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections import Counter
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tcg_encodings import collect
from tcg_fuzz import Fuzzer

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

WIDTHS = (64, 64, 64, 32, 32, 16)
"""How often each width has its turn."""
ROUND = 4000
"""Cases with one seed: what a difference is found again by."""


def sources(r: random.Random, count: int) -> list[Path]:
    """Programs and libraries of this computer."""
    found = [one for one in (*Path("/usr/bin").iterdir(), *Path("/usr/lib/x86_64-linux-gnu").glob("*.so.*"))
             if one.is_file() and 20_000 < one.stat().st_size < 3_000_000]  # fmt: skip
    return sorted(r.sample(found, min(count, len(found))))


def one_round(seed: int, files: list[Path], faults: float, *, avx: bool) -> dict[str, Any]:
    """ROUND cases from a seed; what differed, and how they ended."""
    r = random.Random(seed)
    bits, sequence = r.choice(WIDTHS), r.choice((1, 1, 4))
    wide = avx and bits == 64 and r.random() < 0.3
    chosen = r.sample(files, min(2, len(files)))
    raws = collect(chosen, bits=bits, avx=wide, mutate=r.choice((1, 4)), seed=seed)
    fuzzer = Fuzzer(seed, avx=wide, bits=bits, faults=faults)
    found, done = [], 0
    try:
        while fuzzer.runs < ROUND and done < 4 * ROUND:
            done += 1
            case = fuzzer.case([r.choice(raws) for _ in range(sequence)])
            if case is not None:
                difference = fuzzer.check(case)
                if difference:
                    found.append(f"{bits} bits, seed {seed}: {fuzzer.explain(case, difference)}")
        return {
            "runs": fuzzer.runs,
            "instructions": fuzzer.runs * sequence,
            "ended": dict(fuzzer.ended),
            "found": found,
        }
    except (AssertionError, OSError) as error:  # a guest that ended in no way that the host has
        found.append(f"{bits} bits, seed {seed}: {type(error).__name__}: {error}")
        return {
            "runs": fuzzer.runs,
            "instructions": fuzzer.runs * sequence,
            "ended": dict(fuzzer.ended),
            "found": found,
        }
    finally:
        fuzzer.close()


def work(number: int, options: argparse.Namespace, queue: Queue[dict[str, Any]]) -> None:
    files = options.files or sources(random.Random(options.seed), 300)
    at, parent = 0, os.getppid()
    while os.getppid() == parent:  # it may be killed
        queue.put(one_round(options.seed + number + at * options.jobs, files, options.faults, avx=options.avx))
        at += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=float, default=0.1, help="share of operands that may not be accessed")
    parser.add_argument("--avx", action="store_true", help="AVX too, in some rounds")
    parser.add_argument("--show", type=int, default=200)
    options = parser.parse_args()
    context = get_context("spawn")
    queue: Queue[dict[str, Any]] = context.Queue()
    workers = [context.Process(target=work, args=(i, options, queue), daemon=True) for i in range(options.jobs)]
    for one in workers:
        one.start()
    total, ended, shown = Counter[str](), Counter[str](), 0
    begun = said = time.monotonic()
    while total["runs"] < options.cases:
        result = queue.get()
        total.update({name: result[name] for name in ("runs", "instructions")})
        total["differ"] += len(result["found"])
        ended.update(result["ended"])
        for text in result["found"]:
            shown += 1
            if shown <= options.show:
                print(text, flush=True)
        if time.monotonic() - said > 20:
            said = time.monotonic()
            rate = total["runs"] / (said - begun)
            print(json.dumps({**total, "ended": dict(ended), "per_second": round(rate)}), flush=True)
    for one in workers:
        one.kill()
    print(json.dumps({**total, "ended": dict(ended), "seconds": round(time.monotonic() - begun)}), flush=True)
    return 1 if total["differ"] else 0


if __name__ == "__main__":
    sys.exit(main())
