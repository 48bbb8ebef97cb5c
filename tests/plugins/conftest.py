"""What the tests of several boot protocols share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from boot_kit import (
    MIB,
    BootMachine,
    Context,
    DebugConsole,
    RunGuest,
    Write,
)
from cardcage.accelerator import VmSpec
from cardcage.host import Host
from cardcage.registry import AcceleratorOffer
from cardcage.vcpu import Exit
from cardcage.x86 import VCpuState


@pytest.fixture
def boot_machine() -> Iterator[BootMachine]:
    """Makes memory maps of as much RAM as asked for."""
    made: list[Context] = []

    def make(size: int = 16 * MIB) -> Context:
        made.append(Context(size))
        return made[-1]

    yield make
    for one in made:
        one.memory.close()


@pytest.fixture
def run_guest(accel: str) -> RunGuest:
    """Runs a guest until HLT on each accelerator; returns what it wrote to port 0xE9."""
    accelerator = Host().registry.get(AcceleratorOffer, accel).load()()

    def go(context: Context, state: VCpuState) -> bytes:
        vm = accelerator.create_vm(VmSpec(irqchip="none"))
        try:
            context.memory.attach(vm)
            vcpu = vm.create_vcpu(0)
            vcpu.set_state(state)
            console = DebugConsole()
            ended = vcpu.run(console)
            assert ended.reason is Exit.HALTED, (ended, bytes(console.output))
            return bytes(console.output)
        finally:
            context.memory.listener = None
            vm.close()

    return go


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file of this name; returns its path."""

    def put(name: str, data: bytes) -> str:
        path = tmp_path / name
        path.write_bytes(data)
        return str(path)

    return put
