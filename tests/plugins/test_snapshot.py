"""Snapshots in files: what is saved goes on, also compressed, again and again, and beside the machine it is of."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cardcage.errors import ConfigError, Denied, HostError, StateError, UsageError
from cardcage.hookspecs import hookimpl
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage.registry import Registry
from cardcage.security import Act, Mediator
from cardcage_snapshot import pages
from cardcage_snapshot.creating import Snapshot
from cardcage_snapshot.places import located, snapshot_root
from cardcage_snapshot.ram import Copy
from cardcage_snapshot.watching import WriteWatch
from snapshot_kit import COUNTER, count, counting, counts_on, image


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots and the key of this test alone."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def host() -> Iterator[Host]:
    """A host with the installed cards."""
    with Host() as made:
        yield made


def save(vm: Any, where: Any, **keys: Any) -> Snapshot:
    made: Snapshot = vm.snapshot(where, **keys)
    return made


def restored(where: Any, **keys: Any) -> Machine:
    made: Machine = Machine.restore(where, **keys)  # type: ignore[attr-defined]  # found by its entry point
    return made


@pytest.mark.parametrize("compress", [False, True])
def test_a_saved_machine_goes_on_many_times(tmp_path: Path, host: Host, compress: bool) -> None:
    """A saved machine goes on from the same count, twice at once and beside the one that it was saved from, which goes
    on too; a snapshot of a restored machine goes on likewise, and its RAM has holes where that is zero."""
    with counting(tmp_path, host, memory="64M", platform="pc") as vm:
        vm.start()
        counts_on(vm, 100)
        vm.pause()
        at = count(vm)
        made = save(vm, "first", compress=compress)
        assert vm.state == "paused"
        assert (made.machine, made.memory) == ("count", 64 << 20)
        assert made.stored < 4 << 20
        vm.resume()
        counts_on(vm, at)
        with restored("first", host=host, start=False) as one, restored("first", host=host, start=False) as two:
            assert {one.name, two.name} == {"count-2", "count-3"}
            assert (count(one), count(two)) == (at, at)
            one.start(boot=False)
            two.start(boot=False)
            counts_on(one, at + 100)
            counts_on(two, at + 100)
            two.pause()
            later = count(two)
            save(two, tmp_path / "second")
            with restored(tmp_path / "second", host=host, start=False) as three:
                assert count(three) == later
        counts_on(vm, count(vm))


def test_network_cards_that_have_one_address_are_named(
    tmp_path: Path, host: Host, capfd: pytest.CaptureFixture[str]
) -> None:
    """A machine of another name than the saved one's names its network cards that others of the snapshot may meet, as
    they all have one MAC address; not those that are by themselves, nor where no other machine has the name."""
    devices = [{"type": "virtio-net", "id": one, "net": net} for one, net in (("far", "switch:x"), ("near", "null"))]
    with counting(tmp_path, host, memory="16M", platform="pc", devices=devices) as vm:
        vm.start()
        save(vm, "networked")
        capfd.readouterr()
        with restored("networked", host=host, start=False):
            (line,) = (one for one in capfd.readouterr().err.splitlines() if "MAC address" in one)
            assert "far" in line
    with restored("networked", host=host, start=False):
        assert "MAC address" not in capfd.readouterr().err


def test_ram_is_mapped_and_not_read(tmp_path: Path, host: Host) -> None:
    """A restored machine's RAM is a private map of the file: hardly a page of it is there before the guest runs, and
    what a guest writes is not in the file."""
    with counting(tmp_path, host, memory="256M") as vm:
        vm.memory.write(64 << 20, b"\xaa" * (32 << 20))
        vm.start()
        counts_on(vm, 10)
        save(vm, "large")
    file = located("large") / "ram"
    before = file.read_bytes()
    assert os.stat(file).st_blocks * 512 < 36 << 20
    with restored("large", host=host, start=False) as vm:
        block = vm.memory.ranges[0].block
        assert pages.held(pages.touched(block, own=False)) < 1 << 20
        assert vm.memory.read(80 << 20, 4) == b"\xaa" * 4
        vm.memory.write(80 << 20, b"\xbb" * 4096)
        vm.start(boot=False)
        counts_on(vm, count(vm))
        assert pages.held(pages.runs_of(block)[0]) < 1 << 20
    assert file.read_bytes() == before


@pytest.mark.parametrize("watched", [True, False])
def test_pages_written_meanwhile_are_copied_again(
    tmp_path: Path, host: Host, watched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RAM that the guest and the host write while it is copied is saved as it is at the stop, also on a kernel that
    cannot tell what was written."""
    if not watched:

        def refuse(*_: object, **__: object) -> None:
            raise OSError(95, "not on this kernel")

        monkeypatch.setattr("cardcage_snapshot.ram.WriteWatch", refuse)
    take = Copy.take

    def late(copy: Copy) -> None:
        vm.memory.write(8 << 20, b"late" * 1024)
        vm.memory.write(12 << 20, bytes(4096))  # what was there is zero now
        take(copy)

    monkeypatch.setattr(Copy, "take", late)
    with counting(tmp_path, host, memory="16M") as vm:
        vm.memory.write(8 << 20, b"soon" * 1024)
        vm.memory.write(12 << 20, b"gone" * 1024)
        vm.start()
        counts_on(vm, 10)
        save(vm, "busy")
        with restored("busy", host=host, start=False) as two:
            assert two.memory.read(8 << 20, 4096) == b"late" * 1024
            assert two.memory.read(12 << 20, 4096) == bytes(4096)
            first = count(two)
            assert first > 0


