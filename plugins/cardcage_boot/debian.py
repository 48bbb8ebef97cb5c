"""``Machine.debian()``: a machine that boots the distribution's kernel to an initramfs of ours."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, TypeVar

from cardcage.config import Draft
from cardcage.errors import ConfigError
from cardcage.host import Host

from cardcage_boot import GuestProgramOffer
from cardcage_boot.cache import cache_root
from cardcage_boot.command import COMMAND_LINE, given_kernel
from cardcage_boot.fetch import Shelf
from cardcage_boot.initramfs import programs_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from cardcage.machine import Machine

    M = TypeVar("M", bound=Machine)

__all__ = ["debian"]


def debian(
    cls: type[M],
    *,
    memory: int | str = "512M",
    kernel: str | os.PathLike[str] | None = None,
    append: str = "",
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
    return cls(
        kernel=found.path,
        initrd=shelf.initramfs(found, programs=programs_of(host.registry)),
        append=" ".join(part for part in (COMMAND_LINE, "quiet", append) if part),
        memory=memory,
        devices=[*tables, *devices],
        fragments=fragments,
        host=host,
        **{"name": "debian", **keys},
    )


def _untold(what: str, percent: float) -> None:
    """No bar: a library draws none."""
