"""One side of a migration is killed at a moment of its work: no machine is lost, and none runs twice."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

SIDE = Path(__file__).with_name("migrate_side.py")
FROM_SOURCE = ("HELLO", "PAGES", "PING", "STATE", "END", "COMMIT")
FROM_DESTINATION = ("ACCEPT", "PONG", "READY", "STARTED")
LONG = bool(os.environ.get("CARDCAGE_LONG_TESTS"))
CASES = [("source", "COMMIT<"), ("destination", "READY>")]


def cases() -> list[tuple[str, str]]:
    """Few, or a hundred."""
    if not LONG:
        return CASES
    draw = random.Random(15)
    every = [("source", one) for one in FROM_SOURCE] + [("destination", one) for one in FROM_DESTINATION]
    found = [(side, kind + draw.choice("<>")) for side, kind in (draw.choice(every) for _ in range(120))]
    # Before HELLO nobody came; after STARTED it is a machine like any other that is killed.
    return [one for one in found if one[1] not in ("HELLO<", "STARTED>")][:100]


class Side:
    """A process."""

    def __init__(self, role: str, folder: Path, moment: str) -> None:
        paths = os.pathsep.join(str(one) for one in Path(__file__).parents[:2])
        environment = {**os.environ, "XDG_STATE_HOME": str(folder / "state"), "PYTHONPATH": paths}
        self.process = subprocess.Popen(
            [sys.executable, str(SIDE), role, str(folder), moment],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def hear(self, key: str) -> dict[str, Any]:
        """The next line that tells of *key*; nothing once it is dead."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            told: dict[str, Any] = json.loads(line)
            if key in told:
                return told
        return {}

    def ask(self, line: str, key: str) -> dict[str, Any]:
        """Say a line, and hear."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        return self.hear(key)

    def end(self) -> None:
        """End it."""
        with suppress(BrokenPipeError):
            self.process.communicate("quit\n", timeout=60)


@pytest.mark.once
@pytest.mark.parametrize(("side", "moment"), cases())
def test_one_is_left(tmp_path: Path, side: str, moment: str) -> None:
    """Killed by the kernel: at most one copy runs, and where none does, one stands still and goes on when recovered, by
    the lock of its disk; only a source that is killed before all was at the destination takes its machine along."""
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    there = Side("destination", tmp_path, moment if side == "destination" else "-")
    assert there.hear("ready")
    here = Side("source", tmp_path, moment if side == "source" else "-")
    try:
        assert here.hear("ready")
        here.ask("go", "done")
        there.hear("done")
        both = {one: each.ask("state", "state") for one, each in (("here", here), ("there", there))}
        running = [one for one, told in both.items() if told.get("state") == "running"]
        assert len(running) <= 1
        if not running:
            still = [one for one, told in both.items() if told.get("state") in ("paused", "built")]
            if not still:
                assert side == "source"
                assert moment not in ("END>", "COMMIT<", "COMMIT>")
                return
            assert len(still) == 1
            left = here if still == ["here"] else there
            assert left.ask("recover", "recovered") == {"recovered": True}
            first = left.ask("state", "state")
            assert first["state"] == "running"
            assert first["count"] >= both[still[0]]["count"]
    finally:
        here.end()
        there.end()
