"""``Machine.debian()`` and ``Machine.host_root()``: machines that boot the distribution's kernel by our initramfs."""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cardcage.config import Draft
from cardcage.errors import ConfigError
from cardcage.host import Host

from cardcage_boot import GuestProgramOffer, cpio
from cardcage_boot.cache import cache_root
from cardcage_boot.command import COMMAND_LINE, given_kernel
from cardcage_boot.fetch import Shelf
from cardcage_boot.initramfs import programs_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cardcage.machine import Machine

    M = TypeVar("M", bound=Machine)

__all__ = ["debian", "host_root"]

ROOT = "cardcage-root"
"""The tag of the directory that is the root."""


def debian(
    cls: type[M],
    *,
    memory: int | str = "512M",
    kernel: str | os.PathLike[str] | None = None,
    append: str = "",
    root: str | os.PathLike[str] | None = None,
    share: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    devices: Iterable[Mapping[str, Any]] = (),
    fragments: Iterable[Mapping[str, Any]] = (),
    host: Host | None = None,
    **keys: Any,
) -> M:
    """A machine with the kernel of ``cardcage boot``: fetched once, from where this host's apt gets its packages.

    Its initramfs has busybox, drivers, and the programs that cards offer for it, with their devices; on its console is
    a shell. It is not started.

    Args:
        memory: bytes, or text such as ``"512M"``.
        kernel: one of your own in its place, a bzImage or vmlinux; its modules are those in ``lib/modules/RELEASE`` of
            the tree that it lies in (``boot/vmlinuz``), else of this host.
        root: a directory, a tar archive or an OCI image layout that is the guest's root, in place of an initramfs with
            busybox alone. A directory is shared read-only, an image lies in the guest's memory; what the guest changes
            is in its memory, and gone with it.
        share: a directory that the guest has at ``/mnt/share``, or directories by what they are called in ``/mnt``; in
            place of a path, a table of keys of ``virtio-fs``: ``{"src": {"path": "/src", "readonly": True}}``.
        append: text behind the kernel's command line. devices: tables, besides those of the guest's programs.
        fragments: configuration that is merged first.
        host: whose cards to use; by default a private one.
        keys: further arguments of :class:`~cardcage.machine.Machine`: ``name``, ``cpus``, ``accel``, ``machine``.

    Raises HostError where no kernel can be had (another distribution than Debian or Ubuntu, no network), ConfigError
    for a kernel that is none, and what Machine raises.
    """
    fragments = list(fragments)
    host = host or Host(security=Draft.of(*fragments).security())
    shelf = Shelf(cache_root(), _untold, host.log.warning)
    found = shelf.kernel() if kernel is None else given_kernel(os.fspath(kernel))
    if not found.release:
        raise ConfigError("not a Linux kernel: expected a bzImage or vmlinux", file=str(kernel))
    tables = [dict(one) for offer in host.registry.offers(GuestProgramOffer) for one in offer.devices]
    shares = _shares(share)
    settings: dict[str, str] = {}
    if shares or root is not None:
        settings = {"strict": "yes", "shares": " ".join(f"virtiofs:{one['tag']}" for one in shares)}
    with tempfile.TemporaryDirectory(prefix="cardcage-") as scratch:  # the files are read while the machine is made
        initrds = [shelf.initramfs(found, programs=programs_of(host.registry))]
        if root is not None:
            initrds += _root(Path(root), settings, shares, Path(scratch))
        if settings:
            text = "".join(f"{name}={shlex.quote(value)}\n" for name, value in settings.items())
            initrds.append(Path(scratch, "settings.cpio"))
            initrds[-1].write_bytes(cpio.pack([cpio.file("cardcage/settings", text.encode())]))
        boot = {"initrd": [str(one) for one in initrds], **keys.pop("boot", {})}
        return cls(
            kernel=found.path,
            append=" ".join(part for part in (COMMAND_LINE, "quiet", append) if part),
            memory=memory,
            devices=[*tables, *shares, *devices],
            boot=boot,
            fragments=fragments,
            host=host,
            **{"name": "debian", **keys},
        )


def host_root(cls: type[M], **keys: Any) -> M:
    """A machine whose root is this host's: its programs and files, read-only, under a layer in the guest's memory.

    The guest sees what this process may read. *keys* are those of :func:`debian`.
    """
    return debian(cls, **{"root": "/", "name": "host-root", **keys})


def _shares(share: str | os.PathLike[str] | Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Tables of the devices that share directories. Raises ConfigError for a name that init cannot mount."""
    if share is None:
        return []
    named = share if isinstance(share, Mapping) else {"share": share}
    tables = []
    for tag, value in named.items():
        if not re.fullmatch(r"\w[\w.-]{,35}", tag, re.ASCII) or tag == ROOT:  # ".." would be mounted over the root
            words = 'letters, digits, "_", "." and "-", at most 36, the first no "." or "-"'
            raise ConfigError(f'"{tag}": expected {words}', key="share")
        keys = dict(value) if isinstance(value, Mapping) else {"path": os.fspath(value)}
        if "tag" in keys:
            raise ConfigError("expected no tag: it is the name by which the directory is shared", key=f"share.{tag}")
        tables.append({"type": "virtio-fs", "tag": tag, **keys})
    return tables


def _root(root: Path, settings: dict[str, str], shares: list[dict[str, Any]], scratch: Path) -> list[Path]:
    """Say in *settings* what the root is, share a directory, and return what comes into the initramfs."""
    from cardcage_boot.roots import IMAGE, image, is_image  # which most machines do without, as without its archives

    if is_image(root):
        settings["root"] = f"/{IMAGE}"
        (scratch / "image.cpio").write_bytes(image(root))
        return [scratch / "image.cpio"]
    settings["root"] = f"virtiofs:{ROOT}"
    shares.append({"type": "virtio-fs", "tag": ROOT, "path": str(root), "readonly": True})
    return []


def _untold(what: str, percent: float) -> None:
    """No bar: a library draws none."""
