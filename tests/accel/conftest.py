"""What the tests of the accelerators share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cardcage.accelerator import VmSpec
from cardcage_kvm.accel import Kvm
from kvm_bench import Bench, MakeBench
from tcg_cpu import Cpu, load
from tcg_host import Host

EVERYWHERE = {f"test_{name}.py" for name in "check_tcg kvm tcg_store".split()}
"""Modules that run on each Python version: the conformance programs, and where Python and native code meet. The others
are about translated code, which knows no Python."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is run on one Python version only."""
    for item in items:
        if item.path.parent == Path(__file__).parent and item.path.name not in EVERYWHERE:
            item.add_marker(pytest.mark.once)


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """The real processor; skipped where the system lets no process be traced."""
    try:
        made = Host()
    except OSError as error:
        pytest.skip(f"the real processor cannot be asked: {error}")
    yield made
    made.close()


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
