"""Files of the guest."""

from __future__ import annotations

import os
import stat
import struct
import time
from typing import TYPE_CHECKING

from attrs import frozen

from cardcage_agent.errors import AgentError, AgentTimeout
from cardcage_agent.frames import WINDOW, Verb
from cardcage_agent.process import LIMIT, REQUEST, guest_error, strings
from cardcage_agent.watching import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from cardcage_agent.link import Call, Link

    Name = str | os.PathLike[str]

__all__ = ["ENTRIES", "SILENCE", "FileInfo", "Files"]

SILENCE = 30.0
"""Seconds that a transfer may stand still unless the caller says otherwise."""
ENTRIES = 1_000_000
"""Names of one directory that are listed."""
DEPTH = 256
RECORD = struct.Struct("<IIIIqqQ")
APPEND, EXCLUSIVE, MODE = 1, 2, 4
LINK_ITSELF, DIRECTORY, PARENTS = 1, 1, 1


@frozen
class FileInfo:
    """A file as lstat(2) has it, or stat(2).

    Attributes:
        name: the last part of its path. mode: type and permission bits, as ``st_mode``.
        uid, gid, links, inode: numbers. size: bytes. modified: nanoseconds since 1970.
    """

    name: str
    mode: int
    uid: int
    gid: int
    links: int
    size: int
    modified: int
    inode: int

    @property
    def is_dir(self) -> bool:
        """It is a directory."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        """It is a regular file."""
        return stat.S_ISREG(self.mode)

    @property
    def is_symlink(self) -> bool:
        """It is a symbolic link."""
        return stat.S_ISLNK(self.mode)


class Files:
    """Reads, writes, lists and changes files of the guest, as root.

    Paths are the guest's, absolute or below ``/``. Raises OSErrors as the guest's kernel has them, such as
    FileNotFoundError with the machine's name before the path, and AgentTimeout when nothing came for *timeout* seconds.
    """

    def __init__(self, link: Link) -> None:
        self._link = link

    def read(self, path: Name, *, limit: int = LIMIT, timeout: float | None = SILENCE) -> bytes:
        """The contents. Raises AgentError for more than *limit* bytes."""
        found = bytearray()
        for piece in self.chunks(path, timeout=timeout):
            found += piece
            if len(found) > limit:
                raise AgentError(f"{self.name_of(path)}: more than {limit} bytes")
        return bytes(found)

    def read_text(self, path: Name, encoding: str = "utf-8", errors: str = "strict") -> str:
        """The contents as text."""
        return self.read(path).decode(encoding, errors)

    def chunks(self, path: Name, *, timeout: float | None = SILENCE) -> Iterator[bytes]:
        """The contents in pieces of up to 256 KiB, as they come."""
        yield from self._pieces(Verb.READ, path, timeout)

    def write(
        self,
        path: Name,
        data: bytes | str | Iterable[bytes],
        *,
        mode: int | None = None,
        append: bool = False,
        exclusive: bool = False,
        timeout: float | None = SILENCE,
    ) -> None:
        """Write a file, which is made or emptied first.

        Args:
            data: bytes, text (in UTF-8) or pieces of bytes.
            mode: permission bits that it has then; by default those that it has, 0o644 for a new one.
            append: behind what is there. exclusive: raise FileExistsError where one is there.
        """
        flags = append * APPEND | exclusive * EXCLUSIVE | (mode is not None) * MODE
        call = self._call(Verb.WRITE, strings(os.fspath(path)), flags, 0o644 if mode is None else mode)
        pieces = [data.encode() if isinstance(data, str) else data] if isinstance(data, bytes | str) else data
        try:
            for piece in pieces:
                left = memoryview(piece)
                while left and not call.over:
                    sent = self._link.send(call, left)
                    left = left[sent:]
                    if not sent:
                        self._wait(call, lambda: self._link.sendable(call) > 0, timeout)
            self._link.end(call)
            self._wait(call, lambda: call.over, timeout)
        finally:
            self._link.cancel(call)
        self._check(call, path)

    def list(self, path: Name, *, limit: int = ENTRIES, timeout: float | None = SILENCE) -> list[FileInfo]:
        """The entries of a directory, by name. Raises AgentError for more than *limit* entries."""
        found: dict[str, FileInfo] = {}
        kept = b""
        for piece in self._pieces(Verb.LIST, path, timeout):
            kept += piece
            at = 0
            while len(kept) - at >= RECORD.size + 2:
                end = at + RECORD.size + 2 + int.from_bytes(kept[at + RECORD.size : at + RECORD.size + 2], "little")
                if end > len(kept):
                    break
                name = os.fsdecode(kept[at + RECORD.size + 2 : end])
                if name in ("", ".", "..") or "/" in name or "\0" in name:
                    raise AgentError(f"{self.name_of(path)}: an entry {name!r}, which is no name")
                found[name] = FileInfo(name, *RECORD.unpack_from(kept, at))
                at = end
            kept = kept[at:]
            if len(found) > limit:
                raise AgentError(f"{self.name_of(path)}: more than {limit} entries")
        if kept:
            raise AgentError(f"{self.name_of(path)}: a list that ends inside an entry")
        return [found[name] for name in sorted(found)]

    def stat(self, path: Name, *, follow: bool = True, timeout: float | None = SILENCE) -> FileInfo:
        """The file at *path*, as stat(2); without *follow*, a symbolic link itself."""
        data = self._ask(Verb.STAT, path, timeout, flags=0 if follow else LINK_ITSELF)
        if len(data) != RECORD.size:
            raise AgentError(f"{self.name_of(path)}: an answer of {len(data)} bytes: expected {RECORD.size}")
        return FileInfo(os.path.basename(os.fspath(path).rstrip("/")), *RECORD.unpack(data))

    def exists(self, path: Name, *, timeout: float | None = SILENCE) -> bool:
        """True when there is something at *path*, a symbolic link to nothing aside."""
        try:
            self.stat(path, timeout=timeout)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def watch(self, path: Name, *, timeout: float | None = SILENCE) -> Watch:
        """Changes of a file, or of what is in a directory, from now on: an iterator of ``FileEvent``.

        It is inotify(7)'s: not of what is deeper, and 256 KiB of events that nobody takes are kept, then as many as the
        guest's kernel keeps.
        """
        call = self._call(Verb.WATCH, strings(os.fspath(path)))
        try:
            self._ask(Verb.PING, "", timeout)  # after whose answer it has begun
            if call.over:
                self._check(call, path)
        except BaseException:
            self._link.cancel(call)
            raise
        return Watch(self._link, call, self.name_of(path), lambda: self._check(call, path))

    def rename(self, source: Name, target: Name, *, timeout: float | None = SILENCE) -> None:
        """Rename, as rename(2): a file that was *target* is replaced."""
        self._ask(Verb.RENAME, source, timeout, strings(os.fspath(target)))

    def symlink(self, target: Name, path: Name, *, timeout: float | None = SILENCE) -> None:
        """Make *path* a symbolic link to *target*. Raises FileExistsError where something is there."""
        self._ask(Verb.SYMLINK, path, timeout, strings(os.fspath(target)))

    def readlink(self, path: Name, *, timeout: float | None = SILENCE) -> str:
        """The target of a symbolic link."""
        data = self._ask(Verb.READLINK, path, timeout)
        if not data or b"\0" in data:
            raise AgentError(f"{self.name_of(path)}: a link to {data!r}, which is no path")
        return os.fsdecode(data)

    def name_of(self, path: Name) -> str:
        """*path* with the machine's name before it, for errors."""
        return f"{self._link.machine}:{os.fspath(path)}"

    def mkdir(self, path: Name, *, mode: int = 0o755, parents: bool = False, timeout: float | None = SILENCE) -> None:
        """Make a directory; with *parents* those above it too, and one that is there is no error."""
        self._ask(Verb.MKDIR, path, timeout, flags=PARENTS if parents else 0, mode=mode)

    def remove(self, path: Name, *, recursive: bool = False, timeout: float | None = SILENCE) -> None:
        """Remove a file, or an empty directory; with *recursive* a directory with all that is below it."""
        self._remove(os.fspath(path), self.stat(path, follow=False, timeout=timeout), recursive, timeout, 0)

    def _remove(self, path: str, info: FileInfo, recursive: bool, timeout: float | None, depth: int) -> None:
        if info.is_dir and recursive:
            if depth == DEPTH:
                raise AgentError(f"{self.name_of(path)}: more than {DEPTH} levels of directories")
            for one in self.list(path, timeout=timeout):
                self._remove(f"{path}/{one.name}", one, recursive, timeout, depth + 1)
        self._ask(Verb.REMOVE, path, timeout, flags=DIRECTORY if info.is_dir else 0)

    # requests

    def _call(self, verb: Verb, names: bytes, flags: int = 0, mode: int = 0) -> Call:
        return self._link.call(
            verb, REQUEST.pack(flags, mode, 0) + names, (1,) if verb in (Verb.READ, Verb.LIST, Verb.WATCH) else ()
        )

    def _ask(
        self, verb: Verb, path: Name, timeout: float | None, more: bytes = b"", flags: int = 0, mode: int = 0
    ) -> bytes:
        """The answer to a request that is answered at once."""
        request = REQUEST.pack(flags, mode, 0) + strings(os.fspath(path)) + more
        error, data = self._link.answer(verb, request, timeout)
        if error:
            raise guest_error(error, self._link.machine, os.fspath(path))
        return data

    def _pieces(self, verb: Verb, path: Name, timeout: float | None) -> Iterator[bytes]:
        """The pieces of stream 1 of a request, until its result."""
        call = self._call(verb, strings(os.fspath(path)))
        inbox = call.inboxes[0]
        try:
            while True:
                over = call.over  # asked first: what came before it is there then
                if piece := self._link.receive(call, 1, WINDOW):
                    yield piece
                elif over:
                    break
                else:
                    self._wait(call, lambda: bool(inbox.kept), timeout)
        finally:
            self._link.cancel(call)
        self._check(call, path)

    def _wait(self, call: Call, what: Callable[[], bool], timeout: float | None) -> None:
        if not self._link.wait(call, what, None if timeout is None else time.monotonic() + timeout):
            raise AgentTimeout(f"{self._link.machine}: the agent has been silent for {timeout:g} s")

    def _check(self, call: Call, path: Name) -> None:
        """Raise what the result says."""
        if call.result is None:
            raise call.failure or AgentError(f"{self._link.machine}: no answer")
        if call.result[0]:
            raise guest_error(call.result[0], self._link.machine, os.fspath(path))
