"""Snapshots in the words of QEMU's monitors: lines of the human one, and jobs."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage_snapshot import cardcage_forked
from cardcage_snapshot.qmp import place
from qmp_kit import Client
from snapshot_kit import count, counting, counts_on

pytestmark = pytest.mark.once


@pytest.fixture
def vm(tmp_path: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A machine that counts, with a monitor and a disk, and snapshots of this test alone."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with Host() as host, monitored(tmp_path, host) as made:
        yield made.start()


def monitored(folder: Path, host: Host, **keys: Any) -> Machine:
    """A machine that counts, with a monitor and a disk in *folder*."""
    (folder / "disk.raw").write_bytes(b"first".ljust(4096, b"\0"))
    devices = [
        {"type": "qmp", "socket": f"unix:{folder}/qmp", "names": {"disk": "node"}},
        {"type": "virtio-blk", "id": "disk", "drive": {"file": f"{folder}/disk.raw", "format": "raw"}},
    ]
    return counting(folder, host, memory="8M", platform="pc", devices=devices, **keys)


@pytest.fixture
def peer(vm: Machine, tmp_path: Path) -> Iterator[Client]:
    with Client(tmp_path / "qmp") as made:
        yield made


def line(peer: Client, text: str) -> str:
    """What a line of the human monitor prints."""
    return str(peer.ask("human-monitor-command", command_line=text)["return"]).replace("\r\n", "\n")


def written(vm: Machine, data: bytes) -> None:
    """Write to the disk, as the guest's requests do."""
    backend: Any = vm.devices["disk"].slot.host.opened[0]
    backend.writev(0, [memoryview(data.ljust(512, b"\0"))])


def test_lines_save_load_and_remove(vm: Machine, peer: Client, tmp_path: Path) -> None:
    """``savevm`` keeps the machine, ``loadvm`` puts its memory, state and disk back and leaves it running or paused as
    it was, ``info snapshots`` lists it and ``delvm`` removes it; a snapshot that is not there, is damaged, or has no
    name that can be is told of, and changes nothing."""
    counts_on(vm, 10)
    assert line(peer, "info snapshots") == "There is no snapshot available.\n"
    assert peer.ask("stop") == {"return": {}}
    kept = count(vm)
    assert line(peer, "savevm one") == ""
    assert " one " in line(peer, "info snapshots")
    assert peer.ask("cont") == {"return": {}}
    counts_on(vm, kept + 1000)
    written(vm, b"second")
    assert peer.ask("stop") == {"return": {}}
    assert line(peer, "loadvm one") == ""
    assert (count(vm), vm.state) == (kept, "paused")
    assert (tmp_path / "disk.raw").read_bytes().startswith(b"first")
    assert peer.ask("cont") == {"return": {}}
    counts_on(vm, kept + 1000)
    assert line(peer, "loadvm one") == ""
    assert vm.state == "running"
    counts_on(vm, kept + 1000)
    assert "does not exist" in line(peer, "loadvm two")
    assert "does not exist" in line(peer, "delvm two")
    assert "is no name of a snapshot" in line(peer, "savevm ../one")
    assert "expected loadvm TAG" in line(peer, "loadvm")
    folder = tmp_path / "state" / "cardcage" / "snapshots" / "count.one"
    with open(folder / "ram", "r+b") as file:
        file.seek(0x5000)
        file.write(b"\xff\xff\xff\x7f")
    assert "is damaged" in line(peer, "loadvm one")
    assert vm.state == "running"
    assert count(vm) < 0x7FFFFFFF
    assert line(peer, "delvm one") == ""
    assert not folder.exists()


