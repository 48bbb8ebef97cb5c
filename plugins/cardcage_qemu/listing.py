"""Lists of all that there is: ``-device help`` and its like, and the options for QMP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypedDict

from cardcage.registry import AcceleratorOffer
from cardcage_qmp import Session
from cardcage_qmp.about import MACHINE_TYPES
from cardcage_qmp.names import DEVICES
from cardcage_qmp.session import VERSION

from cardcage_qemu.line import MODELS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cardcage.host import Host

__all__ = ["answer", "query_command_line_options"]

KEYS = {
    "machine": "type accel kernel-irqchip memory-backend kernel initrd append firmware usb vmport dump-guest-core "
    "acpi pic pit rtc isa-serial pcie ioapic2 x-option-roms auto-kernel-cmdline",
    "smp-opts": "cpus sockets cores threads maxcpus",
    "memory": "size slots maxmem",
    "drive": "file if id format readonly cache discard serial werror rerror",
    "netdev": "type id hostfwd ifname br script downscript vhost",
    "chardev": "id backend path server wait fd host port append",
    "mon": "chardev mode pretty",
    "device": "driver id bus addr",
    "object": "qom-type id",
    "fsdev": "fsdriver id path security_model readonly multidevs",
    "name": "guest process debug-threads",
    "rtc": "base clock driftfix",
    "boot-opts": "order menu strict",
    "fw_cfg": "name file string",
    "sandbox": "enable obsolete elevateprivileges spawn resourcecontrol",
    "add-fd": "fd set opaque",
    "overcommit": "mem-lock cpu-pm",
}


class CommandLineParameterInfo(TypedDict):
    name: str
    type: Literal["string", "boolean", "number", "size"]


class CommandLineOptionInfo(TypedDict):
    """An option of the command line, and the keys of its value."""

    option: str
    parameters: list[CommandLineParameterInfo]


def query_command_line_options(session: Session, option: str | None = None) -> list[CommandLineOptionInfo]:
    """The options of ``cardcage-qemu`` that take keys."""
    return [
        {"option": name, "parameters": [{"name": key, "type": "string"} for key in keys.split()]}
        for name, keys in KEYS.items()
        if option in (None, name)
    ]


def answer(words: Sequence[str], host: Host) -> str | None:
    """The text that is printed in place of a run; None where nothing was asked for."""
    from cardcage_qemu.options import OPTIONS

    rest = iter(words)
    for word in rest:
        option = word[2:] if word.startswith("--") else word[1:]
        if not word.startswith("-"):
            continue
        if option in ("version", "h", "help"):
            from cardcage import __version__

            about = f"QEMU emulator version {'.'.join(map(str, VERSION))} (cardcage {__version__})"
            if option == "version":
                return about
            rows = [f"-{name}{' ...' if takes else ''}" for name, (takes, *_) in OPTIONS.items()]
            usage = "usage: cardcage-qemu [options], as qemu-system-x86_64 has them (docs/qemu.md):"
            return "\n".join([about, usage, *rows])  # its version first, as QEMU's
        value = next(rest, "") if option in OPTIONS and OPTIONS[option][0] else ""
        first, _, more = value.partition(",")
        if {"help", "?"}.isdisjoint((first, more)):
            continue
        if option in ("machine", "M"):
            rows = [
                f"{one['name']:20} {'(default)' if one.get('is-default') else ''}".rstrip() for one in MACHINE_TYPES
            ]
            return "\n".join(["Supported machines are:", *rows, f"{'pc':20} (alias of {MACHINE_TYPES[0]['name']})"])
        if option == "cpu":
            return "\n".join(["Available CPUs:", *(f"  {one}" for one in MODELS)])
        if option == "accel":
            there = [one for one in host.registry.names(AcceleratorOffer) if one in ("kvm", "tcg")]
            return "\n".join(["Accelerators supported in QEMU binary:", *there])
        if option == "device" and first in DEVICES:
            known = DEVICES[first]
            keys = sorted([*known.options, *known.links])
            return "\n".join([f"{first} options:", *(f"  {key}=<{known.types.get(key, 'str')}>" for key in keys)])
        if option == "device":
            return "\n".join(f'name "{name}", bus {one.parent}' for name, one in DEVICES.items())
    return None
