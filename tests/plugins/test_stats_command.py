"""``stats_of(machine)`` and ``cardcage stats``: real memory, other processes, recordings and plots."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cardcage.errors import StateError
from cardcage.machine import Machine
from cardcage_cli import main
from cardcage_fleet import stats_of
from cardcage_fleet.accounting import MachineStats, Sampler, measure
from cardcage_fleet.plot import KINDS, kinds_of
from cardcage_fleet.record import Sample
from cardcage_fleet.roster import Roster, RosterEntry
from cardcage_fleet.stats import look, table

MIB = 1 << 20
SWAPPED = b"""7f0000000000-7f0000400000 rw-p 00000000 00:00 0
Size:               4096 kB
Rss:                1024 kB
Pss:                 512 kB
Shared_Clean:          0 kB
Shared_Dirty:       1024 kB
Swap:               2048 kB
7f0000400000-7f0000800000 rw-p 00000000 00:00 0
Rss:                 100 kB
Pss:                 100 kB
Swap:                 50 kB
7f1000000000-7f1000400000 rwxs 00000000 00:01 99 /memfd:cardcage-code (deleted)
Rss:                 300 kB
Pss:                 150 kB
7f2000000000-7f2000400000 r--p 00000000 00:01 98 /usr/lib/x.so
Rss:                4000 kB
Pss:                 250 kB
"""


pytestmark = [pytest.mark.usefixtures("runtime"), pytest.mark.xdist_group("host")]


def machine(name: str = "lab", size: str = "32M", devices: Any = (), **memory: Any) -> Machine:
    keys = {"name": name, "memory": size, "accel": ["tcg"], "platform": "none" if not devices else "pc"}
    return Machine(fragments=[{"machine": keys, "memory": memory}], devices=devices)


# the figures


def test_resident_follows_what_is_touched_and_given_back() -> None:
    """Resident memory grows with what is written and shrinks with what is discarded; the size stays."""
    with machine() as vm:
        before = stats_of(vm)
        vm.memory.write(MIB, b"x" * 8 * MIB)
        after = stats_of(vm)
        assert after.resident - before.resident == 8 * MIB
        assert after.proportional - before.proportional == 8 * MIB
        assert (after.size, after.swapped, after.ballooned, after.age) == (32 * MIB, 0, None, 0)
        assert vm.memory.discard(MIB, 4 * MIB)
        assert stats_of(vm).resident == after.resident - 4 * MIB
        assert 0 < after.overhead < 1 << 30
    with pytest.raises(StateError):
        stats_of(vm)


def test_what_others_map_is_shared() -> None:
    """Memory of a memfd that is mapped twice is shared, and its proportional share is half."""
    with machine(type="memfd") as vm:
        vm.memory.write(MIB, b"x" * 4 * MIB)
        before = stats_of(vm)
        with mmap.mmap(vm.memory.ranges[0].block.fd, 32 * MIB) as other:
            assert sum(other[at] != 0 for at in range(MIB, 5 * MIB, 4096)) == 1024
            after = stats_of(vm)
        assert before.shared == 0
        assert after.shared >= 4 * MIB
        assert before.proportional - after.proportional >= 2 * MIB - 4096


def test_merged_pages_are_counted() -> None:
    """Equal pages that ksmd really merges show as merged and shared, and the proportional share falls."""
    run, fast = Path("/sys/kernel/mm/ksm/run"), Path("/sys/kernel/mm/ksm/sleep_millisecs")
    if not os.access(run, os.W_OK):
        pytest.skip("needs root and a kernel with KSM, to start ksmd")
    before = {one: one.read_text() for one in (run, fast)}
    with machine() as vm:
        vm.memory.write(MIB, b"same" * (2 * MIB))
        first, block = stats_of(vm), vm.memory.ranges[0].block
        block.map.madvise(mmap.MADV_MERGEABLE, block.offset, block.size)
        try:
            fast.write_text("0")
            run.write_text("1")
            end = time.monotonic() + 60
            while (stats := stats_of(vm)).merged < 6 * MIB and time.monotonic() < end:
                os.sched_yield()
        finally:
            block.map.madvise(mmap.MADV_UNMERGEABLE, block.offset, block.size)
            for one, text in before.items():
                one.write_text(text)
        assert first.merged == 0
        assert stats.merged >= 6 * MIB
        assert stats.shared >= 6 * MIB
        assert first.proportional - stats.proportional > 5 * MIB


def test_swap_code_and_overhead_are_told_apart() -> None:
    """From smaps (made up: this host has no swap): RAM in two mappings, swap, code, and overhead per machine."""
    entries = [
        RosterEntry("a", 1 << 22, 8 * MIB, start=0x7F0000000000, code="cardcage-code", file="a"),
        RosterEntry("b", 1 << 22, 8 * MIB, start=0x7F5000000000, file="b"),
    ]
    a, b = measure(1 << 22, entries, SWAPPED)
    assert (a.resident, a.proportional, a.shared) == (1124 << 10, 612 << 10, 1024 << 10)
    assert (a.swapped, a.merged, a.code, a.overhead) == (2098 << 10, 0, 75 << 10, 200 << 10)
    assert (b.resident, b.swapped, b.code, b.overhead) == (0, 0, 75 << 10, 200 << 10)


def test_the_balloon_tells_what_the_guest_gave() -> None:
    """What the balloon holds and what the guest says come over the machine's socket, in bytes."""
    with machine(devices=[{"type": "virtio-balloon"}]) as vm:
        balloon = vm.devices["virtio-balloon"].device
        holder = balloon if hasattr(balloon, "actual") else balloon.device
        holder.actual = 512
        stats = stats_of(vm)
        assert stats.ballooned == 2 * MIB
        assert stats.available is None


