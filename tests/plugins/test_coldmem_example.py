"""The example policy, from its own installed wheel: what is cold goes out, and a mistake in it is named."""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from cardcage import Machine
from cardcage.errors import CardError, ConfigError
from cardcage.hookspecs import hookimpl
from cardcage.host import Host
from cardcage.registry import Registry
from cardcage_memory_policies import PolicyOffer, policies_of
from cardcage_memory_policies.testing import check_policy

EXAMPLE = Path(__file__).parents[2] / "examples" / "coldmem-policy"
MIB = 1 << 20
coldmem = pytest.importorskip("coldmem_policy.policy", reason="pip install ./examples/coldmem-policy")


def machine(tmp_path: Path, policy: Any, host: Host | None = None) -> Machine:
    backend = {"type": "file", "path": str(tmp_path / "ram")}
    keys: dict[str, Any] = {"platform": "none", "accel": ["tcg"], "memory": "64M"}
    return Machine(machine=keys, fragments=[{"memory": backend, "policy": {"memory": [policy]}}], host=host)


def test_it_is_found_by_its_entry_point() -> None:
    """The example comes from a distribution of its own, and is at most 30 lines."""
    (point,) = entry_points(group="cardcage", name="coldmem")
    assert point.dist is not None
    assert point.dist.name == "coldmem-policy"
    assert len((EXAMPLE / "src" / "coldmem_policy" / "policy.py").read_text().splitlines()) <= 30


def test_it_keeps_the_contract() -> None:
    """It passes the public contract of policies."""
    check_policy(lambda: coldmem.ColdMemory(coldmem.Options()))


def test_cold_memory_goes_out_and_hot_stays(tmp_path: Path) -> None:
    """Memory that nobody touches leaves the host's memory, and all of it reads as before."""
    with machine(tmp_path, {"type": "coldmem", "interval": 1000, "part": 1.0}) as vm:
        policy, memory = policies_of(vm)[0].policy, policies_of(vm)[0].memory
        cold = os.urandom(MIB) * 40
        vm.memory.write(MIB, cold)
        vm.memory.write(48 * MIB, b"hot" * MIB)
        assert memory.resident >= 43 * MIB
        for _ in range(8):
            policy.step()
            assert vm.memory.read(48 * MIB, 3 * MIB) == b"hot" * MIB
        assert memory.resident <= 30 * MIB
        assert vm.memory.read(MIB, 40 * MIB) == cold


def test_its_options_are_checked(tmp_path: Path) -> None:
    """A wrong option is one line with its place."""
    with pytest.raises(ConfigError, match=r'policy.memory\[0\].part: expected a number, got "half"'):
        machine(tmp_path, {"type": "coldmem", "part": "half"})


def test_a_mistake_in_it_is_named(tmp_path: Path) -> None:
    """With a detach that takes no argument no machine is built, and the error names policy, card and method."""

    def mistaken() -> Any:
        made = coldmem.ColdMemory(coldmem.Options())
        made.detach = lambda: None
        return made

    class Card:
        @hookimpl
        def cardcage_register(self, registry: Registry) -> None:
            registry.add(PolicyOffer("mistaken", mistaken, shared=True))

    with (
        Host([Card()]) as host,
        pytest.raises(CardError, match=r'policy "mistaken" \(card Card, given to Host\): detach\(\) .*does not take 1'),
    ):
        machine(tmp_path, "mistaken", host)
    assert not host.machines
