"""gdb on a real guest: a kernel under load on two processors, its functions, its memory, its clock."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cardcage.machine import State
from cardcage_agent import Machine
from gdb_kit import gdb, needs_gdb

NAMES = "linux_banner jiffies __x64_sys_newuname __x64_sys_sched_yield"


@pytest.fixture
def vm(kernel: Path) -> Iterator[Machine]:
    """A guest of two processors, up and running."""
    with Machine.debian(memory="256M", accel="tcg", cpus=2, name="gdb") as machine:
        machine.gdb_at = machine.gdb()
        machine.start()
        machine.agent.wait(timeout=120)
        yield machine


@needs_gdb
def test_a_kernel_under_load(vm: Machine) -> None:
    """Breakpoints in kernel functions that both processors call, steps through them, watchpoints on the kernel's clock,
    and its memory, read by its own page tables; the guest goes on as if nothing had been."""
    wanted = "|".join(f" {one}$" for one in NAMES.split())
    lines = vm.run(f"grep -E '{wanted}' /proc/kallsyms", text=True, check=True).stdout.splitlines()
    at = {line.split()[2]: int(line.split()[0], 16) for line in lines}
    load = "for i in 1 2; do (while [ ! -e /tmp/end ]; do uname > /dev/null; done) & done; wait; dmesg | grep -ci stall"
    found: list[str] = []
    busy = threading.Thread(target=lambda: found.append(vm.run(load, text=True).stdout))
    busy.start()
    try:
        uname, banner, clock = (at[one] for one in ("__x64_sys_newuname", "linux_banner", "jiffies"))
        said = gdb(
            vm.gdb_at,
            *(f"x/s {banner:#x}", f"x/8xb {uname:#x}", f"break *{uname:#x}", *["continue"] * 6, f"x/8xb {uname:#x}"),
            *("info registers rip", "info threads", "delete", *["stepi"] * 5, "x/i $pc"),
            *(f"watch *(long*){clock:#x}", *["continue"] * 3, "delete", f"hbreak *{uname:#x}", "continue", "detach"),
            timeout=120,
        )
    finally:
        vm.run("touch /tmp/end")
        busy.join()
    assert "Linux version" in said, said
    assert len(re.findall(r"hit Breakpoint 1,|Breakpoint 1,", said)) == 6, said
    assert f"rip            {uname:#x}" in said
    code = re.findall(rf"^{uname:#x}:\t(.*)$", said, re.MULTILINE)
    assert len(code) == 2
    assert code[0] == code[1]  # no breakpoint shows in memory
    clocks = [int(one) for one in re.findall(r"^New value = (\d+)$", said, re.MULTILINE)]
    assert len(clocks) == 3
    assert clocks == sorted(set(clocks))
    assert "Breakpoint 3," in said
    assert vm.state is State.RUNNING
    assert found == ["0\n"]
    assert vm.run("uname", text=True).stdout == "Linux\n"
