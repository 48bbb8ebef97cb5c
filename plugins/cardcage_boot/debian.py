"""``Machine.debian()``: a machine that boots the distribution's kernel to an initramfs of ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from cardcage.config import Draft
from cardcage.host import Host

from cardcage_boot import GuestProgramOffer
from cardcage_boot.cache import cache_root
from cardcage_boot.command import COMMAND_LINE
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
        append: text behind the kernel's command line. devices: tables, besides those of the guest's programs.
        fragments: configuration that is merged first.
        host: whose cards to use; by default a private one.
        keys: further arguments of :class:`~cardcage.machine.Machine`: ``name``, ``cpus``, ``accel``, ``machine``.

    Raises HostError where no kernel can be had (another distribution than Debian or Ubuntu, no network), and what
    Machine raises.
    """
    fragments = list(fragments)
    host = host or Host(security=Draft.of(*fragments).security())
    shelf = Shelf(cache_root(), _untold, host.log.warning)
    kernel = shelf.kernel()
    tables = [dict(one) for offer in host.registry.offers(GuestProgramOffer) for one in offer.devices]
    return cls(
        kernel=kernel.path,
        initrd=shelf.initramfs(kernel, programs=programs_of(host.registry)),
        append=" ".join(part for part in (COMMAND_LINE, "quiet", append) if part),
        memory=memory,
        devices=[*tables, *devices],
        fragments=fragments,
        host=host,
        **{"name": "debian", **keys},
    )


def _untold(what: str, percent: float) -> None:
    """No bar: a library draws none."""
