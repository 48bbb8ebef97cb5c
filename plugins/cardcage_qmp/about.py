"""Commands that tell of the machine as a whole, and of this program."""

from __future__ import annotations

import os
import threading
from typing import Any, Literal, NotRequired, TypedDict

from cardcage_qmp.control import RunState, present
from cardcage_qmp.session import Session, VersionInfo
from cardcage_qmp.session import version as version_of

# A name with a dash takes the functional form of TypedDict.


class CommandInfo(TypedDict):
    """A command."""

    name: str


class StatusInfo(TypedDict):
    """The machine's state."""

    running: bool
    singlestep: bool
    status: RunState


class NameInfo(TypedDict):
    """The machine's name."""

    name: NotRequired[str]


class UuidInfo(TypedDict):
    """The machine's UUID."""

    UUID: str


class TargetInfo(TypedDict):
    """The guest's processor."""

    arch: Literal["x86_64"]


class KvmInfo(TypedDict):
    """KVM: used by this machine, and usable here."""

    enabled: bool
    present: bool


MachineInfo = TypedDict(
    "MachineInfo",
    {
        "name": str,
        "alias": NotRequired[str],
        "is-default": NotRequired[bool],
        "cpu-max": int,
        "hotpluggable-cpus": bool,
        "numa-mem-supported": bool,
        "deprecated": bool,
        "acpi": bool,
    },
)
CurrentMachineParams = TypedDict("CurrentMachineParams", {"wakeup-suspend-support": bool})
CpuDefinitionInfo = TypedDict(
    "CpuDefinitionInfo",
    {
        "name": str,
        "typename": str,
        "migration-safe": NotRequired[bool],
        "static": bool,
        "unavailable-features": NotRequired[list[str]],
        "deprecated": bool,
    },
)
CpuInstanceProperties = TypedDict(
    "CpuInstanceProperties", {"socket-id": NotRequired[int], "core-id": NotRequired[int], "thread-id": NotRequired[int]}
)
CpuInfoFast = TypedDict(
    "CpuInfoFast",
    {
        "cpu-index": int,
        "qom-path": str,
        "thread-id": int,
        "props": NotRequired[CpuInstanceProperties],
        "target": Literal["x86_64"],
    },
)
HotpluggableCpu = TypedDict(
    "HotpluggableCpu",
    {"type": str, "vcpus-count": int, "props": CpuInstanceProperties, "qom-path": NotRequired[str]},
)
IoThreadInfo = TypedDict("IoThreadInfo", {"id": str, "thread-id": int})
MemoryInfo = TypedDict("MemoryInfo", {"base-memory": int, "plugged-memory": NotRequired[int]})


__all__ = [
    "query_commands",
    "query_cpu_definitions",
    "query_cpus_fast",
    "query_current_machine",
    "query_hotpluggable_cpus",
    "query_iothreads",
    "query_kvm",
    "query_machines",
    "query_memdev",
    "query_memory_devices",
    "query_memory_size_summary",
    "query_name",
    "query_qmp_schema",
    "query_status",
    "query_target",
    "query_tpm_models",
    "query_tpm_types",
    "query_uuid",
    "query_version",
]

NO_UUID = "00000000-0000-0000-0000-000000000000"
CPU = "x86_64-cpu"
MODELS = ("host", "max", "x86-64-v2")
MACHINE_TYPES: tuple[MachineInfo, ...] = (
    {
        "name": "pc-i440fx-7.2",
        "alias": "pc",
        "is-default": True,
        "cpu-max": 255,
        "hotpluggable-cpus": False,
        "numa-mem-supported": False,
        "deprecated": False,
        "acpi": True,
    },
    {
        "name": "microvm",
        "cpu-max": 255,
        "hotpluggable-cpus": False,
        "numa-mem-supported": False,
        "deprecated": False,
        "acpi": True,
    },
    {
        "name": "none",
        "cpu-max": 255,
        "hotpluggable-cpus": False,
        "numa-mem-supported": False,
        "deprecated": False,
        "acpi": False,
    },
)


