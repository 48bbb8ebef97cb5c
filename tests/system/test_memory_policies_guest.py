"""Memory policies with Linux guests, real ksmd, real cgroups: memory flows, merges, and goes back to the host."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from cardcage import Machine
from cardcage.errors import HostError
from cardcage_boot import cpio
from cardcage_boot.cache import cache_root
from cardcage_boot.command import COMMAND_LINE
from cardcage_boot.fetch import Shelf
from cardcage_fleet.hostmemory import memory_group
from cardcage_ksm.lease import KSM, read_settings
from cardcage_memory_policies import PolicyOffer, policies_of

pytestmark = pytest.mark.xdist_group("host")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MIB = 1 << 20
SHELL = "exec < /dev/console > /dev/console; echo READY; while read line; do eval $line; echo DONE; done"


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The distribution's kernel and an initramfs whose init obeys the console."""
    shelf = Shelf(cache_root(), lambda what, percent: None, lambda line: None)
    try:
        kernel = shelf.kernel()
    except HostError as error:
        pytest.skip(str(error))
    base = shelf.initramfs(kernel).read_bytes()
    entries = [cpio.file("cardcage/settings", b"token=test\n"), cpio.file("cardcage/exec", f"{SHELL}\n".encode())]
    initrd = tmp_path_factory.mktemp("guest") / "initrd"
    initrd.write_bytes(base + bytes(-len(base) % 4) + cpio.pack(entries))
    return {"kernel": str(kernel.path), "initrd": str(initrd), "append": COMMAND_LINE}


Boot = Callable[..., Machine]


@pytest.fixture
def boot(guest: dict[str, str]) -> Iterator[Boot]:
    """Starts machines and waits until their shell is ready."""
    second = {"type": "isa-serial", "port": 0x2F8, "irq": 3, "char": "null"}
    first = {"type": "isa-serial", "port": 0x3F8, "irq": 4, "char": "console"}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # as the command line does
    with ExitStack() as stack:

        def start(**arguments: Any) -> Machine:
            devices = [first, second, *arguments.pop("devices", ())]
            vm = stack.enter_context(Machine(**guest, accel="tcg", devices=devices, **arguments))
            vm.start()
            vm.console.expect("READY", timeout=200)
            return vm

        yield start
    sys.setswitchinterval(interval)


def do(vm: Machine, command: str) -> None:
    vm.console.send(f"{command}\n")
    vm.console.expect("DONE", timeout=200)


def until(true: Callable[[], bool], seconds: float = 120) -> None:
    """Wait for the guest, ksmd or a policy."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.1)


FILL = "mkdir -p /t; mount -t tmpfs -o size=90% t /t; yes 0123456789abcdef | head -c {} > /t/x"


@pytest.mark.once
def test_free_page_reporting_gives_memory_back(boot: Boot) -> None:
    """What a guest used and freed is soon no longer resident on the host, and what it keeps reads as before."""
    from cardcage_memory_policies import MachineMemory

    vm = boot(memory="512M", devices=[{"type": "virtio-balloon"}])
    memory = MachineMemory(vm)
    do(vm, FILL.format(200 * MIB) + "; head -c 1048576 /t/x > /tmp/kept; sha1sum /tmp/kept")
    full = memory.resident
    do(vm, "rm /t/x")
    until(lambda: memory.resident < full - 150 * MIB)
    do(vm, "sha1sum /tmp/kept")
    sums = {line.split()[0] for line in vm.console.output.splitlines() if line.endswith("/tmp/kept")}
    assert len({one for one in sums if len(one) == 40}) == 1


@pytest.mark.once
def test_the_balloon_policy_steers_linux(boot: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two machines of 512 MiB on a budget of 600: memory goes to the one that needs it, and then to the other."""
    from cardcage.host import Host
    from cardcage_balloon import policy as module
    from cardcage_fleet.hostmemory import HostMemory

    host = Host()
    machines: list[Machine] = []

    def budget() -> HostMemory:
        used = sum(one.memory.resident for vm in machines for one in policies_of(vm)[:1])
        return HostMemory(1 << 40, 600 * MIB - used)

    offer = host.registry.get(PolicyOffer, "balloon")
    offer.factory = lambda options: module.BalloonPolicy(options, host=budget)
    options = {"type": "balloon", "reserve": 0, "floor": "48M", "interval": "250ms"}
    for name in "ab":
        keys = {"name": name}
        machines.append(boot(memory="512M", machine=keys, host=host, fragments=[{"policy": {"memory": [options]}}]))
    memories = [policies_of(vm)[0].memory for vm in machines]

    def kept(at: int) -> int:
        balloon = memories[at].balloon
        assert balloon is not None
        return memories[at].size - balloon.size

    until(lambda: kept(0) + kept(1) <= 620 * MIB)
    for busy, idle in ((0, 1), (1, 0)):
        do(machines[busy], FILL.format(300 * MIB) + "; sha1sum /t/x")
        until(lambda busy=busy: kept(busy) >= 380 * MIB)  # type: ignore[misc]  # binds this turn's
        until(lambda: kept(0) + kept(1) <= 620 * MIB)
        assert kept(idle) < 240 * MIB
        do(machines[busy], "rm /t/x; umount /t")
    sums = [line.split()[0] for vm in machines for line in vm.console.output.splitlines() if line.endswith(" /t/x")]
    assert len({one for one in sums if len(one) == 40}) == 1
    host.close()


@pytest.mark.once
@pytest.mark.timeout(600)  # ksmd is nice: it waits while others are busy
@pytest.mark.skipif(not os.access(KSM / "run", os.W_OK), reason="ksmd's settings can only be written by root")
def test_ksm_merges_linux_guests(boot: Boot) -> None:
    """Two equal guests share most of what they have resident, and still work; afterwards ksmd is as found."""
    before = read_settings(KSM)
    ksm = {"policy": {"memory": [{"type": "ksm", "scan_time": "2s", "max_cpu": 100}]}}
    machines = [boot(memory="256M", fragments=[ksm]) for _ in range(2)]
    resident = sum(policies_of(vm)[0].memory.resident for vm in machines)

    def merged() -> int:
        rows = (line.split() for line in Path("/proc/self/ksm_stat").read_text().splitlines())
        return sum(int(row[1]) for row in rows if row[0] in ("ksm_merging_pages", "ksm_zero_pages")) * 4096

    until(lambda: merged() > resident * 0.5, 400)
    for vm in machines:
        do(vm, "echo fine | sha1sum; dmesg | grep -c Linux")
        vm.close()
    assert {**read_settings(KSM), "pages_to_scan": ""} == {**before, "pages_to_scan": ""}


@pytest.mark.once
@pytest.mark.timeout(600)
@pytest.mark.skipif(os.geteuid() != 0 or memory_group() is None, reason="a memory cgroup needs root")
def test_guests_that_add_up_to_more_than_their_cgroup(tmp_path: Path) -> None:
    """Four guests of 256 MiB, each in its process, on 384 MiB: with the policy all finish with right results."""
    words = "--guests 4 --size 256M --limit 384M --load 80M --disk 160M --rounds 1 --beyond --modes balloon"
    options = '{"reserve": "64M", "floor": "48M", "spare": "24M"}'
    command = [sys.executable, "overcommit.py", *words.split(), "--set", options]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row = next(line.split() for line in done.stdout.splitlines() if line.startswith("balloon"))
    assert row[1:5] == ["4", "of", "4", "0"], done.stdout
