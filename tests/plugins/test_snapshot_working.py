"""Working sets: what a restored guest touches first is noted beside its snapshot, and read ahead for others."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cardcage.errors import ConfigError, Denied
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage.ram import PAGE
from cardcage.security import Act, Mediator
from cardcage_fork import fork
from cardcage_snapshot import manifest, working
from cardcage_snapshot.pages import Run
from cardcage_snapshot.places import Folder
from cardcage_snapshot.ram import digest
from cardcage_snapshot.sealing import canonical
from cardcage_snapshot.working import WorkingSet, known, without
from hypothesis import given
from hypothesis import strategies as st
from installed import PROGRAM
from snapshot_kit import COUNTER, count, counting, counts_on

SIZE = 64 << 20


@pytest.fixture(scope="module", autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Snapshots and the key of this module alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot with data that the guest does not touch, which tests copy."""
    folder = tmp_path_factory.mktemp("saved")
    with Host() as host, counting(folder, host, memory="64M") as vm:
        vm.start()
        counts_on(vm, 10)
        vm.memory.write(32 << 20, b"data" * (1 << 18))
        made: Any = vm
        made.snapshot(folder / "one")
    return folder / "one"


@pytest.fixture
def one(saved: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(saved, tmp_path / "one"))


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """What is read ahead from now on."""
    found: list[Run] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, offset, size, advice: found.append((offset, size)))
    return found


def restored(where: Path, **keys: Any) -> Machine:
    made: Machine = Machine.restore(where, **keys)  # type: ignore[attr-defined]  # found by its entry point
    return made


def noted(where: Path) -> WorkingSet | None:
    with Folder(where) as folder:
        return known(folder, manifest.read(folder)[0])


def holds(runs: list[Run], address: int) -> bool:
    return any(offset <= address < offset + size for offset, size in runs)


def test_what_the_guest_touches_is_noted_and_read_ahead(one: Path, ahead: list[Run]) -> None:
    """The first machine notes the pages of the guest's counter and code, once it has run for a while or ended, and
    not those that nobody touches; for the next one exactly these are read ahead."""
    with Host() as host:
        with restored(one, host=host) as vm:
            counts_on(vm, count(vm))
            assert not ahead
        found = noted(one)
        assert found is not None
        assert 0 < found.seconds <= 1
        assert holds(found.runs, COUNTER)
        assert holds(found.runs, 0x7C00)
        assert not holds(found.runs, 32 << 20)
        with restored(one, host=host) as vm:
            while len(ahead) < len(found.runs):
                assert vm.state == "running"
        assert ahead == found.runs
    assert sorted(path.name for path in one.iterdir()) == ["manifest.json", "ram", "state.json", "working-set"]


def test_a_whole_second_is_noted_once(one: Path) -> None:
    """After a second of the guest's time it is noted while the machine runs on; a shorter one does not replace it, and
    it replaces a shorter one."""
    with Host() as host:
        with restored(one, host=host) as vm:
            counts_on(vm, count(vm))
        first = noted(one)
        assert first is not None
        with restored(one, host=host) as vm:
            while (found := noted(one)) is None or found.seconds == first.seconds:
                assert vm.state == "running"
            assert found.seconds == 1.0
        before = (one / "working-set").read_bytes()
        with restored(one, host=host) as vm:
            counts_on(vm, count(vm))
        assert (one / "working-set").read_bytes() == before


