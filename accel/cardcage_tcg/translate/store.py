"""Where templates are kept: native memory that ``assemble.c`` looks them up in, and a file between runs.

The file is written by processes that have run no guest (:mod:`cardcage_tcg.translate.recipes`).
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from pathlib import Path
from struct import pack_into, unpack_from
from typing import TYPE_CHECKING

import iced_x86

from cardcage_tcg import layout as L
from cardcage_tcg.library import Area
from cardcage_tcg.translate.emit import flags_load, flags_save
from cardcage_tcg.translate.recipes import Recipes

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["STORE_SIZE", "TemplateStore", "latest", "store_path"]

STORE_SIZE = 96 << 20
COUNT = 12
"""Offset of ``struct store``'s count."""
KEPT_STORES = 4


_latest: tuple[Path | None, bytes] = (None, b"")
"""The store of this process's last VM that made much, by its file: no other process runs it."""


def latest() -> tuple[Path | None, bytes]:
    """The store that a further VM of this process begins with, and the name of its file."""
    return _latest


class TemplateStore:
    """``struct store`` of one VM. It holds offsets only, so that a file of it can be taken at any address.

    Args:
        keep: a file to begin with and to keep the store in, or None.
    """

    def __init__(self, keep: Path | None = None) -> None:
        self.area = Area(STORE_SIZE)
        self._keep = keep
        if keep is None or not (self._take(keep) or self._load(keep)):
            self._fresh()
        self._count: int = unpack_from("<I", self.area.view, COUNT)[0]
        self.recipes = Recipes(None if keep is None else keep.parent / "wanted", "" if keep is None else keep.name)

    @property
    def used(self) -> int:
        """Bytes of the store in use."""
        found: int = unpack_from("<I", self.area.view, L.STORE_USED)[0]
        return found

    def _fresh(self) -> None:
        view = self.area.view
        pack_into("<IIII", view, 0, L.STORE_MAGIC, STORE_SIZE, L.SIZEOF_STORE + 7 & ~7, 0)
        for at, length, code in (
            (L.STORE_SAVE, L.STORE_SAVE_LENGTH, flags_save),
            (L.STORE_LOAD, L.STORE_LOAD_LENGTH, flags_load),
        ):
            view[at : at + len(code)] = code
            pack_into("<I", view, length, len(code))

    def _take(self, path: Path) -> bool:
        """Begin with what an earlier VM of this process had."""
        name, data = _latest
        if name != path:
            return False
        self.area.view[: len(data)] = data
        return True

    def _load(self, path: Path) -> bool:
        """Take a kept store. It is code that will run: only a file of ours that nobody else can write will do."""
        try:
            with path.open("rb") as file:
                about = os.fstat(file.fileno())
                if about.st_uid != os.geteuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                    return False
                data = file.read(STORE_SIZE + 1)
        except OSError:
            return False
        if len(data) < L.SIZEOF_STORE or len(data) > STORE_SIZE:
            return False
        digest, data = data[-32:], data[:-32]
        magic, size, used, _ = unpack_from("<IIII", data, 0)
        if magic != L.STORE_MAGIC or size != STORE_SIZE or used != len(data) or hashlib.sha256(data).digest() != digest:
            return False
        self.area.view[: len(data)] = data
        return True

    def save(self) -> None:
        """Keep the store for the next run; a failure to write costs only time later.

        For a process that has run no guest: what is kept is code that other machines run.
        """
        self.recipes.forget()
        if self._keep is None:
            return
        used = self.used
        data = bytes(self.area.view[:used])
        try:
            self._keep.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._keep.parent, delete=False) as file:
                try:
                    file.write(data + hashlib.sha256(data).digest())
                    file.flush()
                    os.replace(file.name, self._keep)
                except OSError:  # a full disk, say
                    os.unlink(file.name)
                    return
            self._prune(self._keep.parent)
        except OSError:
            return

    @staticmethod
    def _prune(directory: Path) -> None:
        """Each version of the translator has a file of its own: keep the newest few."""
        files = sorted(directory.glob("templates-*"), key=lambda one: one.stat().st_mtime, reverse=True)
        for old in files[KEPT_STORES:]:
            old.unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget all templates; the world is stopped."""
        self.area.view[: L.SIZEOF_STORE] = bytes(L.SIZEOF_STORE)
        self._fresh()

    def close(self) -> None:
        """Leave word of what it had not, when that is more than a tenth of it, and give its memory back."""
        least = max(100, self._count // 10)
        if self._keep is not None and self.recipes.count >= least:
            global _latest
            _latest = self._keep, bytes(self.area.view[: self.used])
        self.recipes.leave(least)
        self.area.close()


def _digest() -> str:
    """Return the name of a store: the translator's code, taken when it is loaded, and the decoder's version."""
    here = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for one in sorted(Path(iced_x86.__file__).parent.glob("*.so")):  # its version, without the cost of looking that up
        about = one.stat()
        digest.update(f"{one.name} {about.st_size} {about.st_mtime_ns}".encode())
    for one in sorted(here.rglob("*")):
        if one.suffix in (".py", ".so"):
            digest.update(one.read_bytes())
    return digest.hexdigest()[:24]


_DIGEST = _digest()


def store_path(directory: str, hidden: Iterable[int]) -> Path | None:
    """Where templates of exactly this translator are kept: below *directory*, or the user's cache (empty: nowhere)."""
    if directory == "none":
        return None
    cache = directory or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "cardcage", "tcg"
    )
    return Path(cache) / f"templates-{_DIGEST}-{'.'.join(str(one) for one in sorted(hidden))}"