def test_what_the_kernel_says_was_touched() -> None:
    """PAGEMAP_SCAN, and pagemap itself for older kernels, find the same touched pages; a watch tells those that were
    written since it was asked last."""
    from cardcage.ram import RamBlock

    block = RamBlock(8 << 20)
    block.view[4096 * 3] = 1
    block.view[4096 * 700 : 4096 * 702] = b"x" * 8192
    wanted = [(3 * 4096, 4096), (700 * 4096, 8192)]
    assert pages._mapped(block, own=False) == wanted
    try:
        assert pages.scanned(block, own=False) == wanted
        with WriteWatch(block, own=False) as watch:
            assert watch.written() == wanted
            assert watch.written() == []
            block.view[4096 * 701] = 5
            block.view[4096 * 1000] = 5
            assert watch.written() == [(701 * 4096, 4096), (1000 * 4096, 4096)]
        assert block.view[4096 * 701] == 5
    except OSError as error:
        pytest.skip(f"this kernel cannot tell: {error.strerror}")
    finally:
        block.close()


def test_disks_are_of_the_same_point(tmp_path: Path, host: Host) -> None:
    """Raw and qcow2 disks, and one on a backing file, are saved as they were; a restored machine writes to overlays,
    which go with it, or stay where its user says and are gone on with."""
    from cardcage_block.make import Qcow2Shape, create_qcow2

    raw, base, plain, top = (tmp_path / name for name in ("a.raw", "b.raw", "c.qcow2", "d.qcow2"))
    raw.write_bytes(b"raw disk" * 8192)
    base.write_bytes(b"the base" * 8192)
    create_qcow2(str(plain), 65536)
    create_qcow2(str(top), 65536, Qcow2Shape(backing_file="b.raw", backing_format="raw"))
    drives = [str(raw), {"file": str(plain)}, {"file": str(top), "format": "qcow2"}]
    devices = [{"type": "virtio-blk", "id": f"disk{at}", "drive": one} for at, one in enumerate(drives)]
    devices.append({"type": "virtio-blk", "id": "ro", "drive": {"file": str(base), "format": "raw", "readonly": True}})
    with counting(tmp_path, host, platform="pc", memory="16M", devices=devices) as vm:
        for at in range(3):
            disk(vm, f"disk{at}").writev(4096, [memoryview(b"from the guest".ljust(512))])
        vm.start()
        save(vm, "disks")
        for at in range(3):
            disk(vm, f"disk{at}").writev(4096, [memoryview(b"later than this".ljust(512))])
    assert not (located("disks") / "disk-ro.raw").exists()
    kept = tmp_path / "kept"
    for keys in ({}, {"disks": kept}, {"disks": kept}):
        with restored("disks", host=host, start=False, **keys) as vm:
            wrote = kept.exists() and keys and disk_bytes(vm, "disk0", 0).startswith(b"restored")
            for at, start in enumerate((b"raw disk" * 8, bytes(64), b"the base" * 8)):
                if not wrote:
                    assert disk_bytes(vm, f"disk{at}", 0).startswith(start)
                assert disk_bytes(vm, f"disk{at}", 4096).startswith(b"from the guest ")
                disk(vm, f"disk{at}").writev(0, [memoryview(b"restored".ljust(512))])
                disk(vm, f"disk{at}").flush()
            assert disk_bytes(vm, "ro", 0).startswith(b"the base")
    assert wrote
    assert [one.name for one in located("disks").parent.iterdir()] == ["disks"]
    os.utime(base)
    with pytest.raises(ConfigError, match=r'b\.raw: the disk of device "ro", which the snapshot has not, was changed'):
        restored("disks", host=host)


