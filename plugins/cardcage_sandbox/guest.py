"""A sandbox's own end: the session ``sandbox`` in its machine's process, for one act each.

Behind the answer to the request, the caller sends one frame with a table of JSON, which says what to ``do``. Streams of
frames: 0 towards the guest, 1 and 2 from it (output and errors, contents, lines of JSON), 3 for what has begun. The
last frame tells a table; one with ``errno`` is an OSError of the guest's kernel.
"""

from __future__ import annotations

import errno
import json
import posixpath
import stat
from functools import cached_property
from subprocess import TimeoutExpired
from typing import TYPE_CHECKING, Any

from attrs import frozen
from cardcage.errors import HostError, UsageError
from cardcage_fleet.session import Kind
from cardcage_verbs.machine import only

from cardcage_sandbox.processes import processes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cardcage.machine import Machine
    from cardcage_agent import FileInfo, Files
    from cardcage_fleet.session import Session

__all__ = ["Guest", "serve"]

ENTRIES = 10_000
"""Entries of a listing."""
ACCOUNTS = 1 << 20
"""Bytes of ``/etc/passwd`` that are read."""
KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "dir", stat.S_IFLNK: "symlink"}


@frozen
class Account:
    """A user of the guest: a line of passwd(5)."""

    name: str
    uid: int
    gid: int
    home: str


class Guest:
    """Files of the guest as one of its users sees them: relative paths lie in their home, and what is new is theirs.

    They are read and written by the guest's root all the same.
    """

    def __init__(self, machine: Machine, user: str) -> None:
        found: Any = machine
        self._machine, self.files = found, self._files(found)
        self._accounts = self._read("/etc/passwd")
        number = user if user.isdigit() else ""
        accounts = [
            Account(row[0], int(row[2]), int(row[3]), row[5])
            for row in self._accounts
            if len(row) > 5 and row[2].isdigit() and row[3].isdigit() and user in (row[0], row[2])
        ]
        if not accounts and not number:
            raise UsageError(f'{machine.name}: the guest has no user "{user}"')
        self.account = accounts[0] if accounts else Account(number, int(number), int(number), "/")

    @cached_property
    def _groups(self) -> list[list[str]]:
        return self._read("/etc/group")

    @staticmethod
    def _files(machine: Any) -> Files:
        files: Files = machine.files
        return files

    def _read(self, path: str) -> list[list[str]]:
        try:
            text = self.files.read(path, limit=ACCOUNTS).decode(errors="replace")
        except FileNotFoundError:
            return []
        return [line.split(":") for line in text.splitlines()]

    def path(self, given: str) -> str:
        """An absolute path."""
        if not given or "\0" in given:
            raise UsageError(f"path: {given!r:.60}: expected a path in the guest")
        home = self.account.home or "/"
        if given == "~" or given.startswith("~/"):
            given = f"{home}/{given[2:]}"
        return posixpath.normpath(posixpath.join(home, given))

    def environment(self, given: dict[str, str]) -> dict[str, str]:
        """The variables of a command, with those that a login would have."""
        who = self.account
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return {"PATH": path, "HOME": who.home or "/", "USER": who.name, "LOGNAME": who.name, **given}

    def entry(self, path: str, info: FileInfo | None = None) -> dict[str, Any]:
        """Facts of a file."""
        info = self.files.stat(path, follow=False) if info is None else info
        told = {
            "name": posixpath.basename(path),
            "path": path,
            "type": KINDS.get(stat.S_IFMT(info.mode), "other"),
            "size": info.size,
            "mode": info.mode & 0o7777,
            "permissions": stat.filemode(info.mode),
            "owner": self._named(self._accounts, info.uid),
            "group": self._named(self._groups, info.gid),
            "modified": info.modified,
        }
        if info.is_symlink:
            told["target"] = self.files.readlink(path)
        return told

    def _named(self, rows: list[list[str]], number: int) -> str:
        return next((row[0] for row in rows if len(row) > 2 and row[2] == str(number)), str(number))

    def walk(self, path: str, depth: int) -> Iterator[dict[str, Any]]:
        """The entries below a directory, by name. Raises UsageError for more than :data:`ENTRIES`."""
        left = ENTRIES
        waiting = [(path, 1)]
        while waiting:
            folder, at = waiting.pop(0)
            for info in self.files.list(folder, limit=ENTRIES):
                left -= 1
                if left < 0:
                    raise UsageError(f"{path}: more than {ENTRIES} entries")
                where = posixpath.join(folder, info.name)
                yield self.entry(where, info)
                if info.is_dir and at < depth:
                    waiting.append((where, at + 1))

    def mkdir(self, path: str) -> None:
        """Make a directory and those above it. Raises FileExistsError."""
        missing, at = [path], posixpath.dirname(path)
        while at not in ("/", "") and not self.files.exists(at):
            missing.append(at)
            at = posixpath.dirname(at)
        if self.files.exists(path):
            raise FileExistsError(errno.EEXIST, "File exists", path)
        self.files.mkdir(path, parents=True)
        self._own(missing)

    def write(self, path: str, pieces: Iterator[bytes]) -> None:
        """Write a file, which is made where it is not there, with the directories above it."""
        new = not self.files.exists(path)
        if new and not self.files.exists(folder := posixpath.dirname(path)):
            self.mkdir(folder)
        self.files.write(path, pieces)
        if new:
            self._own([path])

    def _own(self, paths: list[str]) -> None:
        """Give what root made to the user."""
        if self.account.uid:
            who = f"{self.account.uid}:{self.account.gid}"
            done = self._machine.run(["chown", "-h", who, "--", *paths], timeout=30, limit=1 << 16)
            if done.returncode:
                raise UsageError(f"{paths[0]}: {done.stderr.decode(errors='replace').strip()[:200]}")


