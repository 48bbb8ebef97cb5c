"""The example card with a virtio device of its own."""

from __future__ import annotations

import struct
from importlib.metadata import entry_points
from pathlib import Path

import pytest

pytest.importorskip("virtio_card", reason="pip install ./examples/virtio-card")

from cardcage.registry import DeviceOffer, Registry
from cardcage_virtio.testing import Bench

EXAMPLE = Path(__file__).parents[2] / "examples" / "virtio-card"


def test_the_virtio_example_is_short_and_found() -> None:
    """A new virtio device takes at most 60 lines, registration included, and is announced by its own distribution."""
    source = EXAMPLE / "src" / "virtio_card"
    assert sum(len((source / name).read_text().splitlines()) for name in ("__init__.py", "device.py")) <= 60
    (point,) = entry_points(group="cardcage", name="number-disk")
    registry = Registry()
    point.load().cardcage_register(registry)
    assert registry.names(DeviceOffer) == ["number-disk", "number-disk-mmio"]
    transport = registry.get(DeviceOffer, "number-disk").load()(
        registry.get(DeviceOffer, "number-disk").load_options()()
    )
    assert transport.pci.device == 0x1042


@pytest.mark.parametrize("packed", [False, True])
def test_the_virtio_example_serves_requests(packed: bool) -> None:
    """Its sectors say their numbers, the end of the disk is an error, and a malformed request needs a reset."""
    from virtio_card.device import NumberDisk, Options

    bench = Bench(NumberDisk(Options()), packed=packed)
    assert bench.call([struct.pack("<IIQ", 0, 0, 7)], [512, 512, 1])[512:].startswith(b"sector 8\n")
    assert bench.call([struct.pack("<IIQ", 0, 0, 2047)], [1024, 1])[-1] == 1
    assert bench.call([struct.pack("<IIQ", 8, 0, 0)], [20, 1])[-1] == 2
    bench.driver().add([b"short"])
    bench.kick()
    assert bench.virtio.status & 64
    bench.close()
