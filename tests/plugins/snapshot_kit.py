"""A tiny guest for tests of snapshots: it counts at 0x5000, and says so at port 0xE9."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cardcage.host import Host
from cardcage.machine import Machine
from cardcage_snapshot import sealing

COUNTER = 0x5000
CODE = bytes.fromhex(
    "31c08ed8"  # xor ax, ax; mov ds, ax
    "66ff060050"  # again: inc dword [0x5000]
    "a00050e6e9"  # mov al, [0x5000]; out 0xe9, al
    "ebf4"  # jmp again
)


def image(folder: Path) -> Path:
    """The guest's program in a file."""
    path = folder / "counter.bin"
    path.write_bytes(CODE)
    return path


def counting(
    folder: Path, host: Host, *, memory: str = "1M", accel: str = "tcg", platform: str = "none", **keys: Any
) -> Machine:
    """A machine with the guest, not started."""
    boot = {"protocol": "raw", "image": str(image(folder)), "address": 0x7C00, "mode": 16}
    devices = [{"type": "debugcon", "char": "null"}, *keys.pop("devices", ())]
    machine = {"platform": platform, **keys.pop("machine", {})}
    return Machine(
        memory=memory, accel=accel, machine=machine, boot=boot, devices=devices, host=host, **{"name": "count", **keys}
    )


def count(vm: Machine) -> int:
    """The number that it has counted to."""
    return int.from_bytes(vm.memory.read(COUNTER, 4), "little")


def counts_on(vm: Machine, beyond: int) -> None:
    """Wait until it has counted past *beyond*; the timeout of the test ends a wait that is in vain."""
    while count(vm) <= beyond and vm.state == "running":
        time.sleep(0.001)
    assert count(vm) > beyond


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest as somebody would who knows how sums are made."""
    outer = json.loads((path / "manifest.json").read_text())
    change(outer["manifest"])
    outer["sum"] = hashlib.sha256(sealing.canonical(outer["manifest"])).hexdigest()
    (path / "manifest.json").write_text(json.dumps(outer))
