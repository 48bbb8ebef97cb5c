"""The initramfs that ``cardcage boot`` gives a kernel: busybox, the kernel's virtio drivers and a small init."""

from __future__ import annotations

import re
import subprocess
from importlib.resources import files
from typing import TYPE_CHECKING

from cardcage.errors import ConfigError
from cardcage.registry import DeviceOffer

from cardcage_boot import GuestProgramOffer, cpio
from cardcage_boot.files import open_file
from cardcage_boot.modules import Module, collect

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from cardcage.machine import Machine
    from cardcage.registry import Registry

__all__ = ["WANTED", "add_devices", "applets", "build", "driver_script", "programs_of"]

WANTED = (
    *("virtio_pci", "virtio_mmio", "virtio_blk", "virtio_net", "virtio_console", "virtio_rng", "virtio_balloon"),
    *("virtio_scsi", "sr_mod", "isofs", "virtio_input", "virtio_mem", "virtiofs", "9pnet_virtio", "9p"),
    *("vmw_vsock_virtio_transport", "vsock_diag", "qemu_fw_cfg", "pvpanic_mmio", "pvpanic_pci", "button", "evdev"),
    *("ext4", "af_packet", "overlay"),
)
"""Modules put in, with what they need, where the kernel has them as modules."""

_SAFE = re.compile(r"[A-Za-z0-9_:*?\[\].,=+-]+")
SHELL_PROFILE = 'PS1=\'\\w # \'\nalias poweroff="poweroff -f" reboot="reboot -f"\n'


def applets(busybox: Path) -> list[str]:
    """Names that this busybox answers to. Raises ConfigError when it does not run here or is not static."""
    try:
        done = subprocess.run([busybox, "--list"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"busybox cannot be run: {error}", file=str(busybox)) from error
    return [name for name in done.stdout.split() if re.fullmatch(r"[\w.\[-]+", name)]


def _order(name: str, known: dict[str, Module], seen: list[str]) -> list[str]:
    """*name* after all that it needs."""
    for need in known[name].needs:
        if need in known and need not in seen:
            _order(need, known, seen)
    seen.append(name)
    return seen


def driver_script(modules: list[Module]) -> str:
    """A shell function ``driver ALIAS`` that inserts, in order, the modules whose patterns match a device's id."""
    known = {module.name: module for module in modules}
    lines = ["driver() {"]
    for module in modules:
        patterns = [alias for alias in module.aliases if ":" in alias and _SAFE.fullmatch(alias)]
        if patterns:
            order = " ".join(_order(module.name, known, []))
            lines.append(f'case "$1" in {"|".join(patterns)}) insert {order};; esac')
    return "\n".join([*lines, ":", "}", ""])


def programs_of(registry: Registry) -> dict[str, bytes]:
    """The programs that cards offer for the guest, by name. Raises CardError for one that cannot be had."""
    return {offer.name: offer.load()() for offer in registry.offers(GuestProgramOffer)}


def add_devices(machine: Machine) -> None:
    """Add the devices that the programs talk to, as far as the machine has cards for them and has not got them yet."""
    registry = machine.host.registry
    for table in (one for offer in registry.offers(GuestProgramOffer) for one in offer.devices):
        keys = {str(key): value for key, value in table.items() if key != "type"}
        if table["type"] in registry.names(DeviceOffer) and keys.get("id") not in machine.devices:
            machine.add(str(table["type"]), **keys)


def build(
    busybox: Path,
    modules_root: Path | None,
    release: str,
    init: str = "init.sh",
    programs: Mapping[str, bytes] | None = None,
) -> bytes:
    """Make the archive.

    Args:
        busybox: a static busybox for x86-64.
        modules_root: the kernel's ``lib/modules/RELEASE`` folder, ``None`` for a kernel without modules.
        release: the kernel's ``uname -r``.
        init: the script that is the first process: ``init.sh`` for a shell or one command, ``root.sh`` to mount root=.
        programs: what ``init.sh`` starts first, by name.

    The same input gives the same bytes. Raises ConfigError naming the file that is at fault.
    """
    modules = collect(modules_root, WANTED) if modules_root is not None else []
    folder = f"lib/modules/{release}"
    known = {one.name: one for one in modules}
    depends = "".join(
        f"{one.name}.ko:{''.join(f' {need}.ko' for need in reversed(_order(one.name, known, [])[:-1]))}\n"
        for one in modules
    )
    aliases = "".join(f"alias {alias} {one.name}\n" for one in modules for alias in one.aliases)
    program = open_file(str(busybox), "static busybox").data
    scripts = files("cardcage_boot")
    entries = [
        *(cpio.directory(name) for name in ("bin", "dev", "etc", "mnt", "proc", "run", "sbin", "sys")),
        cpio.directory("root", 0o700),
        cpio.directory("tmp", 0o1777),
        cpio.device("dev/console", 5, 1),
        cpio.device("dev/null", 1, 3, 0o666),
        cpio.file("bin/busybox", program, 0o755),
        *(cpio.symlink(f"bin/{name}", "busybox") for name in applets(busybox) if name != "busybox"),
        *(cpio.symlink(f"sbin/{name}", "/bin/busybox") for name in ("modprobe", "init")),
        cpio.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n"),
        cpio.file("etc/group", b"root:x:0:\n"),
        cpio.file("etc/profile", SHELL_PROFILE.encode()),
        cpio.file("init", scripts.joinpath(init).read_bytes(), 0o755),
        *(cpio.file(f"cardcage/programs/{name}", data, 0o755) for name, data in sorted((programs or {}).items())),
        cpio.file("cardcage/dhcp", scripts.joinpath("dhcp.sh").read_bytes(), 0o755),
        cpio.file("cardcage/drivers", driver_script(modules).encode()),
        *(cpio.file(f"{folder}/{one.name}.ko", one.data) for one in modules),
        cpio.file(f"{folder}/modules.dep", depends.encode()),
        cpio.file(f"{folder}/modules.alias", aliases.encode()),
    ]
    return cpio.pack(entries)
