"""The public device contract, held by the host bridge and by virtio devices on both transports."""

from __future__ import annotations

from typing import Any

import pytest
from cardcage.device import Mmio, Pio
from cardcage_pci.host import PciHost
from cardcage_testing import check_device
from cardcage_virtio.devices.balloon import Balloon
from cardcage_virtio.devices.console import Console, ConsoleOptions
from cardcage_virtio.devices.rng import Rng
from cardcage_virtio.transport.mmio import MmioTransport


def test_the_host_bridge_keeps_the_contract() -> None:
    """Its ports stand any access, and its state goes round."""
    check_device(
        PciHost,
        Pio(4, 0xCF8, "address", "read_address", "write_address"),
        Pio(4, 0xCFC, "data", "read_data", "write_data"),
    )


@pytest.mark.parametrize("name", ["rng", "balloon", "console"])
def test_virtio_devices_keep_the_contract(name: str) -> None:
    """The register window of a virtio device stands any access, and its state goes round."""
    make: dict[str, Any] = {
        "rng": Rng,
        "balloon": Balloon,
        "console": lambda: Console(ConsoleOptions(char="null")),
    }
    check_device(lambda: MmioTransport(make[name]()), Mmio(0x200, 0xD0000000))