def query_version(session: Session) -> VersionInfo:
    """The version."""
    return version_of()


def query_commands(session: Session) -> list[CommandInfo]:
    """The commands there are."""
    return [{"name": name} for name in ("qmp_capabilities", *session.control.table.commands)]


def query_qmp_schema(session: Session) -> list[Any]:
    """The schema of the commands and events there are."""
    return session.control.table.schema


def query_status(session: Session) -> StatusInfo:
    """The machine's state."""
    state = session.control.run_state
    return {"running": state == "running", "singlestep": False, "status": state}


def query_name(session: Session) -> NameInfo:
    """The machine's name."""
    return {"name": session.machine.name}


def query_uuid(session: Session) -> UuidInfo:
    """The UUID that the guest finds in its SMBIOS tables."""
    for one in present(session.machine):
        if one.type == "smbios" and (found := getattr(getattr(one.device, "options", None), "uuid", "")):
            return {"UUID": str(found).lower()}
    return {"UUID": NO_UUID}


def query_target(session: Session) -> TargetInfo:
    """The guest's processor."""
    return {"arch": "x86_64"}


def query_kvm(session: Session) -> KvmInfo:
    """Tell if this machine uses KVM, and if one could."""
    machine = session.machine
    return {"enabled": machine.accelerator.name == "kvm", "present": session.control.has_kvm}


def query_machines(session: Session) -> list[MachineInfo]:
    """The kinds of machine that ``cardcage-qemu -machine`` takes."""
    return list(MACHINE_TYPES)


def query_current_machine(session: Session) -> CurrentMachineParams:
    """There is no sleep to wake from."""
    return {"wakeup-suspend-support": False}


def query_cpu_definitions(session: Session) -> list[CpuDefinitionInfo]:
    """The CPU models."""
    return [
        {
            "name": name,
            "typename": f"{name}-{CPU}",
            "migration-safe": name == "x86-64-v2",
            "static": False,
            "unavailable-features": [],
            "deprecated": False,
        }
        for name in MODELS
    ]


def query_cpus_fast(session: Session) -> list[CpuInfoFast]:
    """The processors, with their threads; before those run, the thread of this process."""
    machine = session.machine
    threads = {one.name: one.native_id for one in threading.enumerate()}
    return [
        {
            "cpu-index": vcpu.index,
            "qom-path": f"/machine/unattached/device[{vcpu.index}]",
            "thread-id": threads.get(f"{machine.name}-cpu{vcpu.index}") or os.getpid(),
            "props": {"socket-id": vcpu.index, "core-id": 0, "thread-id": 0},
            "target": "x86_64",
        }
        for vcpu in machine.vcpus
    ]


def query_hotpluggable_cpus(session: Session) -> list[HotpluggableCpu]:
    """The processors: all that there can be are there."""
    machine = session.machine
    return [
        {
            "type": f"{machine.config.machine.cpu}-{CPU}",
            "vcpus-count": 1,
            "props": {"socket-id": vcpu.index, "core-id": 0, "thread-id": 0},
            "qom-path": f"/machine/unattached/device[{vcpu.index}]",
        }
        for vcpu in reversed(machine.vcpus)
    ]


def query_iothreads(session: Session) -> list[IoThreadInfo]:
    """None: a device's threads are its own."""
    return []


def query_memory_size_summary(session: Session) -> MemoryInfo:
    """The size of RAM."""
    return {"base-memory": session.machine.config.machine.memory, "plugged-memory": 0}


def query_memory_devices(session: Session) -> list[Any]:
    """None: memory is not plugged in."""
    return []


def query_memdev(session: Session) -> list[Any]:
    """None: RAM is of one piece, without a name."""
    return []


def query_tpm_models(session: Session) -> list[str]:
    """None."""
    return []


def query_tpm_types(session: Session) -> list[str]:
    """None."""
    return []
