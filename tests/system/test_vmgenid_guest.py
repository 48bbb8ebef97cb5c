"""Linux is told that it was copied, or put back, by the generation of its machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cardcage_agent import Machine

TOLD = "until [ $(dmesg | grep -c 'reseeded due to virtual machine fork') = {} ]; do sleep 0.05; done"
"""Waits in the guest: its driver hears of it on a thread of its own."""


@pytest.mark.once
def test_linux_reseeds(generic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's kernel mixes a new generation into its random numbers in each copy, after a revert and a restore; the
    machine that was copied, paused or saved keeps its own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (kernel,) = (generic / "cardcage" / "debian-12" / "kernel" / "boot").glob("vmlinuz-*")
    with Machine.debian(kernel=kernel, memory="512M", devices=[{"type": "vmgenid"}]) as made:
        vm: Any = made
        vm.start()
        vm.run(TOLD.format(0), check=True, timeout=60)
        for copy in vm.fork(2):
            copy.run(TOLD.format(1), check=True, timeout=60)
            copy.close()
        vm.snapshot("one")
        vm.run(TOLD.format(0), check=True, timeout=60)
        vm.checkpoint()
        vm.revert()
        vm.run(TOLD.format(1), check=True, timeout=60)
    again: Any = Machine
    with again.restore("one") as vm:
        vm.run(TOLD.format(1), check=True, timeout=60)
