"""What is left of sandboxes, and of what they were made with."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cardcage.errors import StateError
from cardcage_sandbox import Sandbox, Template
from cardcage_sandbox.template import keepers
from leftovers import Leftovers
from sandbox_kit import ends, own_templates

if TYPE_CHECKING:
    from collections.abc import Iterator

LONG = bool(os.environ.get("CARDCAGE_LONG_TESTS"))
COUNT = 1000 if LONG else 12


@pytest.fixture(autouse=True)
def templates(runtime: Path, kernel: Path) -> Iterator[None]:
    """Templates' processes of the test's own, of which nothing is left."""
    with own_templates(runtime):
        yield


def children(pid: int) -> set[int]:
    """The children of a process (proc_pid_task_children(5))."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return {int(one) for path in lists for one in path.read_text().split()}


def private(pid: int) -> int:
    """Bytes that only this process has written (proc_pid_smaps(5))."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_Dirty"))


def test_a_way_out_that_has_ended() -> None:
    """Once a template's gate was killed nobody is given a sandbox without its way out, made in advance or not; others
    go on, and whoever asks after their end has one of a template that is made anew."""
    template = Template(name="out", memory="128M", egress=["192.0.2.1"])  # type: ignore[arg-type]  # attrs converts
    with Sandbox.create(template) as sandbox:
        (keeper,) = keepers()
        (gate,) = [one for one in children(keeper.pid) if Path(f"/proc/{one}/comm").read_text() == "egress-gate\n"]
        os.kill(gate, signal.SIGKILL)
        assert ends(gate)
        for act in (lambda: Sandbox.create(template), sandbox.fork):
            with pytest.raises(StateError, match="the gate has ended") as caught:
                act()
            assert "\n" not in str(caught.value)
        assert sandbox.commands.run("echo on").stdout == "on\n"
    assert ends(keeper.pid)
    with Sandbox.create(template) as again:
        assert again.commands.run("echo anew").stdout == "anew\n"


@pytest.mark.timeout(3000 if LONG else 300)
def test_nothing_is_left(runtime: Path) -> None:
    """Sandboxes that are made, used and ended one after another leave no process, descriptor, file or memory behind, in
    who asked for them or in the template's process."""
    template = Template(name="many", memory="128M", spare=0)  # type: ignore[arg-type]  # attrs converts

    def use(number: int) -> None:
        with Sandbox.create(template, timeout=60) as one:
            assert one.commands.run(f"echo {number}").stdout == f"{number}\n"

    use(0)  # what is loaded and opened once
    (keeper,) = keepers()

    def held() -> tuple[list[str], set[int], int, list[str]]:
        descriptors = [os.readlink(path) for path in Path(f"/proc/{keeper.pid}/fd").iterdir()]
        threads = len(os.listdir(f"/proc/{keeper.pid}/task"))
        return sorted(descriptors), children(keeper.pid), threads, sorted(map(str, runtime.rglob("*")))

    ours, before, memory = Leftovers(), held(), private(keeper.pid)
    for number in range(COUNT):
        use(number)
    assert Sandbox.list() == []
    assert ours() == []
    end = time.monotonic() + 30
    while held() != before and time.monotonic() < end:  # it may be looking at something just now
        pass
    assert held() == before
    assert private(keeper.pid) < memory + (16 << 20)
