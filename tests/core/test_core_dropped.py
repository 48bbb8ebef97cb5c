"""An open machine that nobody holds any more: it warns, and is closed."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref

import pytest
from cardcage.config import Draft
from cardcage.errors import ConfigError
from cardcage.host import Host
from cardcage.machine import Machine
from scripted import Scripted

ALL_CARDS = """
import gc, threading, weakref
from cardcage.machine import Machine

def drop():
    devices = [{"type": "virtio-balloon"}, {"type": "virtio-net", "net": "null"}]
    return weakref.ref(Machine(accel="tcg", memory="4M", devices=devices).start(boot=False))

found = drop()
gc.collect()
for one in threading.enumerate():
    if one.name.endswith("-dropped"):
        one.join()
print(found(), [one.name for one in threading.enumerate()])
"""


def make(host: Host | None = None) -> Machine:
    return Machine(
        host=host or Host([Scripted()], installed=False),
        machine={"platform": "none", "accel": ["scripted"]},
        memory="2M",
    )


def collect() -> None:
    """Let the collector find dropped machines, and wait until they are closed."""
    gc.collect()
    for one in threading.enumerate():
        if one.name.endswith("-dropped"):
            one.join()


def drop(host: Host) -> None:
    """Make a machine of *host* that nobody holds."""
    make(host)
    collect()


def test_a_machine_that_is_dropped_warns_and_is_closed() -> None:
    """The collector finds an open machine, which warns as an open file does; its memory and threads go."""
    vm = make()
    found, vms, memory, loop = weakref.ref(vm), vm.vm, vm.memory, vm.loop
    del vm
    with pytest.warns(ResourceWarning, match=r"unclosed <Machine 'machine' built>: use it in a with block"):
        collect()
    assert found() is None
    assert vms.closed  # type: ignore[attr-defined]
    assert memory.ranges == []
    assert not loop.thread.is_alive()


def test_a_host_does_not_keep_a_machine() -> None:
    """A machine of a host that lives is dropped as any other, and the host has no place for it then."""
    with Host([Scripted()], installed=False) as host:
        kept = make(host)
        with pytest.warns(ResourceWarning):
            drop(host)
        assert host.machines == [kept]
    assert kept.memory.ranges == []


@pytest.mark.filterwarnings("error::ResourceWarning", "error::pytest.PytestUnraisableExceptionWarning")
def test_a_machine_that_was_closed_or_never_made_says_nothing() -> None:
    """Neither a closed machine, nor one that was refused before or while it was built, warns."""
    make().close()
    with make():
        pass
    with pytest.raises(ConfigError):
        Machine(memory="nonsense")
    with pytest.raises(ConfigError):
        Machine.from_config(Draft.of({"machine": {"platform": "nonsense"}}).config())
    gc.collect()


def test_a_running_machine_with_all_cards_is_dropped() -> None:
    """No installed card keeps a machine that nobody holds: its threads end, and the warning says where to look."""
    words = [sys.executable, "-X", "dev", "-c", ALL_CARDS]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == "None ['MainThread']\n", done.stderr
    assert "ResourceWarning: unclosed <Machine 'machine" in done.stderr
    assert "nobody holds the machine any more: it is closed" in done.stderr