def disk(vm: Machine, id: str) -> Any:
    return vm.devices[id].slot.host.opened[0]


def disk_bytes(vm: Machine, id: str, at: int) -> bytes:
    data = bytearray(512)
    disk(vm, id).readv(at, [memoryview(data)])
    return bytes(data)


class Stubborn:
    """A device with a state that it does not tell."""

    def read(self, offset: int, size: int, /) -> int:
        return 0

    def write(self, offset: int, size: int, value: int, /) -> None: ...

    def reset(self) -> None: ...


class StubbornCard:
    """The card of that device."""

    @hookimpl
    def cardcage_register(self, registry: Registry) -> None:
        from cardcage.device import Pio

        registry.device("stubborn", Stubborn, regions=(Pio(4, base=0x600),))


def test_what_cannot_be_saved_says_so_before_anything_stops(tmp_path: Path) -> None:
    """A device without save(), a place that is taken, and a machine that has not started are refused in one line; the
    guest is not paused for it and nothing is left."""
    with Host([StubbornCard()]) as host, counting(tmp_path, host, devices=[{"type": "stubborn"}]) as vm:
        with pytest.raises(StateError, match="the machine is built"):
            save(vm, "not")
        vm.start()
        states: list[str] = []
        vm.observers.add("state", states.append)
        with pytest.raises(StateError, match=r'device "stubborn" .*cannot be saved: it has no save\(\)'):
            save(vm, "not")
    with Host() as host, counting(tmp_path, host) as vm:
        vm.start()
        vm.observers.add("state", states.append)
        save(vm, "taken")
        assert states[-2:] == ["paused", "running"]
        del states[:]
        with pytest.raises(ConfigError, match="is there already"):
            save(vm, "taken")
        (tmp_path / "mine").mkdir()
        with pytest.raises(ConfigError, match="is no snapshot, and is not replaced"):
            save(vm, tmp_path / "mine", replace=True)
        with pytest.raises(HostError, match="no snapshot can be written"):
            save(vm, Path("/proc/here/not"))
        for name in ("..", "", "a b", ".hidden", "x" * 200):
            with pytest.raises(UsageError, match="is no name of a snapshot"):
                save(vm, name)
        assert not states
        before = count(vm)
        save(vm, "taken", replace=True)
        counts_on(vm, before)
    assert [one.name for one in snapshot_root().iterdir()] == ["taken"]


KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from cardcage.host import Host
from cardcage_snapshot import creating, places
from snapshot_kit import counting, counts_on

left = int(sys.argv[1])
def dying(real):
    def call(*args, **keys):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), 9)
        return real(*args, **keys)
    return call

with Host() as host, counting(Path({folder!r}), host) as vm:
    vm.start()
    counts_on(vm, 10)
    for name in "fsync rename open pwrite unlink".split():
        setattr(os, name, dying(getattr(os, name)))
    places._rename = dying(places._rename)
    vm.snapshot({path!r}, replace=True)
    os._exit(0)
