"""Overlays that come and go while a machine uses its disk, in QMP's words."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage_block.committing import CommitOptions, Committing, open_commit
from cardcage_block.drive import Drive, open_image
from cardcage_block.make import Qcow2Shape, create_qcow2, create_raw
from cardcage_qemu import translate
from hypothesis import given, settings
from hypothesis import strategies as st
from qmp_kit import Client

pytestmark = pytest.mark.once
SIZE = 1 << 20


class Slot:
    """What a back end needs of its device."""

    def __init__(self) -> None:
        self.log = self.host = self

    def warning(self, *_: Any) -> None:
        """Nobody reads it."""

    def ask(self, *_: Any, **facts: Any) -> None:
        """All may be opened."""


@contextmanager
def machine(tmp_path: Path, *words: str) -> Iterator[tuple[Machine, Client]]:
    """A machine by QEMU's words, and its monitor."""
    from cardcage.config import Draft
    from cardcage_qemu import coming

    (tmp_path / "rom").write_bytes(b"\xf4" * 0xFFF0 + bytes.fromhex("fa f4 eb fc").ljust(16, b"\0"))
    line = translate([*"-accel tcg -m 8M -nodefaults -bios".split(), f"{tmp_path}/rom", *words])
    with Host() as host:
        host.share(coming.MEANT, dict)["line"] = line
        tables = line.config()
        tables["device"].append({"type": "qmp", "socket": f"unix:{tmp_path}/qmp", "names": line.names})
        with Machine.from_config(Draft.of(tables).config(), host=host) as vm, Client(tmp_path / "qmp") as peer:
            yield vm.start(), peer


def disk(vm: Machine, id: str = "d") -> Any:
    """What the guest's requests are served by."""
    return vm.devices[id].device.device.backend


def put(vm: Machine, at: int, text: bytes, id: str = "d") -> None:
    disk(vm, id).writev(at, [memoryview(text.ljust(512, b"."))])


def got(vm: Machine, at: int, id: str = "d") -> bytes:
    data = bytearray(512)
    disk(vm, id).readv(at, [memoryview(data)])
    return bytes(data).rstrip(b".\0")


def seen(path: Path, at: int, format: str = "raw") -> bytes:
    """What an image shows once nobody has it."""
    image = open_image(Drive(str(path), format), warn=print)  # type: ignore[arg-type]  # one of the formats
    data = bytearray(512)
    try:
        image.readv(at, [memoryview(data)])
    finally:
        image.close()
    return bytes(data).rstrip(b".\0")


def nodes(tmp_path: Path) -> list[str]:
    """A disk of a raw image, by nodes as libvirt names them."""
    create_raw(str(tmp_path / "base.raw"), SIZE)
    file = {"driver": "file", "node-name": "f", "filename": f"{tmp_path}/base.raw"}
    raw = {"driver": "raw", "node-name": "base", "file": "f"}
    return ["-blockdev", json.dumps(file), "-blockdev", json.dumps(raw), "-device", "virtio-blk-pci,drive=base,id=d"]


def blocks(peer: Client) -> dict[str, Any]:
    found: dict[str, Any] = peer.ask("query-block")["return"][0]["inserted"]
    return found


