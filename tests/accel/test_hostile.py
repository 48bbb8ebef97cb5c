"""Hostile guests end in nothing worse than their own fault; ``hostile_fuzz.py`` has the long form."""

from __future__ import annotations

import os
import shutil
import threading
from typing import Any

import pytest
from cardcage.accelerator import VmSpec
from cardcage.memory import PhysicalMemory, RamBlock, RamRange
from cardcage.vcpu import Exit, VCpuExit
from cardcage.x86 import Segment
from cardcage_tcg import layout as L
from cardcage_tcg.accel import Tcg
from cardcage_tcg.vm import TcgOptions
from hostile.case import Case, random_case
from hostile.oracles import ROLES
from hostile.prove import PATCHES, prove
from hostile.supervise import Supervisor, replay
from hostile.variants import make

LONG = bool(os.environ.get("CARDCAGE_LONG_TESTS"))


@pytest.mark.once
def test_short() -> None:
    """Half a minute of random guests finds nothing: no process dies, no vCPU is deaf, no exception leaves run()."""
    supervisor = Supervisor(make(), 1, 2, ["--cpus", "3", "--case-seconds", "0.3"])
    assert not supervisor.run(25, stop_after=1, quiet=True)
    assert supervisor.counts["cases"] > 10


@pytest.mark.once
@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")
def test_check_build() -> None:
    """The tables' invariants hold under random guests, with fences and sanitizers about the translator's memory."""
    supervisor = Supervisor(make("check"), 1, 2, ["--cpus", "3", "--case-seconds", "0.3"])
    assert not supervisor.run(15, stop_after=1, quiet=True)
    assert supervisor.counts["cases"] > 3


@pytest.mark.once
@pytest.mark.parametrize("theme", sorted(ROLES))
def test_role(theme: str) -> None:
    """A program that knows what it must see sees it, with memory slots that change and kicks beside, on two vCPUs."""
    assert not replay(Case(5, theme, 2, seconds=1.5, acts=["flip", "kick", "msi", "nmi"]), make(), 1)


def test_seed() -> None:
    """A seed makes the same case again, and a case comes back from its text."""
    one = random_case(77, 4, 0.5)
    assert one == random_case(77, 4, 0.5) == Case.from_json(one.to_json())


class _Nothing:
    def __getattr__(self, name: str) -> Any:
        return lambda *_: 0


def _forward(bits: int, memory: PhysicalMemory) -> int:
    """Code that only goes forward, and comes round because addresses wrap; where it begins."""
    if bits == 16:
        memory.write(0x10000, b"\x90" * 0x10000)
        return 0
    places = (0x1000, 0x56000000, 0xAB000000)
    for at, to in zip(places, (*places[1:], places[0]), strict=True):
        memory.write(at, b"\xe9" + (to - at - 5 & 0xFFFFFFFF).to_bytes(4, "little"))
    return places[0]


@pytest.mark.parametrize("bits", [16, 32])
def test_forward_code_answers_a_kick(bits: int) -> None:
    """Code without a jump back, which runs round the end of its addresses, comes back when it is kicked."""
    vm = Tcg().create_vm(VmSpec(cpus=1, irqchip="none", options=TcgOptions(templates="none")))
    memory = PhysicalMemory()
    memory.add(
        *(RamRange(at, size, RamBlock(size)) for at, size in ((0, 1 << 20), (0x56000000, 4096), (0xAB000000, 4096)))
    )
    memory.attach(vm)
    cpu = vm.create_vcpu(0)
    state = cpu.get_state()
    state.registers.rip = _forward(bits, memory)
    state.system.cs = Segment.flat(8, code=True) if bits == 32 else Segment(selector=0x1000, base=0x10000, type=11)
    state.system.cr0 = 0x11 if bits == 32 else 0x10
    cpu.set_state(state)
    ended: list[VCpuExit] = []
    thread = threading.Thread(target=lambda: ended.append(cpu.run(_Nothing())), daemon=True)
    thread.start()
    while not vm._q[L.VM_STAT // 8 + 1]:  # no block was made yet
        thread.join(0.01)
    cpu.kick()
    thread.join(60)
    assert [one.reason for one in ended] == [Exit.KICKED]
    vm.close()
    memory.close()


@pytest.mark.skipif(not LONG, reason="takes up to 15 minutes each: set CARDCAGE_LONG_TESTS")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("patch", PATCHES, ids=[one.stem for one in PATCHES])
def test_proof(patch: Any) -> None:
    """A fault that is put back is found within 15 minutes."""
    assert prove(patch) is not None
