"""``Machine.image()``: a machine that boots a disk image by a BIOS, such as a distribution's cloud image."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from cardcage.errors import HostError
from cardcage_boot.firmware import find_bios

if TYPE_CHECKING:
    from cardcage.host import Host
    from cardcage.machine import Machine

    M = TypeVar("M", bound=Machine)

__all__ = ["image"]

QGA = {
    "type": "virtio-console",
    "id": "qga",
    "char": "null",
    "ports": [{"name": "org.qemu.guest_agent.0", "char": "qemu-agent"}],
}
"""The port that the package qemu-guest-agent looks for."""


def image(
    cls: type[M],
    image: str | os.PathLike[str] | Mapping[str, Any],
    *,
    memory: int | str = "1G",
    write: bool = False,
    ssh_key: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] = (),
    user_data: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    firmware: str | os.PathLike[str] | None = None,
    devices: Iterable[Mapping[str, Any]] = (),
    fragments: Iterable[Mapping[str, Any]] = (),
    host: Host | None = None,
    **keys: Any,
) -> M:
    """A machine that boots a disk image by SeaBIOS, with a seed for cloud-init and ports for the agents.

    An image with cloud-init is given the programs that cards offer for guests, such as the agent, by its seed at each
    boot; one with qemu-guest-agent answers to ``vm.qga``. It is not started.

    Args:
        image: the path of a raw or qcow2 image, or a table of keys of a drive: ``{"file": path, "backing": "any"}``.
        memory: bytes, or text such as ``"512M"``.
        write: let the guest write the image. By default it is only read, and what the guest writes ends with it.
        ssh_key: a file of public keys, or several, which the image's own user lets in.
        user_data: for cloud-init: text that begins with ``#cloud-config`` or ``#!``; a table, as a cloud-config; or the
            :class:`~pathlib.Path` of a file of user data, or of a directory with ``user-data`` and, if there are any,
            ``meta-data``, ``vendor-data`` and ``network-config``.
        firmware: a ROM in place of SeaBIOS.
        devices: tables, such as ``{"type": "virtio-net", "net": "user"}``: there is no network without one.
        fragments: configuration that is merged first. host: whose cards to use; by default a private one.
        keys: further arguments of :class:`~cardcage.machine.Machine`: ``name``, ``cpus``, ``accel``, ``machine``.

    Raises HostError where this host has no SeaBIOS, ConfigError for an image, a key or user data that are none, and
    what Machine raises.
    """
    rom = os.fspath(firmware) if firmware is not None else find_bios()
    if not rom:
        raise HostError("no SeaBIOS is installed here (Debian: seabios): install it, or give firmware=")
    drive = dict(image) if isinstance(image, Mapping) else {"file": os.fspath(image)}
    if not write:
        drive = {"type": "temporary", **drive}
    paths = [ssh_key] if isinstance(ssh_key, str | os.PathLike) else ssh_key
    seed: dict[str, Any] = {"ssh_keys": [os.fspath(one) for one in paths], "programs": True}
    if isinstance(user_data, Mapping):
        seed["user_data"] = f"#cloud-config\n{json.dumps(dict(user_data))}\n"  # which is YAML
    elif isinstance(user_data, str):
        seed["user_data"] = user_data
    elif user_data is not None:
        seed["source"] = os.fspath(user_data)
    return cls(
        memory=memory,
        devices=[{"type": "virtio-blk", "drive": drive}, QGA, *devices],
        boot={"firmware": rom, **keys.pop("boot", {})},
        fragments=[*fragments, {"policy": {"cloud_init": seed}}],
        host=host,
        **{"name": "image", **keys},
    )