def test_an_overlay_is_made_used_and_merged(tmp_path: Path) -> None:
    """As libvirt does it: ``blockdev-create`` formats an overlay, ``blockdev-snapshot`` puts the disk on it while the
    machine runs, which writes what was there no more; ``block-commit`` merges it, what is written meanwhile too, and
    once ``job-complete`` was said, the disk stands on its old image again and the overlay may go."""
    with machine(tmp_path, *nodes(tmp_path)) as (vm, peer):
        put(vm, 0, b"before")
        (tmp_path / "over.qcow2").touch()
        file = {"driver": "file", "node_name": "g", "filename": f"{tmp_path}/over.qcow2"}
        assert peer.ask("blockdev-add", **file) == {"return": {}}
        made = {"driver": "qcow2", "file": "g", "size": SIZE, "backing-file": f"{tmp_path}/base.raw"}
        made["backing-fmt"] = "raw"
        assert peer.ask("blockdev-create", job_id="make", options=made) == {"return": {}}
        while peer.event("JOB_STATUS_CHANGE")["data"] != {"id": "make", "status": "concluded"}:
            pass
        assert "error" not in peer.ask("query-jobs")["return"][0]
        assert peer.ask("job-dismiss", id="make") == {"return": {}}
        above = {"driver": "qcow2", "node_name": "over", "file": "g", "backing": None}
        assert peer.ask("blockdev-add", **above) == {"return": {}}
        action = {"type": "blockdev-snapshot", "data": {"node": "base", "overlay": "over"}}
        assert peer.ask("transaction", actions=[action]) == {"return": {}}
        assert (blocks(peer)["node-name"], blocks(peer)["backing_file"]) == ("over", f"{tmp_path}/base.raw")
        assert got(vm, 0) == b"before"
        put(vm, 0, b"over")
        put(vm, 65536, b"more")
        assert (tmp_path / "base.raw").read_bytes()[:6] == b"before"
        assert "in use" in peer.ask("blockdev-del", node_name="over")["error"]["desc"]
        assert "busy" in peer.ask("blockdev-del", node_name="base")["error"]["desc"]
        assert peer.ask("block-commit", job_id="c", device="over", auto_dismiss=False) == {"return": {}}
        assert peer.event("BLOCK_JOB_READY")["data"]["device"] == "c"
        (job,) = peer.ask("query-block-jobs")["return"]
        assert (job["type"], job["ready"], job["len"]) == ("commit", True, SIZE)
        put(vm, 4096, b"meanwhile")
        assert peer.ask("job-complete", id="c") == {"return": {}}
        done = peer.event("BLOCK_JOB_COMPLETED")["data"]
        assert (done["offset"], "error" in done) == (SIZE, False)
        while peer.event("JOB_STATUS_CHANGE")["data"] != {"id": "c", "status": "concluded"}:
            pass
        assert peer.ask("job-dismiss", id="c") == {"return": {}}
        assert (blocks(peer)["node-name"], blocks(peer)["backing_file_depth"]) == ("base", 0)
        assert [got(vm, at) for at in (0, 4096, 65536)] == [b"over", b"meanwhile", b"more"]
        put(vm, 8192, b"after")
        for node in ("over", "g"):
            assert peer.ask("blockdev-del", node_name=node) == {"return": {}}
        (disk,) = [one for one in vm.config.devices if "drive" in one.options]
        assert disk.options["drive"]["file"] == f"{tmp_path}/base.raw"
    found = [seen(tmp_path / "base.raw", at) for at in (0, 4096, 8192, 65536)]
    assert found == [b"over", b"meanwhile", b"after", b"more"]