def test_a_machine_in_its_jail_notes_too(one: Path, ahead: list[Run], runtime: Path) -> None:
    """A machine of the command line, which reaches nothing of the directory, notes what its guest touches in a file
    that it has open."""
    (one / "working-set").symlink_to("elsewhere")
    words = [*PROGRAM, "snapshot", "restore", str(one), "--timeout"]
    done = subprocess.run([*words, "0.3"], capture_output=True, text=True, check=False)
    assert (done.returncode, "refused" in done.stderr) == (124, False), done.stderr
    assert not (one / "elsewhere").exists()
    found = noted(one)
    assert found is not None
    assert 0 < found.seconds < 1
    assert holds(found.runs, COUNTER)
    assert not holds(found.runs, 32 << 20)
    with subprocess.Popen([*words, "60"], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        found = None
        while found is None or found.seconds < 1:
            assert running.poll() is None
            with suppress(ConfigError):  # it is being written
                found = noted(one)
        running.kill()
    with Host() as host, restored(one, host=host) as vm:
        while len(ahead) < len(found.runs):
            assert vm.state == "running"
    assert ahead == found.runs


def test_a_machine_that_never_ran_notes_nothing(one: Path) -> None:
    """Without a start there is no first second."""
    with Host() as host, restored(one, host=host, start=False) as vm:
        vm.memory.read(0, SIZE)
    assert noted(one) is None


def test_only_the_root_of_a_chain_is_read_ahead(tmp_path: Path) -> None:
    """Pages that come from a snapshot that is made on another are none of those that wait for the root's file."""
    with Host() as host:
        with counting(tmp_path, host, memory="64M") as vm:
            made: Any = vm
            vm.start()
            counts_on(vm, 10)
            vm.memory.write(32 << 20, b"root" * (1 << 18))
            made.snapshot(tmp_path / "root")
            vm.memory.write(40 << 20, b"tops" * (1 << 18))
            made.snapshot(tmp_path / "top", parent=tmp_path / "root")
        with restored(tmp_path / "top", host=host) as vm:
            counts_on(vm, count(vm))
            vm.memory.read(32 << 20, PAGE)
    found = noted(tmp_path / "top")
    assert found is not None
    assert holds(found.runs, 32 << 20)
    assert not holds(found.runs, 40 << 20)
    assert noted(tmp_path / "root") is None


def test_what_is_not_ours_is_left_alone(one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is noted in a snapshot of somebody else's, or where a checker forbids it; the machine runs. A copy that
    was forked notes nothing either."""

    class Checker:
        def check(self, act: Act, /) -> None:
            if str(act).endswith("working-set"):
                raise Denied(str(act))

    def runs(**keys: Any) -> None:
        with Host(mediator=keys.pop("mediator", None)) as host, restored(one, host=host, **keys) as vm:
            counts_on(vm, count(vm))

    with monkeypatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path / "nobody"))
        runs(trust=True)
    assert noted(one) is None
    runs(mediator=Mediator((Checker(),)))
    assert noted(one) is None
    with Host() as host, restored(one, host=host) as vm:
        with fork(vm)[0] as copy:
            copy.stop()
        assert noted(one) is None
    assert noted(one) is not None


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"cardcage working set": 2}', '{"cardcage working set": 1, "runs": [[0, 1]]}', "[" * 99]
)
def test_a_damaged_one_is_made_anew(one: Path, ahead: list[Run], text: str) -> None:
    """A file that is none is not used, and the machine runs; then there is a good one."""
    (one / "working-set").write_text(text)
    with pytest.raises(ConfigError):
        noted(one)
    with Host() as host, restored(one, host=host) as vm:
        counts_on(vm, count(vm))
    assert not ahead
    assert noted(one) is not None


def test_another_snapshots_is_not_used(one: Path, saved: Path, ahead: list[Run]) -> None:
    """A working set that came from another snapshot, a link, or what is no plain file is not used."""
    (one / "elsewhere").write_text("kept")
    (one / "working-set").symlink_to("elsewhere")
    with Host() as host:
        with restored(one, host=host) as vm:
            counts_on(vm, count(vm))
        assert (one / "elsewhere").read_text() == "kept"
        table = json.loads((one / "working-set").read_text())
        table["snapshot"] = "0" * 64
        table["sum"] = digest(canonical([table["snapshot"], table["seconds"], table["runs"]]))
        (one / "working-set").write_text(json.dumps(table))
        with pytest.raises(ConfigError, match="another snapshot"):
            noted(one)
        with restored(one, host=host) as vm:
            counts_on(vm, count(vm))
    assert not ahead


NUMBERS = st.integers() | st.integers(0, SIZE // PAGE) | st.none() | st.floats() | st.text(max_size=3)
RUNS = st.lists(st.lists(NUMBERS, max_size=3) | NUMBERS, max_size=5)


@given(runs=RUNS, seconds=st.floats() | st.integers(), summed=st.booleans())
def test_hostile_runs_stay_inside(saved: Path, runs: Any, seconds: Any, summed: bool) -> None:
    """Whatever the file says, also with a right sum: what is read ahead lies in the file, in order and once."""
    with Folder(saved) as folder:
        made = manifest.read(folder)[0]
    sum = digest(canonical([made.sum, seconds, runs])) if summed else "0" * 32
    table = {"cardcage working set": 1, "snapshot": made.sum, "sum": sum, "seconds": seconds, "runs": runs}
    (saved / "working-set").write_text(json.dumps(table))
    try:
        with suppress(ConfigError):
            found = noted(saved)
            assert found is not None
            last = 0
            for offset, size in found.runs:
                assert offset >= last
                assert offset % PAGE == size % PAGE == 0
                last = offset + size
            assert last <= SIZE
            assert 0 <= found.seconds <= 1
    finally:
        (saved / "working-set").unlink()


def test_many_runs_are_bounded(one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more runs than are kept, the longest are."""
    touched = [*((PAGE * 2 * at, PAGE) for at in range(9)), (1 << 20, 2 * PAGE)]
    monkeypatch.setattr(working, "RUNS", 3)
    monkeypatch.setattr(working, "scanned", lambda block, own: touched)
    with Host() as host, restored(one, host=host) as vm:
        counts_on(vm, count(vm))
    found = noted(one)
    assert found is not None
    assert len(found.runs) == 3
    assert (1 << 20, 2 * PAGE) in found.runs


STRETCHES = st.lists(st.integers(0, 60), max_size=12, unique=True).map(sorted)


def runs_of(edges: list[int]) -> list[Run]:
    """Sorted runs between every other two numbers."""
    return [(low, high - low) for low, high in zip(edges[::2], edges[1::2], strict=False)]


@given(STRETCHES, STRETCHES)
def test_runs_without_others(one: list[int], two: list[int]) -> None:
    """What is left is what is in the first and not in the second."""

    def numbers(runs: list[Run]) -> list[int]:
        return [at for offset, size in runs for at in range(offset, offset + size)]

    left = without(runs_of(one), runs_of(two))
    assert numbers(left) == [at for at in numbers(runs_of(one)) if at not in numbers(runs_of(two))]