def test_machines_of_a_process_share_its_overhead() -> None:
    """The VMM's own memory is divided by the machines of a process, in whichever host object they are."""
    with machine("one") as one:
        alone = stats_of(one).overhead
        with machine("two") as two:
            assert stats_of(one).overhead < 0.8 * alone
            assert abs(stats_of(one).overhead - stats_of(two).overhead) < alone / 4


# the command


PROGRAM = """
import sys
from cardcage.machine import Machine
with Machine(fragments=[{"machine": {"name": "far", "memory": "32M", "accel": ["tcg"], "platform": "none"}}]) as vm:
    for line in sys.stdin:
        exec(line)
        print("done", flush=True)
"""


class Far:
    """A machine in another process, which does what it is told."""

    def __init__(self, before: Callable[[], None] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=before,
        )

    def do(self, line: str) -> bool:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return False
        return self.process.stdout.readline() == "done\n"

    def end(self) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        return self.process.wait()


def test_neighbours_are_told_apart() -> None:
    """Machines of a process whose RAM the kernel maps side by side are counted each for itself."""
    vms = [machine(f"m{at}") for at in range(3)]
    for at, vm in enumerate(vms):
        vm.memory.write(MIB, b"x" * (at + 1) * MIB)
    assert [stats_of(vm).resident for vm in vms] == [MIB, 2 * MIB, 3 * MIB]
    sampler = Sampler()
    assert [one.resident for one in sampler.sample(Roster().read()[0])] == [MIB, 2 * MIB, 3 * MIB]
    for vm in vms:
        vm.close()


def test_between_exact_looks_counters_move_the_figures() -> None:
    """Without a budget the first look is exact and later ones follow the process's counters; with one all are exact."""
    far = Far()
    assert far.do("data = b'x' * (8 << 20)")
    for at, budget in ((1, 0.0), (16, 1e9)):
        sampler = Sampler(budget)
        (first,) = sampler.sample(Roster().read()[0])
        assert first.age == 0
        assert far.do(f"vm.memory.write({at} << 20, data)")
        (then,) = sampler.sample(Roster().read()[0])
        assert (then.age == 0) == bool(budget)
        assert 7 * MIB < then.resident - first.resident < 9 * MIB
        assert sampler.problems == []
    assert far.end() == 0