def test_by_older_names_and_lines(tmp_path: Path) -> None:
    """``blockdev-snapshot-sync`` and ``snapshot_blkdev`` make overlays, of overlays too; a merge that is cancelled
    leaves the disk on the highest, and one into a lower image goes past those between; qemu-img finds all sound."""
    create_qcow2(str(tmp_path / "base.qcow2"), SIZE, Qcow2Shape(cluster_size=4096))
    with machine(tmp_path, "-drive", f"file={tmp_path}/base.qcow2,if=virtio,id=d") as (vm, peer):
        put(vm, 0, b"base")
        one = {"device": "d", "snapshot_file": f"{tmp_path}/one.qcow2", "snapshot_node_name": "one"}
        assert peer.ask("blockdev-snapshot-sync", **one) == {"return": {}}
        put(vm, 131072, b"one")
        line = f"snapshot_blkdev d {tmp_path}/two.qcow2"
        assert peer.ask("human-monitor-command", command_line=line) == {"return": ""}
        put(vm, 8192, b"two")
        disk(vm).discard(131072, 65536)
        assert blocks(peer)["backing_file_depth"] == 2
        assert peer.ask("block-commit", device="d") == {"return": {}}
        assert peer.event("BLOCK_JOB_READY")["data"]["device"] == "d"
        assert peer.ask("block-job-cancel", device="d") == {"return": {}}
        assert peer.event("BLOCK_JOB_CANCELLED")["data"]["device"] == "d"
        while peer.event("JOB_STATUS_CHANGE")["data"] != {"id": "d", "status": "null"}:
            pass
        assert blocks(peer)["backing_file_depth"] == 2
        put(vm, 12288, b"kept")
        assert peer.ask("block-commit", device="d", base=f"{tmp_path}/base.qcow2") == {"return": {}}
        peer.event("BLOCK_JOB_READY")
        assert peer.ask("block-job-complete", device="d") == {"return": {}}
        assert "error" not in peer.event("BLOCK_JOB_COMPLETED")["data"]
        while peer.event("JOB_STATUS_CHANGE")["data"] != {"id": "d", "status": "null"}:
            pass
        assert blocks(peer)["backing_file_depth"] == 0
        assert [got(vm, at) for at in (0, 131072, 8192, 12288)] == [b"base", b"", b"two", b"kept"]
    assert seen(tmp_path / "base.qcow2", 8192, "qcow2") == b"two"
    if shutil.which("qemu-img"):
        for name in ("base", "one", "two"):
            subprocess.run(["qemu-img", "check", "-q", f"{tmp_path}/{name}.qcow2"], check=True)


def test_what_cannot_be_is_told_and_changes_nothing(tmp_path: Path) -> None:
    """An overlay whose header names another image, one of another size or kind, a disk that is none, a transaction one
    of whose parts fails, a merge of what stands on nothing: one line, and the disk is as before."""
    create_raw(str(tmp_path / "other.raw"), SIZE)
    create_qcow2(str(tmp_path / "alone.qcow2"), SIZE)
    create_qcow2(
        str(tmp_path / "strange.qcow2"), SIZE, Qcow2Shape(backing_file=f"{tmp_path}/other.raw", backing_format="raw")
    )
    create_qcow2(
        str(tmp_path / "short.qcow2"), SIZE // 2, Qcow2Shape(backing_file=f"{tmp_path}/base.raw", backing_format="raw")
    )
    with machine(tmp_path, *nodes(tmp_path)) as (vm, peer):
        put(vm, 0, b"there")
        for name in ("alone", "strange", "short"):
            asked = {"snapshot_file": f"{tmp_path}/{name}.qcow2", "mode": "existing", "node_name": "base"}
            assert peer.ask("blockdev-snapshot-sync", **asked)["error"]["desc"].count("\n") == 0
        good = {"type": "blockdev-snapshot-sync", "data": {"node-name": "base", "snapshot-file": f"{tmp_path}/good"}}
        bad = {"type": "blockdev-snapshot", "data": {"node": "base", "overlay": "nonesuch"}}
        assert "nonesuch" in peer.ask("transaction", actions=[good, bad])["error"]["desc"]
        assert not (tmp_path / "good").exists()
        for name, words in (
            ("block-commit", {"device": "base"}),
            ("block-commit", {"device": "nonesuch"}),
            ("blockdev-snapshot-sync", {"device": "nonesuch", "snapshot_file": f"{tmp_path}/x"}),
            ("blockdev-snapshot-sync", {"device": "d", "snapshot_file": f"{tmp_path}/alone.qcow2"}),
            ("job-complete", {"id": "nonesuch"}),
            ("job-cancel", {"id": "nonesuch"}),
        ):
            assert "error" in peer.ask(name, **words), name
        assert (blocks(peer)["node-name"], got(vm, 0)) == ("base", b"there")
        put(vm, 0, b"still")
    assert seen(tmp_path / "base.raw", 0) == b"still"


