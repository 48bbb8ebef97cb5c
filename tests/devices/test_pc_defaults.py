"""The platform's own devices can be set: ``--set device.isa-serial.char=...`` without a table for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cardcage.config import Draft
from cardcage.errors import ConfigError
from cardcage.machine import Machine


def built(*assignments: str, **fragment: Any) -> Machine:
    """A PC with *assignments*."""
    machine = {"accel": ["tcg"], "memory": "2M"}
    return Machine.from_config(Draft.of({"machine": machine, **fragment}, assignments=assignments).config())


def test_a_default_device_takes_what_is_set(tmp_path: Path) -> None:
    """Options, and the machine's keys, of devices that the platform adds are set by id or type; the rest stays."""
    log = tmp_path / "console.log"
    with built(f"device.isa-serial.char=file:{log}", "device.fw_cfg.boot_menu=false", "device.rtc.id=clock") as vm:
        assert not vm.console.claimed
        assert log.exists()
        assert vm.devices["fw_cfg"].device.options.boot_menu is False
        assert vm.devices["fw_cfg"].device.options.serial_console == 0x3F8
        assert vm.devices["clock"].type == "rtc"


def test_several_assignments_reach_one_device(tmp_path: Path) -> None:
    """A device takes key after key, and the platform's own tables are not changed for the next machine."""
    log = tmp_path / "a.log"
    table = f'{{ type = "file", path = "{log}" }}'
    with built(
        f"device.isa-serial.char={table}", "device.isa-serial.char.append=true", "device.isa-serial.irq=3"
    ) as vm:
        assert log.exists()
        assert vm.devices["isa-serial"].slot.interrupts.number == 3
        assert not vm.console.claimed
    with built() as vm:
        assert vm.console.claimed


def test_a_configured_device_comes_before_the_platforms() -> None:
    """A device of the configuration is meant where there is one of that type."""
    device = {"type": "isa-serial", "port": 0x2F8, "irq": 3, "id": "second"}
    with built("device.isa-serial.irq=5", device=[device]) as vm:
        assert vm.devices["second"].slot.interrupts.number == 5
        assert vm.devices["isa-serial"].slot.interrupts.number == 4


@pytest.mark.parametrize(
    ("assignment", "error"),
    [
        (
            "device.isa-serail.char=null",
            'device.isa-serail.char: this machine has no device "isa-serail". Did you mean "isa-serial"?',
        ),
        ("device.isa-serial.chr=null", 'device.isa-serial.chr: no such key. Did you mean "char"?'),
        ("device.isa-serial.irq=99", "device.isa-serial.irq: expected 0 to 23, got 99"),
        ("device.isa-serial.char.type=null", "device.isa-serial.char.type: char is a value, not a table"),
        ("device.fw_cfg.boot_menu=1", "device.fw_cfg.boot_menu: expected true or false, got 1"),
    ],
)
def test_what_does_not_fit_is_named(assignment: str, error: str) -> None:
    """An error about a default names ``--set`` and the whole key."""
    with pytest.raises(ConfigError) as caught:
        built(assignment)
    assert str(caught.value) == f"--set: {error}"
