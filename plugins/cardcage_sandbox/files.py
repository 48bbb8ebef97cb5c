"""Files of a sandbox."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from attrs import frozen

from cardcage_sandbox.talk import Talk, act

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Self

    from cardcage_fleet.roster import RosterEntry

__all__ = ["Change", "Entry", "Files", "Watch"]

PIECE = 1 << 16
LIMIT = 256 << 20
"""Bytes of a file that are read at once."""


@frozen
class Entry:
    """A file, as lstat(2) has it.

    Attributes:
        name: the last part of its path. path: absolute. type: ``file``, ``dir``, ``symlink`` or ``other``.
        size: bytes. mode: permission bits; permissions: the same as ls(1) writes them. owner, group: names.
        modified: nanoseconds since 1970. target: of a symbolic link.
    """

    name: str
    path: str
    type: str
    size: int
    mode: int
    permissions: str
    owner: str
    group: str
    modified: int
    target: str | None = None


@frozen
class Change:
    """A change in a directory: ``kind`` is inotify(7)'s name of it, in lower case; ``name`` that of the file."""

    name: str
    kind: str
    is_dir: bool


class Watch:
    """Changes of a directory as they come, an iterator. Close it, or use it in a ``with``."""

    def __init__(self, talk: Talk) -> None:
        self.talk = talk
        self._lines = self._read()

    @staticmethod
    def parsed(data: bytes) -> Iterator[Change]:
        """The changes in a frame."""
        for line in data.splitlines():
            yield Change(**json.loads(line))

    def _read(self) -> Iterator[Change]:
        for frame in self.talk.frames():
            yield from self.parsed(frame.data)

    def close(self) -> None:
        """Watch no more."""
        self.talk.hang_up()
        self.talk.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Change:
        return next(self._lines)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Files:
    """Files of a sandbox: relative paths lie in its user's home, and what is made is the user's.

    They are read and written by the guest's root. Raises OSErrors as the guest's kernel has them.
    """

    def __init__(self, entry: RosterEntry, name: str, user: str) -> None:
        self._entry, self._name, self._user = entry, name, user

    def _act(
        self, do: str, path: str, user: str | None, data: Iterable[bytes] | None = None, **keys: Any
    ) -> tuple[bytes, Any]:
        return act(self._entry, self._name, do, data, path=path, user=user or self._user, **keys)

    def read(self, path: str, *, user: str | None = None) -> bytes:
        """The contents, up to 256 MiB."""
        found = bytearray()
        for piece in self.chunks(path, user=user):
            found += piece
            if len(found) > LIMIT:
                raise OSError(f"{self._name}:{path}: more than {LIMIT} bytes")
        return bytes(found)

    def read_text(self, path: str, *, user: str | None = None) -> str:
        """The contents as UTF-8."""
        return self.read(path, user=user).decode()

    def chunks(self, path: str, *, user: str | None = None) -> Iterator[bytes]:
        """The contents in pieces of up to 64 KiB, as they come."""
        with Talk(self._entry, self._name, "read", path=path, user=user or self._user) as talk:
            for frame in talk.frames():
                yield frame.data

    def write(self, path: str, data: str | bytes | Iterable[bytes], *, user: str | None = None) -> Entry:
        """Write a file: text in UTF-8, bytes or pieces of bytes. Directories above it are made."""
        given: Iterable[bytes] = (
            [data.encode() if isinstance(data, str) else data] if isinstance(data, str | bytes) else data
        )
        pieces = (one[at : at + PIECE] for one in given for at in range(0, len(one), PIECE))
        return Entry(**self._act("write", path, user, pieces)[1]["entry"])

    def writing(self, path: str, *, user: str | None = None) -> Talk:
        """A file to write piece by piece, whose table at the end has its ``entry``."""
        return Talk(self._entry, self._name, "write", path=path, user=user or self._user)

    def list(self, path: str = "", *, depth: int = 1, user: str | None = None) -> list[Entry]:
        """The entries of a directory, by name, and of those in it down to *depth*; 10,000 at most."""
        lines, _ = self._act("list", path or ".", user, depth=depth)
        return [Entry(**json.loads(line)) for line in lines.splitlines()]

    def stat(self, path: str, *, user: str | None = None) -> Entry:
        """The file at *path*; a symbolic link itself."""
        return Entry(**self._act("stat", path, user)[1]["entry"])

    def exists(self, path: str, *, user: str | None = None) -> bool:
        """True when something is at *path*."""
        try:
            self.stat(path, user=user)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def make_dir(self, path: str, *, user: str | None = None) -> bool:
        """Make a directory, and those above it; False where it is there."""
        try:
            self._act("mkdir", path, user)
        except FileExistsError:
            return False
        return True

    def rename(self, path: str, to: str, *, user: str | None = None) -> Entry:
        """Rename, as rename(2): a file that was *to* is replaced."""
        return Entry(**self._act("rename", path, user, to=to)[1]["entry"])

    def remove(self, path: str, *, user: str | None = None) -> None:
        """Remove a file, or a directory with all that is below it."""
        self._act("remove", path, user)

    def watch(self, path: str, *, user: str | None = None) -> Watch:
        """Changes in a directory, not of what is deeper, from now on: an iterator of :class:`Change`."""
        talk = Talk(self._entry, self._name, "watch", path=path, user=user or self._user)
        try:
            talk.began()
        except BaseException:
            talk.close()
            raise
        return Watch(talk)
