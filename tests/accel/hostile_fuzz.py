"""Run hostile guests under the translator: ``python tests/accel/hostile_fuzz.py --seconds 600 --seed 1 --cpus 4``.

``--build check`` runs them on a build with invariants and sanitizers, ``--patch`` on one with a patch (a fault put
back). Each finding's case goes to a file in ``--keep``; ``--replay FILE`` runs such a case again, ``--minimise FILE``
makes it smaller. The status is 1 when something was found.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from hostile.case import Case
from hostile.supervise import Report, Supervisor, minimise, replay
from hostile.variants import ROOT, make


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cpus", type=int, default=4, help="the most vCPUs in a guest")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--case-seconds", type=float, default=0.5)
    parser.add_argument("--theme", default="", help="only cases of these themes, with commas between")
    parser.add_argument("--build", choices=("product", "check"), default="product")
    parser.add_argument("--root", type=Path, default=ROOT, help="another checkout, whose translator is run")
    parser.add_argument("--patch", type=Path, action="append", default=[])
    parser.add_argument("--stop-after", type=int, default=1 << 30, help="findings")
    parser.add_argument("--keep", type=Path, help="directory for cases with findings")
    parser.add_argument("--replay", type=Path)
    parser.add_argument("--minimise", type=Path)
    parser.add_argument("--times", type=int, default=10, help="how often to replay")
    options = parser.parse_args()
    variant = make(options.build, tuple(one.resolve() for one in options.patch), options.root)
    if options.replay or options.minimise:
        case = Case.from_json((options.replay or options.minimise).read_text())
        found = replay(case, variant, options.times)
        for one in found:
            print(f"{one.kind}: {one.detail}")
        if options.minimise and found:
            print(minimise(found[0], variant).to_json())
        return 1 if found else 0
    arguments = ["--cpus", str(options.cpus), "--case-seconds", str(options.case_seconds)]
    arguments += ["--theme", options.theme] if options.theme else []
    supervisor = Supervisor(variant, options.seed, options.jobs, arguments)
    reports = supervisor.run(options.seconds, stop_after=options.stop_after)
    _summary(supervisor, reports, options.keep)
    return 1 if reports else 0


def _summary(supervisor: Supervisor, reports: list[Report], keep: Path | None) -> None:
    print("counts: " + ", ".join(f"{name} {count}" for name, count in sorted(supervisor.counts.items())))
    for signature, count in Counter(one.signature for one in reports).most_common():
        first = next(one for one in reports if one.signature == signature)
        print(f"{count:5} from {first.seconds:.0f} s, seed {first.case.seed} ({first.case.theme}): {signature}")
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        for one in reports:
            (keep / f"{one.kind.replace(' ', '-')}-{one.case.seed}.json").write_text(one.case.to_json() + "\n")


if __name__ == "__main__":
    sys.exit(main())
