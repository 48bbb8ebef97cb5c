"""Card ``qemu``: QEMU's command line, as ``cardcage qemu -- ...`` and as the program ``cardcage-qemu``.

It becomes an ordinary configuration. What cardcage has not is refused by the option's name; docs/qemu.md says what
each option becomes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cardcage.hookspecs import hookimpl
from cardcage.lazy import lazy_names
from cardcage_qmp import HmpCommand, QmpCommand

if TYPE_CHECKING:
    from cardcage.registry import Registry

    from cardcage_qemu.line import Line, translate
    from cardcage_qemu.program import main

__all__ = ["Line", "main", "translate"]


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer the command ``qemu``, and QMP commands that take its words."""
    registry.command(
        "qemu",
        "cardcage_qemu.program:run",
        configure="cardcage_qemu.program:configure",
        help="run a machine described by QEMU's command line",
    )
    words = (
        "device_add netdev_add netdev_del blockdev-add blockdev-del chardev-add chardev-remove object-add object-del"
    )
    for name in words.split():
        registry.add(QmpCommand(name, f"cardcage_qemu.coming:{name.replace('-', '_')}"))
    for name in ("blockdev-create", "blockdev-snapshot", "blockdev-snapshot-sync", "block-commit", "transaction"):
        registry.add(QmpCommand(name, f"cardcage_qemu.layers:{name.replace('-', '_')}"))
    line = "snapshot_blkdev [-n] DEVICE FILE [FORMAT]"
    registry.add(HmpCommand("snapshot_blkdev", "cardcage_qemu.layers:hmp_snapshot_blkdev", help=line))
    registry.add(QmpCommand("query-command-line-options", "cardcage_qemu.listing:query_command_line_options"))


_names: Any = lazy_names("cardcage_qemu", line="Line translate", program="main")
__getattr__ = _names