def serve(machine: Machine, arguments: dict[str, Any], session: Session) -> dict[str, Any]:
    """One act. What an act of the guest's kernel was refused with is told as its ``errno``."""
    only(arguments)
    session.begin()
    frame = session.receive()
    try:
        request = json.loads(frame.data) if frame is not None and frame.kind is Kind.DATA else None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"expected a table of JSON: {error}") from error
    if not isinstance(request, dict) or request.get("do") not in ACTS:
        raise UsageError(f"do: expected one of {', '.join(ACTS)}")
    do = request.pop("do")
    kinds, act = ACTS[do]
    only(request, **kinds)
    if missing := [one for one in ("path", "to", "command", "pid") if one in kinds and one not in request]:
        raise UsageError(f"{do}: expected {missing[0]}")
    try:
        found: dict[str, Any] = act(machine, request, session)
        return found
    except TimeoutExpired as error:
        raise UsageError(f"{machine.name}: the command did not start within {error.timeout:g} s") from error
    except OSError as error:
        where = str(error.filename or request.get("path", "")).removeprefix(f"{machine.name}:")
        return {"errno": error.errno or errno.EIO, "path": where}


def _guest(machine: Machine, request: dict[str, Any]) -> tuple[Guest, str]:
    guest = Guest(machine, request.get("user", "root"))
    return guest, guest.path(request["path"])


def _stat(machine: Machine, request: dict[str, Any], session: Session) -> dict[str, Any]:
    guest, path = _guest(machine, request)
    return {"entry": guest.entry(path)}


def _list(machine: Machine, request: dict[str, Any], session: Session) -> dict[str, Any]:
    guest, path = _guest(machine, request)
    lines = "".join(json.dumps(one) + "\n" for one in guest.walk(path, request.get("depth", 1))).encode()
    session.send(Kind.DATA, lines, 1)
    return {}


def _read(machine: Machine, request: dict[str, Any], session: Session) -> dict[str, Any]:
    guest, path = _guest(machine, request)
    if guest.files.stat(path).is_dir:
        raise IsADirectoryError(errno.EISDIR, "Is a directory", path)
    for piece in guest.files.chunks(path):
        session.send(Kind.DATA, piece, 1)
    return {}


def _write(machine: Machine, request: dict[str, Any], session: Session) -> dict[str, Any]:
    guest, path = _guest(machine, request)

    def pieces() -> Iterator[bytes]:
        while (frame := session.receive()) is not None and frame.kind is Kind.DATA:
            yield frame.data
        if frame is None:
            raise HostError(f"{path}: the caller went away before the end of the file")

    guest.write(path, pieces())
    return {"entry": guest.entry(path)}


def _mkdir(machine: Machine, request: dict[str, Any], session: Session) -> dict[str, Any]:
    guest, path = _guest(machine, request)
    guest.mkdir(path)
    return {"entry": guest.entry(path)}


