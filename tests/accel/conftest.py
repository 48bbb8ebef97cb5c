"""What the tests of the accelerators share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cardcage.accelerator import VmSpec
from cardcage_kvm.accel import Kvm
from kvm_bench import Bench, MakeBench
from tcg_cpu import Cpu, load


@pytest.fixture
def kvm_bench() -> Iterator[MakeBench]:
    """Makes VMs of the accelerator kvm; closes them."""
    found = Kvm().probe()
    if not found.usable:
        pytest.skip(found.reason)
    made: list[Bench] = []

    def make(**spec: object) -> Bench:
        made.append(Bench(VmSpec(**{"irqchip": "none", **spec})))  # type: ignore[arg-type]  # fields of any type
        return made[-1]

    yield make
    for one in made:
        one.vm.close()


@pytest.fixture
def cpu() -> Cpu:
    """A vCPU of the translator's library, without the translator."""
    return Cpu(load())