"""


@pytest.mark.once
def test_a_kill_leaves_the_old_or_the_new(tmp_path: Path, host: Host) -> None:
    """A process that is killed at any of its steps leaves the old snapshot or the new, whole; what else it left is
    removed by the next one."""
    path = tmp_path / "saved" / "one"
    with counting(tmp_path, host) as vm:
        vm.start()
        save(vm, path)
    program = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path), path=str(path))
    step, ended, seen = 1, 1, set()
    first = (path / "manifest.json").read_bytes()
    while ended:
        ended = subprocess.run([sys.executable, "-c", program, str(step)], timeout=120).returncode
        assert ended in (0, -signal.SIGKILL)
        with restored(path, host=host, verify=True, start=False) as vm:
            assert count(vm) >= 0
        seen.add((path / "manifest.json").read_bytes() == first)
        step += 1 if os.environ.get("CARDCAGE_LONG_TESTS") else 17
    assert seen == {True, False}
    assert [one.name for one in path.parent.iterdir()] == ["one"]


class Refusing:
    """A checker that refuses what it is told to."""

    def __init__(self, refused: str) -> None:
        self.refused, self.asked = refused, list[str]()

    def check(self, act: Act, /) -> None:
        self.asked.append(f"{act.tclass} {' '.join(act.permissions)}")
        if self.refused in self.asked[-1]:
            raise Denied(str(act))


@pytest.mark.parametrize("refused", ["machine save", "image create write", "machine load"])
def test_saving_and_loading_are_asked_for_first(tmp_path: Path, refused: str) -> None:
    """A checker that refuses to save, to write the file, or to load is heard before it happens."""
    checker = Refusing("nothing")
    with Host(mediator=Mediator((checker,))) as host, counting(tmp_path, host) as vm:
        vm.start()
        save(vm, "allowed")
        checker.refused = refused
        states: list[str] = []
        vm.observers.add("state", states.append)
        with pytest.raises(Denied):
            restored("allowed", host=host) if "load" in refused else save(vm, "refused")
        assert not states
        assert [one.name for one in snapshot_root().iterdir()] == ["allowed"]


def test_a_label_is_carried(tmp_path: Path, host: Host) -> None:
    """A machine's own security label is that of the machine that goes on from it."""
    with counting(tmp_path, host, machine={"label": "secret_t"}) as vm:
        vm.start()
        save(vm, "labelled")
    with restored("labelled", host=host, name="other") as vm:
        assert (vm.name, vm.label) == ("other", "secret_t")


def test_a_reset_boots_what_the_saved_machine_boots(tmp_path: Path, host: Host) -> None:
    """A restored machine that is reset boots the saved machine's image, which is opened only then."""
    with counting(tmp_path, host) as vm:
        vm.start()
        counts_on(vm, 100)
        save(vm, "resets")
    (tmp_path / "counter.bin").rename(tmp_path / "away")
    with restored("resets", host=host) as vm:
        vm.pause()
        (tmp_path / "away").rename(tmp_path / "counter.bin")
        vm.memory.write(COUNTER, bytes(4))
        vm.memory.write(0x7C00, bytes(16))
        vm.reset()
        vm.resume()
        counts_on(vm, 10)


@pytest.mark.parametrize(("before", "after"), [("tcg", "kvm"), ("kvm", "tcg")])
def test_one_state_for_any_accelerator(tmp_path: Path, host: Host, before: str, after: str) -> None:
    """What was saved under one accelerator goes on under the other, where the guest does not mind another processor;
    else the features that it would miss are named."""
    from cardcage_kvm.accel import Kvm

    if not (found := Kvm().probe()).usable:
        pytest.skip(found.reason)
    with counting(tmp_path, host, accel=before, platform="pc") as vm:
        vm.start()
        counts_on(vm, 50)
        save(vm, "moves")
    with pytest.raises(ConfigError, match=r"state.json: the saved machine's processor has .*, which this one has not"):
        restored("moves", host=host, accel=after)
    with restored("moves", host=host, accel=after, any_cpu=True) as vm:
        assert vm.accelerator.name == after
        counts_on(vm, count(vm) + 50)
        save(vm, "back")
    with restored("back", host=host, accel=before, any_cpu=True) as vm:
        counts_on(vm, count(vm) + 50)


