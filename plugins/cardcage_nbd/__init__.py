"""Card ``nbd``: disks of NBD servers, ``nbd://HOST:PORT/EXPORT`` and ``nbd+unix:///EXPORT?socket=PATH``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.hookspecs import hookimpl

if TYPE_CHECKING:
    from cardcage.registry import Registry


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer the back ends ``block:nbd`` and ``block:nbd+unix``, one for each form of the URI."""
    for name, parse in (("nbd", "parse_tcp"), ("nbd+unix", "parse_unix")):
        registry.backend(
            "block",
            name,
            "cardcage_nbd.disk:open_nbd",
            options="cardcage_nbd.disk:NbdOptions",
            shorthand=f"cardcage_nbd.disk:{parse}",
            help="a disk of an NBD server, by TCP or a Unix socket",
        )
