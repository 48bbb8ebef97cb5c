"""Near misses of what a bus and a transport look for, and what they find by signature."""

from __future__ import annotations

from typing import Any

import pytest
from cardcage.abilities import near_misses
from cardcage.errors import CardError
from cardcage_pci.host import PciHost
from cardcage_pci.spec import OPTIONAL
from cardcage_testing import TestSlot
from cardcage_virtio import Behind
from cardcage_virtio.device import Notified
from cardcage_virtio.testing import Bench, ram
from cardcage_virtio.virtio import Virtio


class Card:
    """A PCI device that means ``plug_pci``."""

    pci = {"vendor": 0x1AF4, "device": 0x10F0, "class_code": 0x080300}  # noqa: RUF012 (never changed)

    def plugpci(self, function: Any, /) -> None: ...


class Toy:
    """A virtio device that means ``drain``."""

    device_id, queue_sizes = 40, (8,)

    def handle(self, request: Any, /) -> None: ...

    def drian(self) -> None: ...


def test_the_bus_tells_near_misses_of_what_it_looks_for() -> None:
    """Attaching a device warns of a method that the bus would not call, once for its class."""
    host, slot = PciHost(), TestSlot()
    host.plug(slot)
    host.attach(Card(), slot, None)
    host.attach(Card(), slot, None)
    told = [values for _, event, values in slot.log.entries if event.startswith("near miss")]
    assert told == [{"who": f'device "{slot.id}"', "why": 'has "plugpci": did you mean "plug_pci" (PciPluggable)?'}]


def test_the_bus_looks_at_signatures() -> None:
    """A method that the bus could not call is refused when the device is attached, by name."""
    wrong = type("Wrong", (Card,), {"config_written": lambda self, offset: None})
    with pytest.raises(CardError, match=r"config_written.* does not take 2 positional arguments"):
        PciHost().attach(wrong(), TestSlot(), None)


def test_a_virtio_device_tells_near_misses() -> None:
    """The bench fails for one, a machine's log and ``cardcage cards -v`` have a line."""
    line = 'has "drian": did you mean "drain" (Drains)?'
    with pytest.raises(AssertionError, match='has "drian"'):
        Bench(Toy())
    memory = ram(1 << 20)
    slot = TestSlot(memory=memory)
    Virtio(Toy(), None).plug(slot)  # type: ignore[arg-type]  # no interrupt comes
    assert slot.log.entries == [
        ("warning", "near miss: nobody calls this", {"who": 'virtio device "device"', "why": line})
    ]
    assert Behind(Toy, "").near_misses() == [line]
    slot.close()
    memory.close()


def test_a_virtio_device_is_looked_at_by_signature() -> None:
    """A method with other arguments, a state that is only saved, no number, or a queue size that no driver could use is
    refused when the device is made."""
    for members, error in (
        ({"config": lambda self, offset: b""}, "config.* does not take 0 positional arguments"),
        ({"save": lambda self: None}, "has 'save' but no 'load'"),
        ({"queue_sizes": None}, "has no attribute 'queue_sizes'"),
        ({"handle": None}, "has a method handle"),
        *(
            ({"queue_sizes": (8, size)}, rf"queue_sizes\[1\] is {size!r}, expected a power of two from 1 to 32768")
            for size in (7, 0, -8, 65536, 8.0, True, "8", None)
        ),
    ):
        wrong = type("Wrong", (Toy,), members)
        with pytest.raises(CardError, match=f"Wrong: .*{error}"):
            Virtio(wrong(), None)  # type: ignore[arg-type]


def test_what_only_notifies_needs_no_handle() -> None:
    """``notified`` alone makes a virtio device."""
    made = type("Made", (), {"device_id": 40, "queue_sizes": (8,), "notified": lambda self, index: None})
    assert near_misses(made, (Notified, *OPTIONAL)) == []
    assert Virtio(made(), None).device.device_id == 40  # type: ignore[arg-type]
