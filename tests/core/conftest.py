"""What the tests of the machine share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cardcage.accelerator import Probe
from cardcage.device import Pio
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage.registry import Registry
from machine_kit import Panel, RawBoot, RawOptions
from scripted import Script, Scripted


@pytest.fixture
def make_machine(request: pytest.FixtureRequest) -> Iterator[Callable[..., Machine]]:
    """Makes machines with scripted vCPUs, a panel at port 0x80 and the boot protocol ``fill``; closes them."""
    machines: list[Machine] = []

    def build(*scripts: Script, probe: Probe | None = None, cards: tuple[Any, ...] = (), **arguments: Any) -> Machine:
        def extra(registry: Registry) -> None:
            registry.device("panel", Panel, regions=(Pio(8, 0x80),))
            registry.boot("fill", RawBoot, options=RawOptions)

        card = Scripted(scripts, extra=extra)
        keys = {"platform": "none", **arguments.pop("machine", {})}
        devices = arguments.pop("devices", [{"type": "panel"}])
        machine = Machine(
            host=Host([card, *cards], installed=False),
            accel=arguments.pop("accel", "scripted"),
            memory=arguments.pop("memory", "2M"),
            machine=keys,
            devices=devices,
            **arguments,
        )
        machine.scripted = card  # type: ignore[attr-defined]  # for tests to look at
        machines.append(machine)
        return machine

    yield build
    for machine in machines:
        machine.close()
