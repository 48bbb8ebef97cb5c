"""The generation in QMP's words."""

from __future__ import annotations

from typing import TypedDict

from cardcage_qmp import QmpError, Session

from cardcage_vmgenid.vmgenid import VmGenId

__all__ = ["GuidInfo", "query_vm_generation_id"]


class GuidInfo(TypedDict):
    """The identifier."""

    guid: str


def query_vm_generation_id(session: Session) -> GuidInfo:
    """The identifier of the guest's generation. Raises QmpError without the device."""
    devices = session.machine.devices.values()
    found = next((one.device for one in devices if isinstance(one.device, VmGenId)), None)
    if found is None:
        raise QmpError("VM Generation ID device not found")
    return {"guid": str(found.guid)}