def test_jobs_save_load_and_remove(vm: Machine, peer: Client) -> None:
    """The jobs ``snapshot-save``, ``-load`` and ``-delete`` tell of each status until they are dismissed; an id or a
    tag that is taken, disks that are not all there are, and a snapshot that is not there are told of."""
    disks = {"vmstate": "node", "devices": ["node"]}
    counts_on(vm, 10)
    assert peer.ask("snapshot-save", job_id="j", tag="one", **disks) == {"return": {}}

    def statuses(until: str = "concluded") -> list[str]:
        found = [peer.event("JOB_STATUS_CHANGE")["data"]["status"]]
        while found[-1] != until:
            found.append(peer.event("JOB_STATUS_CHANGE")["data"]["status"])
        return found

    assert statuses() == ["created", "running", "waiting", "pending", "concluded"]
    job = {"id": "j", "type": "snapshot-save", "status": "concluded", "current-progress": 1, "total-progress": 1}
    assert peer.ask("query-jobs") == {"return": [job]}
    assert "already in use" in peer.ask("snapshot-delete", job_id="j", tag="one", devices=["node"])["error"]["desc"]
    assert "already exists" in peer.ask("snapshot-save", job_id="k", tag="one", **disks)["error"]["desc"]
    assert (
        "expects all disks"
        in peer.ask("snapshot-load", job_id="k", tag="one", vmstate="node", devices=[])["error"]["desc"]
    )
    assert peer.ask("job-dismiss", id="j") == {"return": {}}
    assert statuses("null") == ["null"]
    assert peer.ask("job-dismiss", id="j")["error"]["desc"] == "Job not found: 'j'"
    assert peer.ask("snapshot-load", job_id="k", tag="one", **disks) == {"return": {}}
    assert statuses()[-2:] == ["pending", "concluded"]
    assert peer.ask("snapshot-delete", job_id="l", tag="one", devices=["node"]) == {"return": {}}
    assert statuses()[-2:] == ["pending", "concluded"]
    assert peer.ask("snapshot-load", job_id="m", tag="one", **disks) == {"return": {}}
    assert statuses()[-2:] == ["aborting", "concluded"]
    assert "does not exist" in peer.ask("query-jobs")["return"][-1]["error"]
    assert vm.state == "running"
    counts_on(vm, count(vm))


def test_a_machine_finds_its_snapshots_under_a_number(vm: Machine, peer: Client, tmp_path: Path) -> None:
    """A machine to whose name a number was added has the snapshots of the name that it was given: it lists and loads
    those that another saved, and may replace and remove them once that one has ended, and no sooner."""
    (tmp_path / "second").mkdir()
    counts_on(vm, 10)
    assert line(peer, "savevm one") == ""
    with monitored(tmp_path / "second", vm.host) as second, Client(tmp_path / "second" / "qmp") as other:
        assert second.name != "count"
        second.start()
        assert " one " in line(other, "info snapshots")
        assert line(other, "loadvm one") == ""
        for words in ("savevm one", "delvm one"):
            assert f"'one' was saved by machine '{vm.name}'" in line(other, words)
        assert line(other, "savevm two") == ""
        assert "'two' was saved by machine" in line(peer, "delvm two")
        assert line(other, "savevm two") == ""
        vm.close()
        for words in ("savevm one", "delvm one", "savevm one"):
            assert line(other, words) == ""
    with monitored(tmp_path / "second", vm.host) as again, Client(tmp_path / "second" / "qmp") as other:
        again.start()
        assert line(other, "loadvm two") == line(other, "delvm two") == line(other, "savevm one") == ""


def test_a_snapshot_of_one_that_ran_beside_is_kept(vm: Machine, peer: Client, tmp_path: Path) -> None:
    """What another machine of the given name saved while this one ran is not replaced after the other's end either."""
    (tmp_path / "second").mkdir()
    with monitored(tmp_path / "second", vm.host) as second, Client(tmp_path / "second" / "qmp") as other:
        second.start()
        assert line(other, "savevm one") == ""
    assert "was given the same name" in line(peer, "savevm one")


def test_one_that_is_being_written_is_not_replaced(vm: Machine, peer: Client, tmp_path: Path) -> None:
    """Of two that replace or remove a snapshot at once, the second is told of it."""
    assert line(peer, "savevm one") == ""
    fd = os.open(tmp_path / "state" / "cardcage" / "snapshots" / "count.one", os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        for words in ("savevm one", "delvm one"):
            assert "is being written or removed by another machine" in line(peer, words)
    finally:
        os.close(fd)
    assert line(peer, "savevm one") == ""


def test_whose_the_snapshots_are(tmp_path: Path, runtime: Path) -> None:
    """A machine that nobody named, or that is the copy of another by a fork, has the snapshots of the name that it has;
    any other those of the name that it was given."""

    def made(name: str | None = None) -> Machine:
        return Machine(name=name, accel="tcg", memory="2M", machine={"platform": "none"}, host=host)

    with Host() as host, made() as one, made() as two, made("lab") as three, made("lab") as four:
        folders = [place(vm, "tag").name for vm in (one, two, three, four)]
        assert folders == ["machine.tag", "machine-2.tag", "lab.tag", "lab.tag"]
        cardcage_forked(four)  # as the process of the copy does, where it has another name
        assert place(four, "tag").name == "lab-2.tag"
