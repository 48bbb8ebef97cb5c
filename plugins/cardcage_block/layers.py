"""An open image and those that it stands on, in the words of ``qemu-img info --output=json``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from cardcage_block.formats import shown
from cardcage_block.header import COMPAT_LAZY, INCOMPAT_CORRUPT, INCOMPAT_DIRTY

if TYPE_CHECKING:
    from cardcage_block.header import Header

__all__ = ["LayeredImage"]


class LayeredImage:
    """An image that tells of its chain (``cardcage_qmp.parts.Layered``)."""

    def layers(self) -> list[dict[str, Any]]:
        """Facts about the image, then about each that is below it. Raises OSError once it is closed."""
        found: list[dict[str, Any]] = []
        one: Any = self
        while isinstance(one, LayeredImage):
            found.append(_facts(one))
            one = vars(one).get("_backing")
        return found


def _facts(image: Any) -> dict[str, Any]:
    file, header, below = image._file, vars(image).get("_header"), vars(image).get("_backing")
    found: dict[str, Any] = {"filename": file.path, "format": "raw" if header is None else "qcow2"}
    found |= {"virtual-size": image.info.size, "actual-size": os.fstat(file.fd).st_blocks * 512, "dirty-flag": False}
    if header is None:
        return found
    found |= {"cluster-size": header.cluster_size, "dirty-flag": bool(header.incompatible & INCOMPAT_DIRTY)}
    found["format-specific"] = {"type": "qcow2", "data": _qcow2(header)}
    if isinstance(below, LayeredImage):
        full = vars(below)["_file"].path
        found |= {"backing-filename": shown(header.backing_file or full), "full-backing-filename": full}
        if header.backing_format:
            found["backing-filename-format"] = shown(header.backing_format)
    return found


def _qcow2(header: Header) -> dict[str, Any]:
    found: dict[str, Any] = {"compat": "0.10" if header.version < 3 else "1.1"}
    found |= {"compression-type": ("zlib", "zstd")[header.compression], "refcount-bits": 1 << header.refcount_order}
    if header.version >= 3:
        found["lazy-refcounts"] = bool(header.compatible & COMPAT_LAZY)
        found |= {"corrupt": bool(header.incompatible & INCOMPAT_CORRUPT), "extended-l2": False}
    return found
