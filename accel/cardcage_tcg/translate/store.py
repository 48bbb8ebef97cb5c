"""Where templates are kept: native memory that ``assemble.c`` looks them up in, and a file between runs.

The file is written by processes that have run no guest (:mod:`cardcage_tcg.translate.recipes`), and always whole: a new
one takes its place. So a process verifies a file once, and maps it, copied on write, for each VM that begins with it.
"""

from __future__ import annotations

import mmap
import os
import stat
import threading
import zlib
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from struct import pack, pack_into, unpack_from
from typing import TYPE_CHECKING, NamedTuple

from cardcage_tcg import layout as L
from cardcage_tcg.library import Area
from cardcage_tcg.native.build import hash_of
from cardcage_tcg.translate.recipes import Recipes

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["STORE_SIZE", "TemplateStore", "latest", "store_path"]

STORE_SIZE = 96 << 20
COUNT = 12
"""Offset of ``struct store``'s count."""
KEPT_STORES = 4


class Beginning(NamedTuple):
    """A verified store that VMs of this process begin with.

    Attributes:
        fd, size: a file that begins with a store of this size.
        about: what :func:`_about` said of a kept store; None for what a VM of this process left, which it alone has.
    """

    fd: int
    size: int
    about: tuple[int, ...] | None


_beginnings: dict[Path, Beginning] = {}
_lock = threading.Lock()


def latest(path: Path) -> bytes:
    """The store that a further VM of this process begins with, and that would be kept at *path*."""
    with _lock:
        found = _beginnings.get(path)
        return b"" if found is None else os.pread(found.fd, found.size, 0)


def _begin(area: Area, path: Path) -> bool:
    """Map what is there for *path* into *area*; False when nothing is, or nothing that can be trusted."""
    with _lock:
        found = _beginnings.get(path)
        if found is None or (found.about is not None and found.about != _about(path)):
            found = _verified(path)
            _remember(path, found)
        if found is not None:
            area.begin_with(found.fd, found.size)
        return found is not None


def _remember(path: Path, what: Beginning | None) -> None:
    """*what* is the beginning for *path* from now on. Few are kept: each CPU model has one."""
    old = [_beginnings.pop(path)] if path in _beginnings else []
    if what is not None:
        _beginnings[path] = what
    while len(_beginnings) > KEPT_STORES:
        old.append(_beginnings.pop(next(iter(_beginnings))))
    for one in old:
        os.close(one.fd)


def _about(file: Path | int) -> tuple[int, ...] | None:
    """Facts that are others when a file was replaced or written; None for one that is not there."""
    try:
        about = os.stat(file)
    except OSError:
        return None
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns


def _verified(path: Path) -> Beginning | None:
    """A kept store. It is code that will run: only a file of ours that nobody else can write will do."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    about, owner, size = _about(fd), os.fstat(fd), 0
    if owner.st_uid == os.geteuid() and not owner.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        with suppress(OSError, ValueError), mmap.mmap(fd, 0, prot=mmap.PROT_READ) as data, memoryview(data) as view:
            size = _whole(view)
    if not size:
        os.close(fd)
        return None
    return Beginning(fd, size, about)


def _whole(data: memoryview) -> int:
    """The size of the store in a file's bytes, 0 when they are none, or not all of one."""
    size = len(data) - 4
    if not L.SIZEOF_STORE <= size <= STORE_SIZE:
        return 0
    magic, room, used, _ = unpack_from("<IIII", data, 0)
    if magic != L.STORE_MAGIC or room != STORE_SIZE or used != size:
        return 0
    return size if data[size:] == pack("<I", zlib.crc32(data[:size])) else 0


class TemplateStore:
    """``struct store`` of one VM. It holds offsets only, so that a file of it can be taken at any address.

    Args:
        keep: a file to begin with and to keep the store in, or None.
    """

    def __init__(self, keep: Path | None = None) -> None:
        self.area = Area(STORE_SIZE)
        self._keep = keep
        if keep is None or not _begin(self.area, keep):
            self._fresh()
        self._count: int = unpack_from("<I", self.area.view, COUNT)[0]
        self.recipes = Recipes(None if keep is None else keep.parent / "wanted", "" if keep is None else keep.name)

    @property
    def is_new(self) -> bool:
        """True if it began without templates."""
        return not self._count

    @property
    def used(self) -> int:
        """Bytes of the store in use."""
        found: int = unpack_from("<I", self.area.view, L.STORE_USED)[0]
        return found

    def _fresh(self) -> None:
        from cardcage_tcg.translate.emit import flags_load, flags_save  # loads the decoder, which a kept store spares

        view = self.area.view
        pack_into("<IIII", view, 0, L.STORE_MAGIC, STORE_SIZE, -(-L.SIZEOF_STORE // L.T_ALIGN) * L.T_ALIGN, 0)
        for at, length, code in (
            (L.STORE_SAVE, L.STORE_SAVE_LENGTH, flags_save),
            (L.STORE_LOAD, L.STORE_LOAD_LENGTH, flags_load),
        ):
            view[at : at + len(code)] = code
            pack_into("<I", view, length, len(code))

    def save(self) -> None:
        """Keep the store for the next run; a failure to write costs only time later.

        For a process that has run no guest: what is kept is code that other machines run.
        """
        self.recipes.forget()
        if self._keep is None:
            return
        import tempfile  # here, for start-up's sake

        used = self.used
        data = bytes(self.area.view[:used])
        try:
            self._keep.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._keep.parent, delete=False) as file:
                try:
                    file.write(data + pack("<I", zlib.crc32(data)))
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
            self._pass_on(self._keep)
        self.recipes.leave(least)
        self.area.close()

    def _pass_on(self, path: Path) -> None:
        """Let further VMs of this process begin with this; no other process runs it."""
        fd = os.memfd_create("cardcage-templates", os.MFD_CLOEXEC)
        try:
            with open(fd, "wb", closefd=False) as file:
                file.write(self.area.view[: self.used])
        except OSError:  # no memory: they make what they need again
            os.close(fd)
            return
        with _lock:
            _remember(path, Beginning(fd, self.used, None))


def _digest() -> str:
    """Return the name of a store: the translator's code, taken when it is loaded, and the decoder's version."""
    decoder = find_spec("iced_x86")
    if decoder is None or decoder.origin is None:
        raise ImportError("cardcage_tcg needs iced_x86")
    with os.scandir(os.path.dirname(decoder.origin)) as entries:  # its version, without the cost of looking that up
        files = sorted((one.name, one.stat()) for one in entries if one.name.endswith(".so"))
    version = " ".join(f"{name} {about.st_size} {about.st_mtime_ns}" for name, about in files)
    return hash_of(str(Path(__file__).parents[1]), (".py", ".so"), version)[:24]


_DIGEST = _digest()


def store_path(directory: str, lacking: Iterable[str]) -> Path | None:
    """Where templates of exactly this translator are kept: below *directory*, or the user's cache (empty: nowhere)."""
    if directory == "none":
        return None
    cache = directory or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "cardcage", "tcg"
    )
    return Path(cache) / f"templates-{_DIGEST}-{'.'.join(sorted(lacking))}"
