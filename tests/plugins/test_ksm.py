"""KSM: the lease and the watcher on files of a test's own, then ksmd itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cardcage._config.structure import structure
from cardcage.errors import Denied, HostError
from cardcage.security import Act
from cardcage_fleet.rundir import run_directory
from cardcage_ksm.lease import KSM, HeldError, Lease, read_settings
from cardcage_ksm.policy import KsmOptions, KsmPolicy
from cardcage_memory_policies import MachineMemory
from cardcage_memory_policies.testing import TestMachine, check_policy

pytestmark = pytest.mark.xdist_group("host")

PROGRAM = [sys.executable, "-c", "import sys; from cardcage_cli import main; sys.exit(main())"]
FOUND = {"run": "0", "advisor_mode": "[none] scan-time", "pages_to_scan": "100", "sleep_millisecs": "20"}
WANTED = {"sleep_millisecs": "5", "advisor_mode": "scan-time", "run": "1"}


@pytest.fixture
def ksm(tmp_path: Path) -> Path:
    """A directory that looks like ksmd's."""
    folder = tmp_path / "ksm"
    folder.mkdir()
    for name, text in FOUND.items():
        (folder / name).write_text(text)
    return folder


def plain(ksm: Path) -> dict[str, str]:
    return {**read_settings(ksm)}


BEFORE = {**FOUND, "advisor_mode": "none"}


