"""Backing files: what an image's header calls them, and which of them its user allows.

A header may be hostile, and what it names is shown to the guest. So a backing file is a file of the image's own
folder, or one that the user's ``backing`` allows; links are followed first, and it is asked about, and opened, by its
real path.
How names are read is QEMU's (block.c: path_has_protocol, bdrv_get_full_backing_filename, parse_json_protocol).
"""

from __future__ import annotations

import json
import os
import re
import stat
from typing import TYPE_CHECKING, Any

from cardcage.errors import ConfigError
from cardcage.values import frozen

from cardcage_block.formats import shown

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Below", "Fence", "find_below"]

_PROTOCOL = re.compile(r"([^/:]*):(.*)", re.DOTALL)
_QUOTED = re.compile(r"""("(?:[^"\\]|\\.)*")|'((?:[^'\\]|\\.)*)'""", re.DOTALL)


@frozen
class Below:
    """A backing file as an image names it.

    Attributes:
        path: of the file, absolute or relative to the process's directory. format: ``None`` where nothing states it.
    """

    path: str
    format: str | None


def find_below(path: str, name: str, form: str | None = None) -> Below:
    """The backing file that the image at *path* calls *name*; *form* is its format by the image's header.

    A relative name belongs to the image's folder; behind ``file:`` and in ``json:`` to the process's directory, as in
    QEMU. Raises ConfigError for what is not a file.
    """
    found = _PROTOCOL.fullmatch(name)
    if found is None:
        return Below(os.path.join(os.path.dirname(path), name), form)
    protocol, rest = found.groups()
    if protocol == "file":
        return Below(re.sub(r"^///*", "/", rest), form)
    if protocol != "json":
        raise ConfigError(f'backing file "{shown(name)}": only files can back an image', file=path)
    try:
        below = _from_json(rest)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f'backing file "{shown(name)}": {error}', file=path) from error
    return Below(below.path, form or below.format)


def _from_json(text: str) -> Below:
    """QEMU's options of a block node: a format over a file. Raises ValueError."""
    # QEMU takes text in single quotes too.
    table = json.loads(_QUOTED.sub(lambda one: one[1] or '"' + one[2].replace('"', '\\"') + '"', text))
    flat = dict(_flat(table)) if isinstance(table, dict) else {}
    form, driver = flat.pop("driver", None), flat.pop("file.driver", "file")
    file = flat.pop("file.filename", None)
    if flat or driver not in ("file", "host_device") or not isinstance(form, str | None) or not isinstance(file, str):
        odd = f", and not {shown(', '.join(sorted(flat)))}" if flat else ""
        raise ValueError(f"only files can back an image: expected driver, file.driver and file.filename{odd}")
    if not file or "\0" in file:
        raise ValueError("not the name of a file")
    return Below(file, form)


def _flat(table: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


class Fence:
    """The files that may stand below one image.

    Args:
        file: the image that the user named.
        backing: ``folder`` (files of the image's own folder, hidden ones apart), ``none``, ``any``, or paths: these
            files, and all in these folders, beside the image's own folder.

    Raises ConfigError for a path that is not there.
    """

    def __init__(self, file: str, backing: str | tuple[str, ...] = "folder") -> None:
        self._any, self._none = backing == "any", backing == "none"
        paths = () if backing in ("any", "none", "folder") else (backing,) if isinstance(backing, str) else backing
        for path in paths:
            if not os.path.exists(path):
                raise ConfigError(f'backing = "{path}": expected folder, none, any, or a file or folder', file=file)
        self._given = [os.path.realpath(path) for path in paths]
        real = os.path.realpath(file)
        self._own: set[str] = set()
        try:
            if stat.S_ISREG(os.stat(real).st_mode):  # the folder of a device has everything
                self._own = {os.path.dirname(real), os.path.realpath(os.path.dirname(file))}
        except (OSError, ValueError):  # whoever opens it says so
            pass

    def admit(self, image: str, path: str) -> str:
        """The real path of *path*, which *image* names as its backing file. Raises ConfigError when it is outside."""
        try:
            real = os.path.realpath(path)
        except OSError as error:  # links of /proc that this process may not read
            raise ConfigError(f"its backing file {shown(path)}: {error.strerror}", file=image) from error
        if self._any or (not self._none and self._covers(real)):
            return real
        what = f"its backing file {shown(path)}"
        if real != os.path.abspath(path):
            what += f" (in truth {shown(real)})"
        if self._none:
            raise ConfigError(f'{what} is not opened: backing = "none" allows no backing file', file=image)
        raise ConfigError(
            f"{what} is not opened: it is not in the image's own folder, or is hidden there. If you trust the image, "
            "allow that file, or a folder that holds it, by backing=PATH (cardcage image: --allow-backing PATH)",
            file=image,
        )

    def _covers(self, real: str) -> bool:
        folder, name = os.path.split(real)
        if folder in self._own and not name.startswith("."):
            return True
        return any(real == one or real.startswith(one.rstrip("/") + "/") for one in self._given)