def _rename(machine: Machine, request: dict[str, Any], session: Session) -> dict[str, Any]:
    guest, path = _guest(machine, request)
    to = guest.path(request["to"])
    guest.files.rename(path, to)
    return {"entry": guest.entry(to)}


def _remove(machine: Machine, request: dict[str, Any], session: Session) -> dict[str, Any]:
    guest, path = _guest(machine, request)
    guest.files.remove(path, recursive=True)
    return {}


def _watch(machine: Machine, request: dict[str, Any], session: Session) -> dict[str, Any]:
    guest, path = _guest(machine, request)
    if not guest.files.stat(path).is_dir:
        raise NotADirectoryError(errno.ENOTDIR, "Not a directory", path)
    with guest.files.watch(path) as changes:
        session.send(Kind.DATA, json.dumps({"path": path}).encode(), 3)
        session.listen(lambda frame: None, changes.close)
        for change in changes:
            line = json.dumps({"name": change.name, "kind": change.kind, "is_dir": change.is_dir})
            session.send(Kind.DATA, line.encode() + b"\n", 1)
    return {}


def _start(machine: Machine, request: dict[str, Any], session: Session) -> dict[str, Any]:
    guest = Guest(machine, request.get("user", "root"))
    command, pty, env = request["command"], request.get("pty"), request.get("env", {})
    if not command or not all(isinstance(one, str) for one in command):
        raise UsageError("command: expected a list of text, with one word at least")
    if not all(isinstance(one, str) for one in env.values()):
        raise UsageError("env: expected a table of text")
    if pty is not None and (len(pty) != 2 or not all(type(one) is int for one in pty)):
        raise UsageError("pty: expected rows and columns")
    return processes(machine).start(
        machine,
        session,
        command=command,
        env=guest.environment(env),
        cwd=guest.path(request["cwd"]) if request.get("cwd") else None,
        user=request.get("user", "root"),
        pty=pty,
        input=request.get("input", False),
        limit=request.get("limit"),
        keep=request.get("keep", False),
        tag=request.get("tag", ""),
    )


def _attach(machine: Machine, request: dict[str, Any], session: Session) -> dict[str, Any]:
    return processes(machine).find(request["pid"]).attach(session)


def _processes(machine: Machine, request: dict[str, Any], session: Session) -> dict[str, Any]:
    lines = "".join(json.dumps(one) + "\n" for one in processes(machine).rows()).encode()
    session.send(Kind.DATA, lines, 1)
    return {}


def _input(machine: Machine, request: dict[str, Any], session: Session) -> dict[str, Any]:
    running = processes(machine).find(request["pid"])
    while (frame := session.receive()) is not None and frame.kind is Kind.DATA:
        running.write(frame.data)
    if request.get("close"):
        running.end_input()
    return {}


def _signal(machine: Machine, request: dict[str, Any], session: Session) -> dict[str, Any]:
    processes(machine).find(request["pid"]).process.send_signal(request.get("signal", 15))
    return {}


def _resize(machine: Machine, request: dict[str, Any], session: Session) -> dict[str, Any]:
    pty = request.get("pty", [])
    if len(pty) != 2 or not all(type(one) is int and 0 < one < 65536 for one in pty):
        raise UsageError("pty: expected rows and columns from 1 to 65535")
    processes(machine).find(request["pid"]).process.resize(*pty)
    return {}


FILE: dict[str, Any] = {"path": str, "user": str}
COMMAND: dict[str, Any] = {
    "command": list,
    "env": dict,
    "cwd": str,
    "user": str,
    "pty": list,
    "input": bool,
    "limit": (int, float),
    "keep": bool,
    "tag": str,
}
ACTS: dict[str, tuple[dict[str, Any], Any]] = {
    "stat": (FILE, _stat),
    "list": ({**FILE, "depth": int}, _list),
    "read": (FILE, _read),
    "write": (FILE, _write),
    "mkdir": (FILE, _mkdir),
    "rename": ({**FILE, "to": str}, _rename),
    "remove": (FILE, _remove),
    "watch": (FILE, _watch),
    "start": (COMMAND, _start),
    "attach": ({"pid": int}, _attach),
    "processes": ({}, _processes),
    "input": ({"pid": int, "close": bool}, _input),
    "signal": ({"pid": int, "signal": int}, _signal),
    "resize": ({"pid": int, "pty": list}, _resize),
}
"""Acts: the types of their keys, and the function."""