def until(true: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for another process."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def user(folder: Path, ksm: Path, group: str | None = None) -> subprocess.Popen[bytes]:
    """A process that joins and waits."""
    code = (
        "import sys, time; from pathlib import Path; from cardcage_ksm.lease import Lease\n"
        f"Lease(Path(sys.argv[1]), Path(sys.argv[2])).join({group!r}, 'other', {WANTED!r})\n"
        "print('joined', flush=True); time.sleep(1000)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder), str(ksm)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"joined\n"
    process.stdout.close()
    return process


def kill(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_the_first_sets_and_the_last_puts_back(tmp_path: Path, ksm: Path) -> None:
    """Settings are changed by the first user, stay while there is one, and are as found after the last."""
    first, second = Lease(tmp_path, ksm), Lease(tmp_path, ksm)
    assert first.join(None, "first", WANTED) == []
    assert plain(ksm) == {**BEFORE, **WANTED}
    assert second.join(None, "second", {"sleep_millisecs": "99"}) == []
    first.leave()
    first.leave()
    assert plain(ksm) == {**BEFORE, **WANTED}
    second.leave()
    assert plain(ksm) == BEFORE
    assert not (tmp_path / "record").exists()


def test_the_watcher_puts_back_after_a_crash(tmp_path: Path, ksm: Path) -> None:
    """After SIGKILL of all users the settings come back by themselves, and only then."""
    first, second = user(tmp_path, ksm), user(tmp_path, ksm)
    kill(first)
    lease = Lease(tmp_path, ksm)
    assert not lease.left_over()
    assert plain(ksm)["run"] == "1"
    kill(second)
    until(lambda: not (tmp_path / "record").exists())
    assert plain(ksm) == BEFORE
    lease.close()


def watchers(folder: Path) -> list[int]:
    """Processes that watch *folder*."""
    found = []
    for one in Path("/proc").iterdir():
        try:
            words = (one / "cmdline").read_bytes().split(b"\0") if one.name.isdigit() else []
        except OSError:
            continue
        if len(words) > 4 and words[3].endswith(b"lease.py") and words[4] == bytes(folder):
            found.append(int(one.name))
    return found


def test_without_the_watcher_the_next_user_knows(tmp_path: Path, ksm: Path) -> None:
    """When the watcher was killed too, the record tells the next user what was found, and ``restore`` puts it back."""
    for finish in ("join", "restore"):
        process = user(tmp_path, ksm)
        for pid in watchers(tmp_path):
            os.kill(pid, signal.SIGKILL)
        until(lambda: not watchers(tmp_path))
        kill(process)
        lease = Lease(tmp_path, ksm)
        assert lease.left_over()
        assert plain(ksm) == {**BEFORE, **WANTED}
        if finish == "join":
            lease.join("group", "next", {"sleep_millisecs": "7", "run": "1"})
            assert plain(ksm) == {**BEFORE, "sleep_millisecs": "7", "run": "1"}
            lease.leave()
        else:
            assert lease.restore()
            assert not lease.restore()
            lease.close()
        assert plain(ksm) == BEFORE


def test_the_watcher_is_small_and_ends(tmp_path: Path, ksm: Path) -> None:
    """The watcher is one process of a session of its own that ends once it has nothing to watch."""
    lease = Lease(tmp_path, ksm)
    lease.join(None, "one", WANTED)
    (pid,) = watchers(tmp_path)
    assert os.getsid(pid) != os.getsid(0)
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    assert pages * 4096 < 16 << 20
    lease.leave()
    until(lambda: not watchers(tmp_path))


def test_another_group_waits_its_turn(tmp_path: Path, ksm: Path) -> None:
    """While machines of one group merge, others are refused with the reason; afterwards they may."""
    first, other = Lease(tmp_path, ksm), Lease(tmp_path, ksm)
    first.join("s0:c1,c2", "web of process 7", WANTED)
    reason = r"shares ksmd, and web of process 7 \(s0:c1,c2\) is using it: a machine without a label may not"
    with pytest.raises(HeldError, match=reason):
        other.join(None, "other", WANTED)
    first.leave()
    other.join(None, "other", WANTED)
    other.leave()
    assert plain(ksm) == BEFORE


def test_what_others_changed_stays(tmp_path: Path, ksm: Path) -> None:
    """A setting that somebody changed meanwhile is theirs; what the advisor chose is put back."""
    lease = Lease(tmp_path, ksm)
    lease.join(None, "one", WANTED)
    (ksm / "sleep_millisecs").write_text("33")
    (ksm / "pages_to_scan").write_text("4711")
    lease.leave()
    assert plain(ksm) == {**BEFORE, "sleep_millisecs": "33"}


def test_a_ksmd_that_runs_is_left_as_it_is(tmp_path: Path, ksm: Path) -> None:
    """Where ksmd runs already somebody tunes it: nothing is changed."""
    (ksm / "run").write_text("1")
    lease = Lease(tmp_path, ksm)
    lease.join(None, "one", WANTED)
    assert plain(ksm) == {**BEFORE, "run": "1"}
    lease.leave()
    assert plain(ksm) == {**BEFORE, "run": "1"}


@pytest.mark.parametrize("text", ["", "[]", "{", '{"found": 1}', "null"])
def test_a_broken_record_is_no_record(tmp_path: Path, ksm: Path, text: str) -> None:
    """A record cut short is passed over."""
    (tmp_path / "record").write_text(text)
    lease = Lease(tmp_path, ksm)
    assert lease.record() == {}
    lease.join(None, "one", WANTED)
    lease.leave()
    assert plain(ksm) == BEFORE


# the policy


def policy(folder: Path, ksm: Path, **options: Any) -> KsmPolicy:
    return KsmPolicy(structure(options, KsmOptions), folder=lambda: folder, ksm=ksm)


@pytest.fixture
def machines() -> Iterator[Callable[..., MachineMemory]]:
    made: list[TestMachine] = []

    def make(**arguments: Any) -> MachineMemory:
        made.append(TestMachine(**arguments))
        return MachineMemory(made[-1])  # type: ignore[arg-type]  # a stand-in

    yield make
    for one in made:
        one.close()


class Allow:
    def check(self, act: Act, /) -> None:
        if act.source == "untrusted":
            raise Denied("untrusted may not merge")


Make = Callable[..., MachineMemory]


def test_labels_hold_the_lease(tmp_path: Path, ksm: Path, machines: Make) -> None:
    """With security checkers, machines of one label merge, and another label or a denied one is refused in one line."""
    lease = {"folder": tmp_path, "ksm": ksm}
    one, same, other = policy(**lease), policy(**lease), policy(**lease)
    first, second = (machines(label="s0:c1", checkers=(Allow(),), name=name) for name in "ab")
    one.attach(first)
    same.attach(second)
    with pytest.raises(HostError, match=r"^the whole host .* a of process \d+ \(s0:c1\) is using it: s0:c2 may not$"):
        other.attach(machines(label="s0:c2", checkers=(Allow(),)))
    one.detach(first)
    same.detach(second)
    assert plain(ksm) == BEFORE
    with pytest.raises(Denied, match="untrusted may not merge"):
        other.attach(machines(label="untrusted", checkers=(Allow(),)))
    assert plain(ksm) == BEFORE


def test_a_group_holds_the_lease(tmp_path: Path, ksm: Path, machines: Make) -> None:
    """Without labels, machines of one configured group merge, and others are refused."""
    web = policy(tmp_path, ksm, group="web")
    memory = machines()
    web.attach(memory)
    with pytest.raises(HostError, match=r"\(web\) is using it: db may not"):
        policy(tmp_path, ksm, group="db").attach(machines())
    web.detach(memory)


def test_labels_without_a_lease_do_not_merge(ksm: Path, machines: Make) -> None:
    """Where the lease cannot be had, labelled machines are refused, and others merge without touching ksmd."""

    def nowhere() -> Path:
        raise HostError("no such place")

    labelled = KsmPolicy(folder=nowhere, ksm=ksm)
    with pytest.raises(HostError, match="no lease on ksmd, without which s0:c1 may not merge: no such"):
        labelled.attach(machines(label="s0:c1", checkers=(Allow(),)))
    plain_machine = TestMachine()
    KsmPolicy(folder=nowhere, ksm=ksm).attach(MachineMemory(plain_machine))  # type: ignore[arg-type]  # a stand-in
    events = [(event, values.get("start")) for _, event, values in plain_machine.log.entries]
    assert events[-1] == (
        "KSM: RAM is marked, but ksmd does not run and may not be started here",
        "echo 1 | sudo tee /sys/kernel/mm/ksm/run",
    )
    assert plain(ksm) == BEFORE
    plain_machine.close()


def test_memory_that_cannot_merge_is_refused(tmp_path: Path, ksm: Path, machines: Make) -> None:
    """Shared memory is refused with the reason, before anything is changed; so is a kernel without KSM."""
    with pytest.raises(HostError, match=r"RAM cannot be merged: it is shared "):
        policy(tmp_path, ksm).attach(machines(shared=True))
    assert plain(ksm) == BEFORE
    with pytest.raises(HostError, match="this kernel has no KSM"):
        policy(tmp_path, tmp_path / "none").attach(machines())


def test_settings_are_those_of_the_kernel() -> None:
    """ksmd starts last; without the advisor its pages are set; only settings that exist are touched."""
    new = KsmOptions(max_page_sharing=64).settings(
        {**FOUND, "advisor_target_scan_time": "200", "max_page_sharing": "9"}
    )
    assert list(new)[-1] == "run"
    assert new["advisor_mode"] == "scan-time"
    assert new["advisor_target_scan_time"] == "20"
    assert new["max_page_sharing"] == "64"
    assert "pages_to_scan" not in new
    old = KsmOptions().settings({"run": "0", "pages_to_scan": "1", "sleep_millisecs": "1"})
    assert old == {"sleep_millisecs": "20", "pages_to_scan": "2500", "run": "1"}


# ksmd itself

real = pytest.mark.skipif(not os.access(KSM / "run", os.W_OK), reason="ksmd's settings can only be written by root")


def merging() -> list[str]:
    """Processes with memory that ksmd looks at."""
    found = []
    for one in Path("/proc").glob("[0-9]*/ksm_stat"):
        with suppress(OSError):
            if "ksm_rmap_items 0\n" not in one.read_text():
                found.append((one.parent / "cmdline").read_text().replace("\0", " ")[:200])
    return found


def undisturbed(act: Callable[[Path], None], folder: Path) -> None:
    """Run *act*; again when it failed while another process of the host may have changed ksmd, which all share."""
    for attempt in range(6):
        (mine := folder / str(attempt)).mkdir()
        try:
            act(mine)
            break
        except AssertionError as error:
            if attempt == 5:
                error.add_note(f"mergeable memory have: {merging()}")
                raise


@real
def test_the_contract(tmp_path: Path) -> None:
    """The policy passes the public contract, on ksmd itself."""
    undisturbed(lambda folder: check_policy(lambda: policy(folder, KSM)), tmp_path)


@real
def test_pages_to_scan_comes_back_after_the_advisor(tmp_path: Path) -> None:
    """The host's own ``pages_to_scan`` comes back, be it by chance what the advisor has chosen."""
    advisor = Path(KSM / "advisor_min_pages_to_scan")
    if not advisor.exists():
        pytest.skip("this kernel's ksmd has no advisor")

    def once(folder: Path) -> None:
        before = read_settings(KSM)
        (KSM / "pages_to_scan").write_text(advisor.read_text())
        try:
            lease, found = Lease(folder, KSM), read_settings(KSM)
            lease.join(None, "one", KsmOptions().settings(found))
            lease.leave()
            assert read_settings(KSM) == found
        finally:
            (KSM / "pages_to_scan").write_text(before["pages_to_scan"])

    undisturbed(once, tmp_path)


@real
@pytest.mark.timeout(600)
def test_ksmd_merges_and_unmerges(tmp_path: Path, machines: Make) -> None:
    """Equal pages of two machines become one, on request they are their own again, and nothing reads differently."""

    def once(folder: Path) -> None:
        size = 32 << 20
        block = os.urandom(4096)
        memories, policies = [machines(size=size, name=name) for name in "ab"], []
        before, areas = read_settings(KSM), [area(memory) for memory in memories]
        for memory in memories:
            memory._machine.memory.write(0, block * (size // 4096))
            policies.append(policy(folder, KSM, scan_time="1s", max_cpu=100))
            policies[-1].attach(memory)
        try:
            if before["run"] != "1":
                assert read_settings(KSM)["run"] == "1"
            until(lambda: merged(areas) > size * 2 // 4096 * 9 // 10, 40)
            for memory in memories:
                memory.merge(False)
            until(lambda: merged(areas) < 100, 40)
            for memory in memories:
                assert memory._machine.memory.read(0, size) == block * (size // 4096)
        finally:
            for memory, one in zip(memories, policies, strict=True):
                one.detach(memory)
        assert read_settings(KSM) == before

    undisturbed(once, tmp_path)


def area(memory: MachineMemory) -> range:
    """Where its RAM lies in this process."""
    (slot,) = memory._machine.memory.slots
    return range(slot.host_address, slot.host_address + slot.size)


def merged(areas: list[range]) -> int:
    """Pages that are merged in the mappings of *areas*: other memory of this process may merge at the same time."""
    pages, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first:
            low, high = (int(one, 16) for one in first.split("-"))
            inside = any(low < one.stop and one.start < high for one in areas)
        elif first == "KSM:" and inside:
            pages += int(rest.split()[0]) // 4
    return pages


@real
def test_ksmd_is_as_found_after_a_killed_machine() -> None:
    """A machine with the policy is killed by SIGKILL; soon after, ksmd has the settings that were there before."""
    before = read_settings(KSM)
    if before["run"] == "1":
        pytest.skip("ksmd runs already, so that nothing is changed")
    code = (
        "from cardcage import Machine; import time\n"
        "vm = Machine(memory='16M', accel='tcg', fragments=[{'policy': {'memory': ['ksm']}}])\n"
        "print('built', flush=True); time.sleep(1000)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"built\n"
            assert read_settings(KSM)["run"] == "1"
            done = subprocess.run([*PROGRAM, "ksm"], capture_output=True, text=True, check=True)
            assert "ksmd      runs" in done.stdout
            assert f"machine of process {process.pid} (in use)" in done.stdout
        finally:
            kill(process)
    until(lambda: not (run_directory("ksm") / "record").exists())
    assert read_settings(KSM) == before, merging()
    done = subprocess.run([*PROGRAM, "ksm", "--restore"], capture_output=True, text=True, check=True)
    assert done.stdout == "there was nothing to restore\n"
