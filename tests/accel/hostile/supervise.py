"""Workers in processes of their own: started, watched, replaced; what they die of or report is a finding."""

from __future__ import annotations

import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import IO

from attrs import define, field

from hostile.case import Case
from hostile.variants import Variant

__all__ = ["Report", "Supervisor", "minimise", "replay"]

SILENT = 150.0
"""Seconds in which a worker says something, whatever else this computer does."""
HERE = Path(__file__).parent.parent


@define
class Report:
    """A finding: what was seen, in which case, after how many seconds of the run."""

    kind: str
    detail: str
    case: Case
    seconds: float = 0.0

    @property
    def signature(self) -> str:
        """What findings of one fault have in common, as far as a text shows that."""
        return self.kind + ": " + re.sub(r"0x[0-9a-f]+|\b[0-9a-f]{6,}\b|\d+", "#", self.detail)[:70]


@define
class _Worker:
    process: subprocess.Popen[bytes]
    errors: IO[bytes]
    first: int
    case: Case | None = None
    heard: float = field(factory=time.monotonic)
    reported: bool = False
    last: int | None = None
    bye: bool = False
    pending: bytes = b""


class Supervisor:
    """Runs cases from *seed* on, each once, on *jobs* processes.

    Args:
        variant: the build that workers import.
        arguments: for ``hostile.worker``.
    """

    def __init__(self, variant: Variant, seed: int, jobs: int, arguments: list[str]) -> None:
        self.variant, self.seed, self.jobs, self.arguments = variant, seed, jobs, arguments
        self.counts: Counter[str] = Counter()
        self.reports: list[Report] = []
        self.begun = time.monotonic()
        self._scratch = tempfile.TemporaryDirectory(prefix="hostile-")
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()

    def _start(self, first: int) -> None:
        errors = tempfile.TemporaryFile()  # noqa: SIM115  closed when the worker has ended
        command = [
            sys.executable,
            "-m",
            "hostile.worker",
            "--first",
            str(first),
            "--step",
            str(self.jobs),
            *self.arguments,
        ]
        command += ["--templates", self._scratch.name]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL,
            env=self.variant.environment(), cwd=HERE, start_new_session=True,
        )  # fmt: skip
        worker = _Worker(process, errors, first)
        assert process.stdout is not None
        self._selector.register(process.stdout, selectors.EVENT_READ, worker)
        self._workers.append(worker)

    def run(self, seconds: float, *, stop_after: int = 1 << 30, quiet: bool = False) -> list[Report]:
        """Work for so long, or until there are *stop_after* findings."""
        for i in range(self.jobs):
            self._start(self.seed + i)
        try:
            while time.monotonic() - self.begun < seconds and len(self.reports) < stop_after and self._workers:
                for key, _ in self._selector.select(1.0):
                    worker: _Worker = key.data
                    data = os.read(key.fd, 1 << 16)
                    *lines, worker.pending = (worker.pending + data).split(b"\n")
                    for line in lines:
                        self._hear(worker, line.decode(errors="replace"), quiet=quiet)
                    if not data:
                        self._ended(worker, quiet=quiet)
                for worker in list(self._workers):
                    if time.monotonic() - worker.heard > SILENT:
                        self._report(worker, "silent", f"a worker said nothing for {SILENT:.0f} s", quiet=quiet)
                        worker.process.kill()
                        worker.heard = time.monotonic()
        finally:
            self.close()
        return self.reports

    def _hear(self, worker: _Worker, line: str, *, quiet: bool) -> None:
        worker.heard = time.monotonic()
        try:
            about = json.loads(line)
        except ValueError:
            self._report(worker, "noise", f"a worker said {line[:200]!r}", quiet=quiet)
            return
        if "case" in about:
            worker.case, worker.reported = Case.from_json(about["case"]), False
            self.counts["cases"] += 1
            worker.last = worker.case.seed
        elif "finding" in about:
            self._report(worker, about["finding"], about["detail"], quiet=quiet)
        elif "done" in about:
            self.counts.update(about["done"])
            worker.case = None
        elif "bye" in about:
            worker.bye = True

    def _report(self, worker: _Worker, kind: str, detail: str, *, quiet: bool) -> None:
        worker.reported = True
        report = Report(kind, detail, worker.case or Case(-1), time.monotonic() - self.begun)
        self.reports.append(report)
        if not quiet and sum(one.signature == report.signature for one in self.reports) <= 3:
            print(
                f"{report.seconds:7.1f} s  seed {report.case.seed} ({report.case.theme}): {kind}: {detail[:500]}",
                flush=True,
            )

    def _ended(self, worker: _Worker, *, quiet: bool) -> None:
        status = worker.process.wait()
        assert worker.process.stdout is not None
        self._selector.unregister(worker.process.stdout)
        worker.process.stdout.close()
        self._workers.remove(worker)
        worker.errors.seek(0)
        said = worker.errors.read().decode(errors="replace").strip()
        worker.errors.close()
        if worker.bye and status == 0:
            return
        if not worker.reported:
            how = f"died by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            self._report(worker, "process", f"{how}: {_tail(said)}", quiet=quiet)
        if worker.last is not None:
            self._start(worker.last + self.jobs)

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.process.kill()
            worker.process.wait()
            assert worker.process.stdout is not None
            worker.process.stdout.close()
            worker.errors.close()
        self._workers = []
        self._selector.close()
        self._scratch.cleanup()


def _tail(said: str) -> str:
    lines = [line for line in said.splitlines() if line.strip()]
    current = next((i for i, line in enumerate(lines) if line.startswith("Current thread")), None)
    if current is not None:
        lines = lines[:1] + [line.strip() for line in lines[current + 1 :]]
    marked = [line for line in lines if line.startswith(("tcg check", "==")) or "ERROR" in line]
    return " | ".join((marked or lines)[:6])[:600]


def replay(case: Case, variant: Variant, times: int, seconds: float = 120.0) -> list[Report]:
    """Run one case so many times, in one process after the other, until something is found."""
    for _ in range(times):
        one = Supervisor(variant, case.seed, 1, ["--replay", case.to_json(), "--count", "1"])
        found = one.run(seconds, stop_after=1, quiet=True)
        if found:
            return found
    return []


def minimise(report: Report, variant: Variant, tries: int = 3, budget: float = 300.0) -> Case:
    """A case with less in it that still shows a finding of the same kind."""
    case, end = report.case, time.monotonic() + budget
    progress = True
    while progress and time.monotonic() < end:
        progress = False
        for smaller in case.smaller():
            if time.monotonic() > end:
                break
            if any(one.kind == report.kind for one in replay(smaller, variant, tries)):
                case, progress = smaller, True
                break
    return case
