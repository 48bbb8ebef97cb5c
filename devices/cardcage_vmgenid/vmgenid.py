"""The Virtual Machine Generation ID device (specification of that name, Microsoft, 2012; QEMU, docs/specs/vmgenid).

A page of memory with 16 bytes, the identifier, in the order in which a GUID has them in memory. ACPI says where it is
(``ADDR``), and general-purpose event 5 tells the guest that the identifier is another one: Linux (5.18, ``vmgenid``)
mixes it into its random numbers then. It is another one after a fork in each copy, after a restore, and after a revert;
the same after a pause, a reset, and a migration.
"""

from __future__ import annotations

import os
import uuid
from typing import TYPE_CHECKING, Any, ClassVar

from attrs import field
from cardcage.device import Resource
from cardcage.errors import ConfigError
from cardcage.values import define, frozen
from cardcage_pc.acpi import aml

if TYPE_CHECKING:
    from cardcage.device import Slot

__all__ = ["GPE", "OFFSET", "VmGenId", "VmGenIdOptions", "VmGenIdState"]

GPE = 5
"""The general-purpose event."""
OFFSET = 40
"""Of the identifier in the page, as QEMU has it."""
CHANGED = 0x80
"""The notification (specification, "ACPI notification")."""


def is_guid(of: object, attribute: Any, value: str) -> None:
    if value != "auto":
        try:
            uuid.UUID(value)
        except ValueError as error:
            raise ValueError(f'{attribute.name}: expected "auto" or a GUID, got "{value:.80}"') from error


@frozen
class VmGenIdOptions:
    """Options of ``vmgenid``.

    Attributes:
        guid: the identifier that the machine begins with; ``auto``: a random one.
    """

    guid: str = field(default="auto", validator=is_guid)


@define
class VmGenIdState:
    """Saved state: the identifier, 32 hexadecimal digits in the order of memory."""

    version: ClassVar[int] = 1
    guid: str = "0" * 32


class VmGenId:
    """The device. Attribute ``guid``: the identifier."""

    def __init__(self, options: VmGenIdOptions) -> None:
        self.guid = uuid.uuid4() if options.guid == "auto" else uuid.UUID(options.guid)

    def plug(self, slot: Slot, /) -> None:
        """Announce it. Raises ConfigError for a second one: a guest has one identifier."""
        self._board, self._log = slot.board, slot.log
        if any(isinstance(one.device, VmGenId) and one.device is not self for one in slot.board.devices.values()):
            raise ConfigError("there is one already: a machine has one generation")
        where = slot.ranges.mappings[0].address
        if where is None:
            raise ConfigError("expected an address: the guest is told where it is")
        address = where + OFFSET
        told = aml.method(f"_E{GPE:02X}", 0, aml.notify("\\_SB.VGEN", aml.integer(CHANGED)))
        terms = (
            # the specification's, and the one by which Linux finds it, whose own are of 9 letters at most
            aml.name("_CID", aml.package(aml.string("VM_Gen_Counter"), aml.string("VMGENCTR"))),
            aml.name("_DDN", aml.string("VM_Gen_Counter")),
            aml.name("ADDR", aml.package(aml.integer(address & 0xFFFFFFFF), aml.integer(address >> 32))),
            aml.scope("\\_GPE", told),
        )
        slot.ranges.announce(Resource(hid="CCRD0001", name="VGEN", extra=b"".join(terms)))

    # the guest's side

    def read(self, offset: int, size: int, /) -> int:
        """The page: zeros but for the identifier."""
        page = bytes(OFFSET) + self.guid.bytes_le
        return int.from_bytes(page[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int, /) -> None:
        """Nothing of it is the guest's to change."""

    # the machine's

    def save(self) -> VmGenIdState:
        return VmGenIdState(self.guid.bytes_le.hex())

    def load(self, state: VmGenIdState, /) -> None:
        data = bytes.fromhex(state.guid)
        if len(data) != 16:
            raise ConfigError(f"an identifier of {len(data)} bytes: expected 16")
        self.guid = uuid.UUID(bytes_le=data)

    def may_fork(self) -> str:
        return ""

    def forked(self) -> None:
        """There are two of the guest now."""
        self._changed()

    def reverted(self) -> None:
        """The guest is back at an earlier time (:class:`cardcage_fork.reverting.Reverted`)."""
        self._changed()

    def _changed(self) -> None:
        self.guid = uuid.UUID(bytes=os.urandom(16), version=4)
        for one in self._board.devices.values():
            if callable(signal := getattr(one.device, "general_event", None)):
                signal(GPE)
                return
        self._log.warning("no device raises the general-purpose event: the guest is not told of its new generation")
