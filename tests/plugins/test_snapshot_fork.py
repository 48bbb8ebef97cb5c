"""Snapshots of a machine that was forked: they have the copy's RAM and disk, not its parent's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cardcage.host import Host
from cardcage_fleet import find
from cardcage_fork import fork
from cardcage_snapshot import pages
from cardcage_snapshot.running import create
from cardcage_snapshot.verbs import Machine
from cardcage_snapshot.watching import keep_open
from snapshot_kit import count, counting, counts_on


@pytest.mark.parametrize("prepared", [False, True])
def test_a_copy_is_saved_and_not_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accel: str, prepared: bool
) -> None:
    """The snapshot of a copy has its RAM, though its parent's is gone, also where the kernel's tables were opened
    before the fork; and the disk as the copy has it, though its parent wrote the image since."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    disk = tmp_path / "disk.raw"
    disk.write_bytes(b"copy" + bytes((1 << 20) - 4))
    drive: dict[str, Any] = {"type": "virtio-blk", "drive": {"file": str(disk), "format": "raw"}}
    monkeypatch.setattr(pages, "_kept", [])
    with Host() as host:
        with counting(tmp_path, host, memory="64M", platform="pc", accel=accel, devices=[drive]) as vm:
            if prepared:  # as for a machine of the command line
                keep_open(vm)
            vm.start()
            counts_on(vm, 100)
            vm.pause()
            at = count(vm)
            (copy,) = fork(vm)
        with copy:
            disk.write_bytes(b"else" + bytes((1 << 20) - 4))
            made = create(find(copy.name), tmp_path / "saved", compress=False, replace=False)
            (found,) = made.path.glob("disk-*")
            assert found.read_bytes() == b"copy" + bytes((1 << 20) - 4)
        with Machine.restore(made.path, host=host, start=False) as again:
            assert count(again) == at
            again.start(boot=False)
            counts_on(again, at)


def test_a_copy_of_a_restored_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accel: str) -> None:
    """A restored machine is forked though the overlay of its disk lies in a folder that is gone, and leaves nothing."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    drive: dict[str, Any] = {"type": "virtio-blk", "drive": {"file": str(disk), "format": "raw"}}
    with Host() as host:
        with counting(tmp_path, host, memory="64M", platform="pc", accel=accel, devices=[drive]) as vm:
            vm.start()
            counts_on(vm, 100)
            made: Any = vm
            made.snapshot(tmp_path / "saved")
        before = sorted(path.name for path in tmp_path.iterdir())
        with Machine.restore(tmp_path / "saved", host=host) as again:
            (copy,) = fork(again)
            with copy:
                assert copy.state == "running"
                assert sorted(path.name for path in tmp_path.iterdir()) == before
                (second,) = copy.fork()
                second.close()
            counts_on(again, count(again))
