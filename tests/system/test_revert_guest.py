"""A Debian guest goes back to a checkpoint: all of it, again and again, at the cost of the pages that it wrote."""

from __future__ import annotations

import ctypes
import os
from subprocess import PIPE
from typing import TYPE_CHECKING, Any

import pytest
from cardcage.errors import StateError
from cardcage_agent import AgentError, Machine
from cardcage_agent.frames import Kind, frame
from cardcage_fork import checkpoint, fork, revert
from cardcage_fork.plan import blocks_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PAGE = 4096
WORK = "dd if=/dev/urandom of=/tmp/noise bs=64k count=40; ls -lR /proc/1 >/dev/null 2>&1; echo -n after >/tmp/word"


@pytest.fixture(scope="module")
def vm(kernel: Path) -> Iterator[Machine]:
    """A guest with an agent and a network card, on two processors."""
    devices = [{"type": "virtio-net", "net": "null"}, {"type": "virtio-rng"}]
    with Machine.debian(name="reverted", memory="128M", cpus=2, accel="tcg", devices=devices) as made:
        made.start()
        made.files.write("/tmp/word", "before")
        yield made


def pages(vm: Machine) -> dict[int, bytes]:
    """The bytes of each page of RAM, by host address."""
    found = {}
    for block in blocks_of(vm):
        data = ctypes.string_at(block.host_address, block.size)
        found |= {block.host_address + at: data[at : at + PAGE] for at in range(0, block.size, PAGE)}
    return found


def test_a_guest_goes_back_and_on_again(vm: Machine) -> None:
    """Files, time and processes are those of the checkpoint, each time."""
    with pytest.raises(StateError, match="no checkpoint"):
        revert(vm)
    checkpoint(vm)
    began = float(vm.run("cut -d' ' -f1 /proc/uptime", text=True).stdout)
    for _ in range(4):
        assert vm.run("cat /tmp/word", text=True).stdout == "before"
        vm.run(WORK)
        assert vm.run("cat /tmp/word", text=True).stdout == "after"
        assert revert(vm) > 0
    assert float(vm.run("cut -d' ' -f1 /proc/uptime", text=True).stdout) - began < 2
    for cpu in "01":  # the scheduler's clock is kvmclock
        said = vm.run(f"taskset -c {cpu} sh -c 'echo here >/dev/kmsg'; dmesg | tail -n 1", text=True).stdout
        assert abs(float(said.strip("[").partition("]")[0]) - began) < 5
    assert "Oops" not in vm.run("dmesg", text=True).stdout


def test_no_page_is_missed(vm: Machine) -> None:
    """Each page that differs from what it was is in the log, whoever wrote it; a revert leaves none that does, and
    copies no page that nobody wrote."""
    machine: Any = vm
    for _ in range(3):
        checkpoint(vm)
        vm.pause()
        before = pages(vm)
        logged = set(machine.vm.dirty.pages())
        vm.resume()
        vm.run(WORK)
        vm.pause()
        changed = {at for at, data in pages(vm).items() if data != before[at]}
        logged |= set(machine.vm.dirty.pages())
        assert changed - logged == set()
        assert len(changed) > 500
        count = revert(vm)
        assert count == len(logged) < 4 * len(changed)
        vm.resume()
        checkpoint(vm)


def test_a_revert_leaves_ram_as_it_was(vm: Machine) -> None:
    """With the machine paused around it, all of RAM is what it was at the checkpoint, but for the time that kvmclock
    shows."""
    machine: Any = vm
    vm.pause()
    checkpoint(vm)
    before = pages(vm)
    vm.resume()
    vm.run(WORK)
    vm.pause()
    revert(vm)
    after = pages(vm)
    different = {at for at in before if after[at] != before[at]}
    assert different <= set(machine.vm.dirty.pages())
    assert len(different) <= len(vm.vcpus)
    vm.resume()


def test_a_machine_that_works_goes_back_without_a_pause(vm: Machine) -> None:
    """A computation is put back twenty times in the middle of its work, and its result is right: no floating-point
    register is lost, and nobody sees the machine pause."""
    work = 'BEGIN { for (i = 1; i < 60000; i++) s += 1 / (i * i); printf "%.6f", s }'
    vm.files.write("/tmp/work", work)
    vm.run("rm -f /tmp/sum; (awk -f /tmp/work >/tmp/part; mv /tmp/part /tmp/sum) >/dev/null 2>&1 </dev/null &")
    checkpoint(vm)
    states: list[Any] = []
    vm.observers.add("state", states.append)
    for _ in range(20):
        revert(vm)
        vm.agent.ping()
    vm.observers.remove("state", states.append)
    assert len(states) < 20  # it is paused where a processor is in the middle of an access
    script = "while [ ! -e /tmp/sum ]; do usleep 10000; done; cat /tmp/sum"
    assert vm.run(["sh", "-c", script], text=True, timeout=60).stdout == "1.644917"
    assert "Oops" not in vm.run("dmesg", text=True).stdout


def test_an_agent_at_rest_goes_on_where_it_was(vm: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a way back to where nothing was on its way to the agent, it is not asked to greet, and answers as before,
    however much was said meanwhile; from any other point it is asked, and answers too."""
    link, asked = vm.services["agent"], []
    queue = link._queue

    def queued(data: bytes) -> None:
        asked.append(data == frame(0, Kind.GREET))
        queue(data)

    monkeypatch.setattr(link, "_queue", queued)
    vm.agent.ping()
    asked.clear()
    checkpoint(vm)
    for turn in range(4):
        for _ in range(50 * turn):  # the agent says now and then how much it took
            vm.files.write("/tmp/more", os.urandom(3000))
        vm.run("true", input=b"for nobody")
        revert(vm)
        assert not vm.files.exists("/tmp/more")
    assert not any(asked)
    process = vm.popen("cat", stdin=PIPE)
    checkpoint(vm)
    revert(vm)
    vm.agent.ping()
    assert any(asked)
    with pytest.raises(AgentError, match="put back"):
        process.wait()


def test_a_copy_has_its_own_checkpoint(vm: Machine) -> None:
    """A copy is put back by itself; its parent goes on."""
    with fork(vm)[0] as copy:
        copy.checkpoint()
        copy.run("echo -n copy >/tmp/word")
        vm.run("echo -n parent >/tmp/word")
        assert copy.revert() > 0
        assert copy.run("cat /tmp/word", text=True).stdout == "before"
        assert vm.run("cat /tmp/word", text=True).stdout == "parent"
