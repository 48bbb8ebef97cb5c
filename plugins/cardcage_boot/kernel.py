"""``cardcage kernel``: the distribution's kernel, and an initramfs that mounts ``root=``, as files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cardcage.errors import ConfigError

from cardcage_boot.cache import cache_root, publish_file
from cardcage_boot.fetch import Shelf
from cardcage_boot.report import Report

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from cardcage.host import Host

__all__ = ["configure", "run"]


def configure(parser: ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("folder", metavar="DIR", nargs="?", default=".", help="where to write them; by default here")
    parser.add_argument("--force", action="store_true", help="overwrite other files of these names")
    parser.add_argument("--refresh", action="store_true", help="look for a newer kernel than the one in the cache")


def run(host: Host, arguments: Namespace) -> int:
    """Write ``vmlinuz`` and ``initrd.img``. Raises ConfigError where other files have these names, or HostError."""
    report = Report()
    try:
        shelf = Shelf(cache_root(), report.progress, report.say)
        kernel = shelf.kernel(refresh=arguments.refresh)
        made = {"vmlinuz": kernel.path.read_bytes(), "initrd.img": shelf.initramfs(kernel, "root.sh").read_bytes()}
    finally:
        report.close()
    folder = Path(arguments.folder)
    for name, data in made.items():
        path = folder / name
        if path.is_dir():
            raise ConfigError("is a directory: expected a file, or nothing", file=str(path))
        if path.exists() and not arguments.force and path.read_bytes() != data:
            raise ConfigError("there is another file of this name: give --force to overwrite it", file=str(path))
    for name, data in made.items():
        publish_file(folder / name, data, "")
        (folder / name).chmod(0o644)
    print(f"{folder / 'vmlinuz'}, {folder / 'initrd.img'}: {kernel.release}, {kernel.source}", file=sys.stderr)
    return 0