def test_added_devices_are_there_again(tmp_path: Path, host: Host) -> None:
    """A device that was added by vm.add() is part of the restored machine, and so is a --set for the platform's."""
    from cardcage.config import Draft

    draft = Draft.of({"machine": {"platform": "pc", "memory": "16M", "accel": ["tcg"]}})
    draft.set("device.rtc.base='2001-02-03'")
    with Machine.from_config(draft.config(), host=host) as vm:
        vm.add("virtio-rng", id="more")
        vm.start()
        save(vm, "added")
        ids = list(vm.devices)
    with restored("added", host=host) as vm:
        assert list(vm.devices) == ids
        assert vm.config.defaults[0].value == "2001-02-03"


@pytest.mark.once
def test_the_command_line(tmp_path: Path) -> None:
    """``cardcage snapshot`` saves a running machine, in its jail, by its name, lists, shows, checks, restores and
    removes; errors are one line with status 2, and a listing that a machine reads is JSON."""
    program = str(Path(sys.executable).with_name("cardcage"))

    def cardcage(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([program, "snapshot", *words], capture_output=True, text=True, timeout=120)

    (tmp_path / "disk.raw").write_bytes(b"a disk".ljust(65536))
    (tmp_path / "vm.toml").write_text(
        f"""
        machine = {{ name = "count", memory = "16M", accel = ["tcg"] }}
        boot = {{ protocol = "raw", image = "{image(tmp_path)}", address = 0x7C00, mode = 16 }}
        device = [{{ type = "virtio-blk", drive = {{ file = "disk.raw", format = "raw" }} }}]
        """
    )
    running = subprocess.Popen([program, "run", str(tmp_path / "vm.toml")], stdin=subprocess.DEVNULL)
    try:
        while not (made := cardcage("create", "count", "mine", "--compress", "--json")).stdout:
            assert running.poll() is None, made.stderr  # it starts
        assert json.loads(made.stdout)["machine"] == "count"
        assert "the guest stood still for" in cardcage("create", "count", "other", "--parent", "mine").stdout
        again = cardcage("create", "count", "mine")
        assert (again.returncode, "is there already" in again.stderr) == (2, True)
    finally:
        running.terminate()
        running.wait(60)
    listed = json.loads(cardcage("list", "--json").stdout)
    assert [(one["name"], one["machine"], one["ours"], one["disks"]) for one in listed] == [
        ("mine", "count", True, 1),
        ("other", "count", True, 1),
    ]
    assert cardcage("list").stdout.splitlines()[1].split()[:2] == ["mine", "count"]
    assert "RAM zstd" in cardcage("show", "mine").stdout
    assert cardcage("check", "mine", "other").returncode == 0
    ran = cardcage("restore", "mine", "--timeout", "0.5", "--verify")
    assert (ran.returncode, ran.stderr.splitlines()[-1].partition(":")[2]) == (124, " timed out after 0.5 s")
    path = located("other") / "ram"
    with path.open("r+b") as file:
        file.seek(COUNTER)
        file.write(b"\xff\xff\xff\xff")
    checked = cardcage("check", "other")
    assert (checked.returncode, "ram: RAM at 0x0-0xfffff is damaged" in checked.stderr) == (2, True)
    assert (cardcage("rm", "mine").returncode, cardcage("rm", "other", "mine").returncode) == (2, 0)
    assert json.loads(cardcage("list", "--json").stdout) == []
    gone = cardcage("restore", "mine")
    assert (gone.returncode, "mine: there is no such snapshot" in gone.stderr) == (2, True)


LEAST = """
import sys
from cardcage import Machine
with Machine(memory="1M", accel="tcg", machine={"platform": "none"}, fragments=[{"security": {"jail": "off"}}]):
    print(sorted(one for one in sys.modules if one.startswith("cardcage_snapshot.") or one == "importlib.metadata"))
"""


@pytest.mark.once
def test_a_machine_loads_what_a_jail_would_keep_from_it() -> None:
    """Before its jail, a machine loads of this card what seals its configuration and opens pagemap, and no more."""
    done = subprocess.run([sys.executable, "-c", LEAST], capture_output=True, text=True, check=True)
    names = "backing pages places sealing tables watching".split()
    assert done.stdout.strip() == str([f"cardcage_snapshot.{one}" for one in names])
