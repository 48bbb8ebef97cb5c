"""SeaBIOS, as Debian packages it, on the whole PC: it runs from ROM, shadows itself through PAM, and talks on COM1."""

from __future__ import annotations

from pathlib import Path

import pytest
from cardcage import Machine
from cardcage.host import Host
from cardcage.registry import AcceleratorOffer

ROM = Path("/usr/share/seabios/bios-256k.bin")


@pytest.mark.skipif(not ROM.exists(), reason="needs Debian's package seabios")
@pytest.mark.parametrize("accel", Host().registry.names(AcceleratorOffer))
def test_seabios_reaches_its_boot_menu_and_again_after_reset(accel: str) -> None:
    """The firmware offers its boot menu on the serial port, takes a key there, and does so again after a reset."""
    probe = Host().registry.get(AcceleratorOffer, accel).load()().probe()
    if not probe.usable:
        pytest.skip(f"{accel}: {probe.reason}")
    with Machine(memory="64M", accel=accel, boot={"firmware": str(ROM)}) as machine:
        machine.start()
        for _ in range(2):
            machine.console.expect("SeaBIOS (version", timeout=60)
            machine.console.expect("Press ESC for boot menu", timeout=60)
            machine.console.send("\x1b")
            machine.console.expect("Select boot device", timeout=60)
            machine.reset()
