"""Memory as a real Linux guest uses it: what stats_of(machine) says of it, on each kind of memory."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cardcage import Machine
from cardcage.errors import HostError
from cardcage.outcome import PoweredOff
from cardcage_boot.cache import cache_root
from cardcage_boot.command import COMMAND_LINE
from cardcage_boot.fetch import Shelf
from cardcage_fleet import stats_of
from cardcage_fleet.accounting import MachineStats

MIB = 1 << 20
MARKS = itertools.count()


def linux(memory: dict[str, Any], **keys: Any) -> Machine:
    """A Debian kernel with a shell, 256 MiB and a balloon; skipped where the kernel cannot be had."""
    try:
        shelf = Shelf(cache_root(), lambda what, percent: None, lambda line: None)
        kernel = shelf.kernel()
        initrd = shelf.initramfs(kernel)
    except HostError as error:
        pytest.skip(str(error))
    return Machine(
        kernel=kernel.path,
        initrd=initrd,
        append=f"{COMMAND_LINE} quiet",
        memory="256M",
        accel="tcg",
        devices=[{"type": "virtio-balloon"}],
        fragments=[{"memory": memory}],
        **keys,
    )


def run(vm: Machine, command: str) -> None:
    """Run a command in the guest's shell, to its end."""
    mark = f"done-{next(MARKS)}"
    vm.console.send(f"{command}; echo {mark[:4]}''{mark[4:]}\r")
    vm.console.expect(mark, timeout=120)


def until(vm: Machine, holds: Callable[[MachineStats], bool], what: str, between: str = "") -> MachineStats:
    """Look again until it holds, for two minutes at most; the guest runs the command *between* before each look."""
    end = time.monotonic() + 120
    while not holds(stats := stats_of(vm)):
        assert time.monotonic() < end, f"{what}: {stats}"
        if between:
            run(vm, between)
        time.sleep(0.2)
    return stats


@pytest.mark.once
@pytest.mark.parametrize("type", ["anonymous", "memfd", "file"])
def test_figures_follow_the_guest(type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resident memory grows with what a guest fills, shrinks when it frees (free page reporting), and what its balloon
    gives shows as ballooned and leaves the host."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    memory = {"type": type, **({"path": str(tmp_path / "ram")} if type == "file" else {})}
    with linux(memory) as vm:
        vm.start()
        vm.console.expect("~ # ", timeout=120)
        first = stats_of(vm)
        assert 20 * MIB < first.resident < 200 * MIB
        assert first.code > MIB
        assert first.overhead > first.code
        run(vm, "dd if=/dev/urandom of=/tmp/fill bs=1M count=128 2>/dev/null")
        full = stats_of(vm)
        assert full.resident - first.resident > 64 * MIB
        # Only whole blocks of 2 MiB are reported free: what lies scattered is brought together, which takes more than
        # one pass where a CPU still keeps freed pages to itself, or something else of the guest holds one for a moment.
        run(vm, "rm /tmp/fill; echo 3 > /proc/sys/vm/drop_caches")
        compact = "echo 1 > /proc/sys/vm/compact_memory"
        until(vm, lambda now: now.resident < full.resident - 96 * MIB, "freed memory went back to the host", compact)
        assert "balloon" in vm.services
        with vm.lock:
            vm.services["balloon"].resize(96 * MIB)
        given = until(vm, lambda now: now.ballooned == 96 * MIB, "the guest gave what it was asked for")
        assert given.resident < 256 * MIB - 96 * MIB
        vm.console.send("poweroff -f\r")
        assert vm.wait(120) == PoweredOff()


@pytest.mark.once
def test_a_guest_whose_memory_is_cut_short_ends_with_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file behind a running Linux's RAM is truncated: translated code faults, the machine ends with an error that
    says why, and the process lives."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with linux({"type": "file", "path": str(tmp_path / "ram")}) as vm:
        vm.start()
        vm.console.expect("~ # ", timeout=120)
        vm.console.send("while :; do md5sum /bin/busybox; done\r")
        vm.console.expect("busybox", timeout=120)
        (tmp_path / "ram").open("r+").truncate(MIB)
        with pytest.raises(HostError, match="its file was cut short"):
            vm.wait(120)
