"""What QMP tells of disks: the images as they are, against qemu-img's word."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cardcage.host import Host
from cardcage.machine import Machine
from qmp_kit import Client

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-utils is not installed"),
]


def image(*words: object) -> None:
    subprocess.run(["qemu-img", "create", "-q", *(str(one) for one in words)], check=True, capture_output=True)


def chain(path: Path) -> list[dict[str, Any]]:
    """What qemu-img says of an image that is in use, and of those below it."""
    words = ["qemu-img", "info", "--force-share", "--backing-chain", "--output=json", str(path)]
    found: list[dict[str, Any]] = json.loads(subprocess.run(words, check=True, capture_output=True).stdout)
    return found


def unnested(one: dict[str, Any]) -> list[dict[str, Any]]:
    """An image, and those in it."""
    below = one.pop("backing-image", None)
    return [one, *([] if below is None else unnested(below))]


def test_images_are_what_they_stand_on(tmp_path: Path) -> None:
    """``query-block`` and ``query-named-block-nodes`` tell of each image what ``qemu-img info --backing-chain`` does,
    of a chain in one another, and how deep it is; a disk for one run stands on its image."""
    image("-f", "raw", tmp_path / "base.raw", "4M")
    image("-f", "qcow2", "-o", "compat=0.10", "-b", "base.raw", "-F", "raw", tmp_path / "middle.qcow2")
    image("-f", "qcow2", "-b", tmp_path / "middle.qcow2", "-F", "qcow2", tmp_path / "top.qcow2")
    image("-f", "qcow2", "-o", "compression_type=zstd,cluster_size=4k,refcount_bits=8", tmp_path / "alone.qcow2", "1M")
    drives = {
        "chain": {"file": f"{tmp_path}/top.qcow2", "format": "qcow2"},
        "alone": f"{tmp_path}/alone.qcow2",
        "raw": {"file": f"{tmp_path}/one.raw", "format": "raw"},
        "run": {"type": "temporary", "file": f"{tmp_path}/other.qcow2"},
        "slow": {"type": "throttle", "drive": f"{tmp_path}/third.qcow2", "iops": 1000},
    }
    image("-f", "raw", tmp_path / "one.raw", "1M")
    for name in ("other", "third"):
        image("-f", "qcow2", "-b", tmp_path / "middle.qcow2", "-F", "qcow2", tmp_path / f"{name}.qcow2")
    devices = [{"type": "virtio-blk", "id": id, "drive": drive} for id, drive in drives.items()]
    devices.append({"type": "qmp", "socket": f"unix:{tmp_path}/qmp", "names": {"chain": "node"}})
    with (
        Host() as host,
        Machine(memory="8M", accel="tcg", devices=devices, host=host),
        Client(tmp_path / "qmp") as peer,
    ):
        found = {one["device"]: one["inserted"] for one in peer.ask("query-block")["return"]}
        nodes = {one["node-name"]: one for one in peer.ask("query-named-block-nodes", flat=True)["return"]}
        said = {one["node-name"]: one for one in peer.ask("query-named-block-nodes")["return"]}
        for name, file in (
            ("chain", "top.qcow2"),
            ("alone", "alone.qcow2"),
            ("raw", "one.raw"),
            ("slow", "third.qcow2"),
        ):
            assert unnested(found[name]["image"]) == chain(tmp_path / file)
            assert (found[name]["file"], found[name]["drv"]) == (f"{tmp_path}/{file}", found[name]["image"]["format"])
        whole = chain(tmp_path / "other.qcow2")
        overlay, *below = unnested(found["run"]["image"])
    assert below == whole
    assert (overlay["full-backing-filename"], overlay["format"]) == (f"{tmp_path}/other.qcow2", "qcow2")
    depths = {name: (one["backing_file_depth"], one.get("backing_file")) for name, one in found.items()}
    middle = f"{tmp_path}/middle.qcow2"
    assert depths == {
        **{"chain": (2, middle), "alone": (0, None), "raw": (0, None)},
        **{"run": (3, f"{tmp_path}/other.qcow2"), "slow": (2, middle)},
    }
    assert "backing-image" in said["node"]["image"]
    assert [one["image"] for name, one in nodes.items() if name == "node" or name.startswith("#block-chain-")] == chain(
        tmp_path / "top.qcow2"
    )
    for name, facts in (("#block-chain-1", (True, "qcow2", 1, middle)), ("#block-chain-2", (True, "raw", 0, None))):
        one = nodes[name]
        file = f"{tmp_path}/base.raw" if facts[3] is None else facts[3]
        assert (one["ro"], one["drv"], one["backing_file_depth"], one["file"]) == (*facts[:3], file)
        assert one.get("backing_file") == (f"{tmp_path}/base.raw" if facts[2] else None)
