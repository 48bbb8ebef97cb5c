"""Every device of the platform is held to the contract of ``cardcage_testing.check_device``."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

import pytest
from cardcage.registry import Registry
from cardcage_pc import cardcage_register
from cardcage_testing import check_device
from cattrs.preconf.json import make_converter
from pc_kit import Kit

if TYPE_CHECKING:
    from cardcage.registry import Offer

REGISTRY = Registry()
cardcage_register(REGISTRY)
DEVICES = [one for one in REGISTRY if one.kind == "device" and one.bus == "system"]
FLASH = Path(mkdtemp()) / "flash"
FLASH.write_bytes(bytes(range(256)) * 256)
OPTIONS: dict[str, dict[str, Any]] = {
    "rtc": {"base": "2024-01-01T00:00:00"},
    "debugcon": {"char": "null"},
    "pflash": {"file": str(FLASH), "readonly": True},
}
KEEPS = {"rtc"}
"""What a reset does not put back: time and CMOS memory."""


@pytest.mark.parametrize("offer", DEVICES, ids=lambda offer: offer.name)
def test_contract(offer: Offer) -> None:
    """Random accesses raise nothing, answers fit, reset and state work, and no two devices share anything."""
    factory, options = offer.load(), offer.load_options()

    def make() -> Any:
        device = factory() if options is None else factory(options(**OPTIONS.get(offer.name, {})))
        if offer.name in KEEPS:
            device.__class__ = type("Kept", (type(device),), {"reset": None})
        return device

    check_device(make, *offer.regions, slot=Kit)


@pytest.mark.parametrize("offer", DEVICES, ids=lambda offer: offer.name)
def test_state_survives_json(offer: Offer) -> None:
    """What ``save`` gives comes back the same from the plain values that a file holds."""
    factory, options = offer.load(), offer.load_options()
    device = factory() if options is None else factory(options(**OPTIONS.get(offer.name, {})))
    if hasattr(device, "save"):
        Kit(*(region.base or 0 for region in offer.regions)).plugged(device)
        state, converter = device.save(), make_converter(forbid_extra_keys=True)
        assert converter.structure(json.loads(converter.dumps(state)), type(state)) == state