def test_a_transaction_is_for_all_disks(tmp_path: Path) -> None:
    """Two disks have their overlays at once."""
    words = []
    for name in ("a", "b"):
        create_raw(str(tmp_path / f"{name}.raw"), SIZE)
        words += ["-drive", f"file={tmp_path}/{name}.raw,format=raw,if=virtio,id={name}"]
    with machine(tmp_path, *words) as (vm, peer):
        actions = [
            {
                "type": "blockdev-snapshot-sync",
                "data": {"device": name, "snapshot-file": f"{tmp_path}/{name}.over"},
            }
            for name in ("a", "b")
        ]
        assert peer.ask("transaction", actions=actions) == {"return": {}}
        depths = [one["inserted"]["backing_file_depth"] for one in peer.ask("query-block")["return"]]
        assert depths == [1, 1]
        put(vm, 0, b"a", "a")
    assert [seen(tmp_path / "a.raw", 0), seen(tmp_path / "a.over", 0, "qcow2")] == [b"", b"a"]


ACTS = st.lists(
    st.tuples(
        st.sampled_from(["write", "zero", "discard", "copy", "catch up"]), st.integers(0, 127), st.integers(1, 24)
    ),
    max_size=24,
)


@settings(deadline=None)
@given(before=ACTS, meanwhile=ACTS, raw=st.booleans(), chain=st.integers(1, 3), short=st.booleans())
def test_the_base_shows_what_the_overlay_did(
    tmp_path_factory: pytest.TempPathFactory, before: Any, meanwhile: Any, raw: bool, chain: int, short: bool
) -> None:
    """Whatever is written, zeroed and discarded before and between the steps of a merge: at its end the base shows what
    the overlay did, and so does the overlay; over chains, and over a base that is shorter."""
    folder = tmp_path_factory.mktemp("merge")
    size, base = 128 * 4096, folder / "base"
    length = size // 2 if short else size
    if raw:
        create_raw(str(base), length)
    else:
        create_qcow2(str(base), length, Qcow2Shape(cluster_size=16384))
    image = open_image(Drive(str(base), "raw" if raw else "qcow2"), warn=print)
    image.writev(0, [memoryview(b"\xaa" * length)])
    image.close()
    below, form = base, "raw" if raw else "qcow2"
    for at in range(chain):
        over = folder / f"over{at}"
        create_qcow2(str(over), size, Qcow2Shape(cluster_size=4096, backing_file=str(below), backing_format=form))
        image = open_image(Drive(str(over), "qcow2"), warn=print)
        image.writev(at * 8192, [memoryview(bytes([at + 1]) * 4096)])
        image.close()
        below, form = over, "qcow2"
    options = CommitOptions(str(below), "qcow2", into=str(base))  # type: ignore[arg-type]  # paths
    committing = open_commit(Slot(), options)  # type: ignore[arg-type]  # enough of one
    model = bytearray(whole(committing))
    value = 100
    for word, at, count in (*before, ("start", 0, 0), *meanwhile):
        offset, length = at * 4096, min(count, 128 - at) * 4096
        value += 1
        if word == "write":
            committing.writev(offset, [memoryview(bytes([value]) * length)])
            model[offset : offset + length] = bytes([value]) * length
        elif word == "zero":
            committing.write_zeroes(offset, length, unmap=True)
            model[offset : offset + length] = bytes(length)
        elif word == "discard":
            committing.discard(offset, length)
            model[offset : offset + length] = bytes(length)
        elif word == "copy":
            left = iter(range(count))
            committing.copy(lambda left=left: next(left, None) is not None)  # type: ignore[misc]  # a default
        elif word == "catch up":
            committing.catch_up()
        assert whole(committing) == model
    committing.let_go()
    committing.close()
    for path, kind in ((base, "raw" if raw else "qcow2"), (below, "qcow2")):
        image = open_image(Drive(str(path), kind), warn=print)  # type: ignore[arg-type]  # a format
        assert whole(image) == model
        image.close()
    if not raw and shutil.which("qemu-img") and os.environ.get("CARDCAGE_LONG_TESTS"):
        subprocess.run(["qemu-img", "check", "-q", base], check=True)
    shutil.rmtree(folder)


def whole(image: Committing | Any) -> bytes:
    data = bytearray(image.info.size)
    image.readv(0, [memoryview(data)])
    return bytes(data)
