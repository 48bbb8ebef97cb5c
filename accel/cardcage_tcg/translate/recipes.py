"""Recipes: the instructions that a run needed templates for, left to a process that has run no guest.

Templates are host code that all machines of an account run. So a process that has run a guest writes none of them where
others take them from: it leaves the guest's instructions, which are data, and who starts next makes the templates anew
before its own guest runs.
"""

from __future__ import annotations

import os
import stat
from struct import pack, unpack_from
from typing import TYPE_CHECKING

from cardcage_tcg import layout as L

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["Recipes", "entries_of", "mark_process"]

LONGEST = 15
"""Bytes of an instruction (Intel SDM vol. 2, 2.3.11)."""
MOST = 1 << 16
"""Instructions of a recipe: a guest may try all encodings there are."""
FILES = 8
"""Recipes that are followed; the others are dropped."""
KEYS = L.KEY_SINGLE << 1
"""Above all keys: a mode, and KEY_SINGLE."""

_ran = False


def mark_process() -> None:
    """This process runs a guest from now on."""
    global _ran
    _ran = True


class Recipes:
    """Recipes for one kind of store.

    Args:
        folder: where they are left, None for nowhere. name: the store's.
    """

    def __init__(self, folder: Path | None, name: str) -> None:
        self.folder, self.name = folder, name
        self._noted: list[bytes] = []

    def ready(self) -> Path | None:
        """The folder, made when it is missing; None where nothing is left."""
        if self.folder is None:
            return None
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            return None
        return self.folder

    @property
    def count(self) -> int:
        """Instructions that were noted."""
        return len(self._noted)

    def note(self, key: int, raw: bytes) -> None:
        """A template for *raw* in the mode of *key* was made."""
        if len(self._noted) < MOST:
            self._noted.append(pack("<IB", key, len(raw)) + raw)

    def forget(self) -> None:
        """Note nothing of what was noted so far: it is kept by other means."""
        self._noted.clear()

    def leave(self, least: int) -> None:
        """Write down what was noted, unless it is fewer than *least*; a failure costs only time later."""
        if len(self._noted) < least or self.ready() is None or self.folder is None:
            return
        import tempfile  # here, for start-up's sake

        try:
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".part-", delete=False) as file:
                file.write(b"".join(self._noted))
            os.rename(file.name, self.folder / f"{self.name}-{os.path.basename(file.name).removeprefix('.part-')}")
        except OSError:  # a full disk, say
            return

    def names(self) -> list[str]:
        """The recipes that there are; none in a process that has run a guest."""
        if self.folder is None or _ran:
            return []
        try:
            return sorted(one for one in os.listdir(self.folder) if one.startswith(f"{self.name}-"))
        except OSError:  # none was ever left
            return []

    def take(self) -> Iterator[tuple[int, bytes]]:
        """The instructions of all recipes there are, ``(key, bytes)``, of which none is there afterwards.

        Recipes are what another process says: each is checked.
        """
        for at, name in enumerate(self.names()):
            data = self.read(name)
            if at < FILES:
                yield from entries_of(data)

    def read(self, name: str) -> bytes:
        """A file's bytes, none where it is no file of ours; it is removed."""
        assert self.folder is not None
        path = self.folder / name
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                about = os.fstat(fd)
                ours = stat.S_ISREG(about.st_mode) and about.st_uid == os.geteuid()
                data = os.read(fd, MOST * (5 + LONGEST)) if ours else b""
            finally:
                os.close(fd)
            os.unlink(path)
        except OSError:  # another process took it
            return b""
        return data


def entries_of(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The instructions of a recipe, as far as it is one."""
    at = 0
    while at + 5 <= len(data):
        key, length = unpack_from("<IB", data, at)
        raw = data[at + 5 : at + 5 + length]
        bits = key & (L.MODE_64 | L.MODE_32)
        if key >= KEYS or bits == L.MODE_64 | L.MODE_32 or not 1 <= length <= LONGEST or len(raw) != length:
            return
        yield key, raw
        at += 5 + length
