"""Chains: a snapshot's RAM may be kept as what differs from that of another one, its parent, in the same directory.

File ``pages`` has a bit for each page of RAM, from the least significant on: one that is set says that the page is the
snapshot's own, even where it is zero; all else is as in the parent. The parent is named with the sum of its manifest,
so that another one in its place is found.
"""

from __future__ import annotations

import os
import re
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from cardcage.errors import ConfigError
from cardcage.ram import PAGE

from cardcage_snapshot.hostcalls import punch, write_whole
from cardcage_snapshot.manifest import MANIFEST, File, Parent, read
from cardcage_snapshot.places import Folder
from cardcage_snapshot.ram import damaged, digest, piece

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Self

    from cardcage_snapshot.manifest import Manifest
    from cardcage_snapshot.pages import Run
    from cardcage_snapshot.places import Publication

__all__ = ["DEEPEST", "PAGES", "Chain", "Changes", "children", "refuse_with_children"]

DEEPEST = 64
"""Snapshots of a chain, at most."""
PAGES = "pages"
MARKS = [bytes(byte >> bit & 1 for bit in range(8)) for byte in range(256)]


class Level:
    """One snapshot of a chain; its *folder* stays the caller's.

    Attributes:
        own: the bits of file ``pages``; empty for the root, whose pages are all its own. fd: of its RAM's file.
    """

    def __init__(self, folder: Folder, manifest: Manifest) -> None:
        self.folder, self.manifest, self.own, self.fd = folder, manifest, b"", -1
        self.ram, self.size = manifest.ram, manifest.memory
        self._pieces = {one[0]: one for one in self.ram.chunks}
        try:
            if self.ram.parent is not None:
                self.own = self._bits()
            self.fd = folder.open(self.ram.file)
        except BaseException:
            self.close()
            raise

    def _bits(self) -> bytes:
        assert self.ram.parent is not None
        wanted, where = self.ram.parent.pages, self.folder.where(PAGES)
        if wanted.size != (right := -(-self.size // (8 * PAGE))):
            raise ConfigError(f"{wanted.size} bytes of pages: expected {right}", file=self.folder.where(MANIFEST))
        data = self.folder.read(PAGES, wanted.size)
        if len(data) != wanted.size or digest(data) != wanted.sum:
            raise ConfigError("is damaged: its sum is not that of the manifest", file=where)
        return data

    def numbers(self) -> Iterator[int]:
        """The pieces of RAM that may be other than the parent's, or than zero in the root."""
        if self.ram.parent is None:
            yield from self._pieces
            return
        step = self.ram.chunk // PAGE // 8
        for at in range(0, len(self.own), step):
            if any(self.own[at : at + step]):
                yield at // step

    def piece(self, number: int) -> bytes:
        """The bytes of piece *number* in this snapshot's file, zeros where there are none."""
        found = self._pieces.get(number)
        if found is None:
            return bytes(min(self.ram.chunk, self.size - number * self.ram.chunk))
        return piece(self.fd, self.folder.where(self.ram.file), self.ram, self.size, found, sums=False)

    def runs(self, number: int) -> Iterator[Run]:
        """The snapshot's own pages in piece *number*: offset in it, and bytes."""
        step = self.ram.chunk // PAGE // 8
        marks = b"".join(MARKS[byte] for byte in self.own[number * step : (number + 1) * step])
        for one in re.finditer(rb"\x01+", marks[: -(-(self.size - number * self.ram.chunk) // PAGE)]):
            yield one.start() * PAGE, (one.end() - one.start()) * PAGE

    def put(self, view: memoryview) -> None:
        """Write the snapshot's own pages into *view*, which is of all RAM."""
        for number in self.numbers():
            base, packed = number * self.ram.chunk, self.ram.compression != "none"
            own = self.piece(number) if packed else b""
            for at, size in self.runs(number):
                target = view[base + at : base + at + size]
                if packed:
                    target[:] = own[at : at + size]
                elif os.preadv(self.fd, [target], base + at) != size:
                    raise ConfigError(f"ends before RAM at {base + at:#x}", file=self.folder.where(self.ram.file))

    def close(self) -> None:
        """Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Chain:
    """The RAM of a snapshot, through all that it is made on. *folder* and *manifest* are the snapshot's.

    Attributes:
        levels: the root first.

    Raises ConfigError for a parent that is missing, is another one, or does not fit.
    """

    def __init__(self, folder: Folder, manifest: Manifest) -> None:
        self.levels: list[Level] = []
        self._end = ExitStack()
        with ExitStack() as failing:
            failing.callback(self.close)
            self._climb(folder, manifest)
            failing.pop_all()

    def _climb(self, folder: Folder, manifest: Manifest) -> None:
        top = folder.path
        while True:
            self.levels.insert(0, level := Level(folder, manifest))
            self._end.callback(level.close)
            parent = manifest.ram.parent
            if parent is None:
                return
            if len(self.levels) == DEEPEST:
                raise ConfigError(f"more than {DEEPEST} snapshots are made one on another", file=str(top))
            child, path = folder.path.name, folder.path.with_name(parent.name)
            try:
                folder = self._end.enter_context(Folder(path))
                found, _ = read(folder)
            except ConfigError as error:
                raise ConfigError(f'{error.problem} (snapshot "{child}" is made on it)', file=error.file) from error
            if found.sum != parent.sum:
                raise ConfigError(f'is another snapshot than the one that "{child}" was made on', file=str(path))
            if (found.memory, found.ram.chunk) != (manifest.memory, manifest.ram.chunk):
                raise ConfigError(f'has memory of another size than "{child}", which is made on it', file=str(path))
            manifest = found

    def numbers(self) -> list[int]:
        """The pieces of RAM that may be other than zero."""
        return sorted({number for level in self.levels for number in level.numbers()})

    def piece(self, number: int) -> bytes:
        """The bytes of piece *number*. Raises ConfigError that names it where it is damaged."""
        data: bytes | bytearray = self.levels[0].piece(number)
        for level in self.levels[1:]:
            if runs := list(level.runs(number)):
                data, own = bytearray(data), level.piece(number)
                for at, size in runs:
                    data[at : at + size] = own[at : at + size]
        return bytes(data)

    def put_over(self, view: memoryview) -> None:
        """Make the RAM of this snapshot of the root's, which *view* shows."""
        for level in self.levels[1:]:
            level.put(view)

    def check(self) -> None:
        """Read all of it. Raises ConfigError that names the first damaged piece."""
        for level in self.levels:
            damaged(level.folder, level.ram, level.size)

    def close(self) -> None:
        """Idempotent."""
        self._end.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Changes:
    """The pages of RAM that are other than in a parent, whose RAM is *chain*, as its file is finished.

    Raises ConfigError where the chain has as many snapshots as it may.
    """

    def __init__(self, chain: Chain) -> None:
        if len(chain.levels) >= DEEPEST:
            what = f"cannot be the parent: it is the last of {len(chain.levels)} made one on another"
            raise ConfigError(what, file=str(chain.levels[-1].folder.path))
        self._chain, self._top = chain, chain.levels[-1]
        self._bits = bytearray(-(-self._top.size // (8 * PAGE)))

    @property
    def paths(self) -> list[Path]:
        """The snapshots that are read for it."""
        return [level.folder.path for level in self._chain.levels]

    def numbers(self) -> list[int]:
        """The pieces that are not zero in the parent."""
        return self._chain.numbers()

    def left(self, fd: int, number: int, data: bytes) -> bytes:
        """*data*, of piece *number* in file *fd*, with zeros where the parent has the same; so has the file then."""
        base, start = self._chain.piece(number), number * self._top.ram.chunk
        if data == base:
            clear(fd, start, len(data))
            return bytes(len(data))
        kept, marks = bytearray(data), bytearray(b"\1" * -(-len(data) // PAGE))
        for page, at in enumerate(range(0, len(data), PAGE)):
            if data[at : at + PAGE] == base[at : at + PAGE]:
                marks[page] = 0
                kept[at : at + PAGE] = bytes(len(data[at : at + PAGE]))
        for one in re.finditer(rb"\0+", marks):
            clear(fd, start + one.start() * PAGE, (one.end() - one.start()) * PAGE)
        for at in range(0, len(marks), 8):
            byte = sum(mark << bit for bit, mark in enumerate(marks[at : at + 8]))
            self._bits[(start // PAGE + at) // 8] = byte
        return bytes(kept)

    def written(self, into: Publication) -> Parent:
        """Write file ``pages``; how the manifest names the parent. Raises OSError."""
        bits = bytes(self._bits)
        into.write(PAGES, bits)
        return Parent(self._top.folder.path.name, self._top.manifest.sum, File(len(bits), digest(bits)))


def clear(fd: int, offset: int, size: int) -> None:
    """Make a range of a file zeros, and a hole where its file system has these. Raises OSError."""
    try:
        punch(fd, offset, size)
    except OSError:
        write_whole(fd, bytes(size), offset)


def children(path: Path) -> list[str]:
    """The names of snapshots that are made on the one at *path*."""
    found = []
    for other in path.parent.iterdir():
        if other.name.startswith(".") or not (other / MANIFEST).is_file():
            continue
        with suppress(ConfigError), Folder(other) as folder:  # a damaged one cannot be restored anyway
            parent = read(folder)[0].ram.parent
            if parent is not None and parent.name == path.name:
                found.append(other.name)
    return sorted(found)


def refuse_with_children(path: Path) -> None:
    """Raise ConfigError where snapshots are made on the one at *path*, which is to go."""
    if path.is_dir() and (found := children(path)):
        raise ConfigError(
            f"is needed: {', '.join(found)} {'are' if len(found) > 1 else 'is'} made on it", file=str(path)
        )