def test_machines_of_other_processes_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """The command shows each machine of this user, in whichever process, as a table and as JSON."""
    far = Far()
    assert far.do("vm.memory.write(0x100000, b'x' * (8 << 20))")
    with machine("near"):
        assert main(["stats", "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert {one["name"]: one["pid"] for one in shown["machines"]} == {"near": os.getpid(), "far": far.process.pid}
        (row,) = (one for one in shown["machines"] if one["name"] == "far")
        assert 8 * MIB <= row["resident"] < 10 * MIB
        assert main(["stats", "far"]) == 0
        text = capsys.readouterr().out
        assert "far" in text
        assert "near" not in text
        assert "pss" in text.splitlines()[0]
    assert main(["stats", "far", "nobody"]) == 1
    assert capsys.readouterr().err == "nobody: no machine of this name runs\n"
    assert far.end() == 0
    assert main(["stats"]) == 0
    assert capsys.readouterr().out == "no machine runs\n"


def test_a_machine_that_the_oom_killer_took_is_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    """A machine that outgrows its cgroup is killed by the kernel; the next cardcage stats says so, once."""
    top = Path("/sys/fs/cgroup/memory")
    if os.geteuid() or not (top / "memory.oom_control").exists():
        pytest.skip("needs root and a cgroup v1 memory hierarchy, to have a process killed")
    group = top / f"cardcage-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(96 * MIB))
        (group / "memory.swappiness").write_text("0")
        far = Far(lambda: (group / "cgroup.procs").write_text(str(os.getpid())) and None)
        assert far.do("b = [bytearray(1)]")
        assert not far.do("b.append(b'x' * (200 << 20))")
        assert far.end() == -9
        assert main(["stats"]) == 0
        said = capsys.readouterr().out
        assert f"far (pid {far.process.pid}): " in said
        assert f"killed by the kernel's OOM killer in cgroup /{group.name}" in said
        assert main(["stats"]) == 0
        assert capsys.readouterr().out == "no machine runs\n"
    finally:
        group.rmdir()


@pytest.mark.once
def test_a_recording_can_be_shown_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--for with --record keeps each look; --from with --plot draws it as PNG, SVG and HTML without a machine."""
    file = tmp_path / "stats.jsonl"
    with machine("one"), machine("two"):
        assert main(["stats", "--for", "50ms", "--every", "20ms", "--record", str(file)]) == 0
    capsys.readouterr()
    assert file.read_text().splitlines()
    for kind, begins in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".html", b"<!doctype html>"), (".pdf", b"%PDF")):
        path = tmp_path / f"plot{kind}"
        assert main(["stats", "--from", str(file), "--plot", str(path)]) == 0
        assert path.read_bytes().startswith(begins)
    svg = (tmp_path / "plot.svg").read_text()
    assert all(f"<!-- {name} -->" in svg for name in ("one", "two", "all", *KINDS))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--every", "soon"], '--every: expected a time such as "250ms"'),
        (["--every", "1ms"], "--every: expected at least 10ms"),
        (["--for", "x"], "--for: expected a time"),
        (["--plot", "picture.gif"], "expected a name that ends in .png, .svg, .pdf, .html"),
        (["--plot", "/no/such/place/x.png"], "there is no directory /no/such/place"),
        (["--plot", "{tmp}/empty.png"], "no machine ran: there is nothing to draw"),
        (["--record", "/no/such/place/x"], "/no/such/place/x: cannot be written"),
        (["--from", "/no/such/file"], "/no/such/file: cannot be read: No such file"),
        (["--from", "{tmp}/bad"], "bad:2: no sample of cardcage stats"),
    ],
)
@pytest.mark.once
def test_mistakes_are_one_line(words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each mistake on the command line is one line that names the flag or file, and status 2."""
    (tmp_path / "bad").write_text('{"at": 1, "machines": []}\n{"at": 1, "machines": [{"name": 5}]}\n')
    assert main(["stats", *(word.format(tmp=tmp_path) for word in words)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_a_plot_without_matplotlib_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without matplotlib one line says what to install; the command itself does not need it."""
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["stats", "--plot", "x.png"]) == 70
    assert "needs: pip install 'cardcage[plot]'" in capsys.readouterr().err
    assert main(["stats"]) == 0


def test_kinds_add_up_to_the_size() -> None:
    """What is stacked for a guest is its size, whatever the figures say; the VMM comes on top."""
    for one in (
        MachineStats("a", 1, 100, resident=60, shared=20, merged=30, swapped=10, ballooned=20, overhead=7),
        MachineStats("a", 1, 100, resident=90, swapped=50, ballooned=50),
        MachineStats("a", 1, 100, resident=10, shared=50, ballooned=None),
    ):
        kinds = kinds_of(one)
        assert len(kinds) == len(KINDS)
        assert sum(kinds[:-1]) == 100
        assert min(kinds) >= 0


def test_a_terminal_sees_no_control_characters() -> None:
    """A machine's name with escapes in it reaches the table as plain characters."""
    place = Roster().add(RosterEntry("x\x1b[2J", os.getpid(), 1, start=1))
    (entry,) = Roster().read()[0]
    assert entry.name == "x?[2J"
    sample = look(Sampler())
    assert "\x1b" not in table(sample)
    assert isinstance(sample, Sample)
    place.close()
