"""sVirt: a pair of categories for each machine, and labels on its images and sockets, put back at the end.

As libvirt does: a writable image has the machine's categories, a read-only or shared image has none. A label is
the file's ``security.selinux`` attribute where the file system and our rights allow that, and otherwise stands only in
a record. Records are kept in a directory, each with the label from before and the machines that use the file; who
finds a record whose machines are all dead puts the file's label back.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import threading
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from attrs import asdict, define, evolve, field
from cardcage.errors import HostError
from cardcage.security import Act, Needs

from cardcage_selinux.svirt.leases import Lease, alive, draw, lease

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ATTRIBUTE", "Record", "Svirt", "real_label"]

ATTRIBUTE = "security.selinux"
UNSUPPORTED = (errno.EOPNOTSUPP, errno.EPERM, errno.EACCES, errno.EROFS, errno.EINVAL)
"""Why a file cannot have the attribute: its label is then only recorded."""


class Server(Protocol):
    """The part of the policy that sVirt uses (:class:`~cardcage_selinux.card.Selinux`)."""

    def create(self, source: str, target: str, tclass: str, name: str | None = None, /) -> str: ...

    def may(self, act: Act, /) -> bool: ...

    def sid(self, name: str, /) -> str | None: ...

    def context(self, label: str, /) -> str: ...


@define
class Record:
    """One labelled file.

    Attributes:
        path: as it was opened. device, inode: which file that was.
        label: its present label. before: its previous attribute, ``None`` if it had none.
        written: whether the attribute was really changed. holders: leases of the machines that use it.
    """

    path: str
    device: int
    inode: int
    label: str
    before: str | None = None
    written: bool = False
    holders: list[str] = field(factory=list)


def real_label(path: str) -> str | None:
    """The file's own label, ``None`` when it has none."""
    try:
        return os.getxattr(path, ATTRIBUTE).rstrip(b"\0").decode()
    except (OSError, UnicodeDecodeError):
        return None


def default_folder() -> Path:
    """Where records are kept."""
    if os.geteuid() == 0:
        return Path("/var/lib/cardcage/svirt")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "cardcage/svirt"


class Svirt:
    """The labels that one process gives.

    Args:
        labels: ``dynamic``, ``static`` or ``none``; see :class:`~cardcage_selinux.card.SelinuxOptions`.
    """

    def __init__(self, server: Server, labels: str, folder: str | None) -> None:
        self._server, self._labels = server, labels
        self._lock = threading.RLock()
        self.folder = Path(folder) if folder else default_folder()
        self._leases: dict[str, Lease] = {}
        """By the range of a machine's label, such as ``s0:c1,c2``."""
        if labels != "none":
            try:
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise HostError(f"svirt: {self.folder}: {error.strerror}") from error
            self.sweep()

    def needs(self) -> Needs:
        """The records, and the right to put real labels back."""
        if self._labels == "none":
            return Needs()
        return Needs(write=(str(self.folder),), capabilities=("fowner", "mac_admin", "sys_admin"))

    # machines

    def machine(self, context: str) -> str:
        """The label of a new machine: *context* with a pair of its own."""
        head, _, _ = split(context)
        if self._labels != "dynamic" or context.count(":") < 3:
            return context
        held = draw(self.folder)
        with self._lock:
            self._leases[f"s0:{held.name}"] = held
        return f"{head}:s0:{held.name}"

    def release(self, label: str) -> None:
        """A machine with *label* has ended."""
        with self._lock:
            held = self._leases.get(range_ := split(label)[2])
            if held is not None and held.sign is not None:  # machines may share a static label: until close()
                del self._leases[range_]
                self._restore(held.name)
                held.close()

    def close(self) -> None:
        """Release what is left. Idempotent."""
        with self._lock:
            while self._leases:
                _, held = self._leases.popitem()
                self._restore(held.name)
                held.close()

    def _holder(self, range_: str) -> Lease:
        """The lease of the machine with this range; one with a static label gets a lease at its first file."""
        if range_ not in self._leases:
            number = 0
            while (held := lease(self.folder, f"static-{os.getpid()}-{number}")) is None:
                number += 1
            self._leases[range_] = held
        return self._leases[range_]

    # files

    def file(self, act: Act, name: str) -> str:
        """The label of an image or socket; gives it its own when *act* is one that policy allows.

        Args:
            act: between contexts, with the machine's for its target.
        """
        with self._lock:
            return self._file(act, name)

    def _file(self, act: Act, name: str) -> str:
        tclass = act.tclass
        path = name.removeprefix("unix:")
        path = os.path.abspath(path) if tclass == "image" or path != name else name
        makes = tclass == "image" or ("listen" in act.permissions and name.startswith("unix:"))
        there = self._record(path)
        if there is not None and any(alive(self.folder, one) for one in there.holders):
            wanted = self._wanted(act)
            if there.label == wanted and self._server.may(evolve(act, target=wanted)):
                self._hold(path, wanted, split(act.target)[2], tclass)
            return there.label  # its own, or another machine's: policy says whether that can be
        old = self._old(path, tclass, name)
        _, _, range_ = split(act.target)
        if not makes or self._labels == "none" or ":" not in range_ or "machine" not in act.facts:
            return old if os.path.lexists(path) or not makes else self._server.create(act.source, act.target, tclass)
        wanted = self._wanted(act)
        if self._server.may(evolve(act, target=wanted)) and (
            not os.path.lexists(path)
            or wanted == old
            or self._server.may(Act(self._server.context("operator"), old, tclass, ("relabelfrom",)))
        ):
            self._hold(path, wanted, range_, tclass)
            return wanted
        # Refused, or not to be taken from where it is: what it is decides, and nothing was changed.
        return wanted if not os.path.lexists(path) or old == wanted else old

    def _wanted(self, act: Act) -> str:
        """What the file is to be: content that is read, or the machine's own, or shared by all of them."""
        base = self._server.sid("content" if act.facts.get("readonly") else act.tclass)
        if base is None:
            return self._server.create(act.source, act.target, act.tclass)
        if act.facts.get("readonly"):
            return base
        made = self._server.create(act.source, base, act.tclass)
        head, _, _ = split(made)
        return f"{head}:{split(base if act.facts.get('shared') else act.target)[2]}"

    def _old(self, path: str, tclass: str, name: str) -> str:
        found = real_label(path)
        if found is not None:
            with suppress(Exception):  # whatever the host's own policy calls it, ours may not know it
                return self._server.context(found)
        return self._server.sid("file" if tclass == "image" else "port") or self._server.context(name)

    def _hold(self, path: str, label: str, range_: str, tclass: str) -> None:
        holder = self._holder(range_)
        with self._records():
            record = self._record(path)
            if record is not None and not any(alive(self.folder, one) for one in record.holders):
                self._put_back(record)
                record = None
            if record is None:
                # A socket will be another file once it is bound.
                record = self._new(path, label) if tclass == "image" else Record(path, 0, 0, label)
            if holder.name not in record.holders:
                record.holders.append(holder.name)
            self._write(path, record)

    def _new(self, path: str, label: str) -> Record:
        try:
            status = os.stat(path)
        except OSError:  # it is about to be made
            return Record(path, 0, 0, label)
        record = Record(path, status.st_dev, status.st_ino, label, real_label(path))
        if record.before != label and (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
            self._write(path, record)  # before the file changes, so that a crash in between is put back
            try:
                os.setxattr(path, ATTRIBUTE, label.encode() + b"\0")
                record.written = True
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
        return record

    # records

    @contextmanager
    def _records(self) -> Iterator[None]:
        fd = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _by_name(self, path: str) -> Path:
        return self.folder / f"{sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]}.json"

    def _record(self, path: str) -> Record | None:
        with suppress(OSError):
            status = os.stat(path)
            found = read(self.folder / f"{status.st_dev}-{status.st_ino}.json")
            if found is not None:
                return found
        return read(self._by_name(path))  # labelled before it was made

    def _write(self, path: str, record: Record) -> None:
        name = f"{record.device}-{record.inode}.json"
        place = self.folder / name if record.inode else self._by_name(path)
        part = place.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(asdict(record)))
        part.rename(place)

    def _restore(self, holder: str) -> None:
        if self._labels == "none" or not self.folder.is_dir():
            return
        with self._records():
            for place in self.folder.glob("*.json"):
                record = read(place)
                if record is not None and holder in record.holders:
                    record.holders.remove(holder)
                    self._settle(place, record)

    def sweep(self) -> None:
        """Put back what machines left that died without a word."""
        with self._records():
            for place in self.folder.glob("*.json"):
                record = read(place)
                if record is not None:
                    self._settle(place, record)
            for left in self.folder.glob("*.lease"):
                held = lease(self.folder, left.stem)
                if held is not None:
                    held.close()

    def _settle(self, place: Path, record: Record) -> None:
        """Under the lock: the file's old label comes back with its last live machine."""
        record.holders = [one for one in record.holders if alive(self.folder, one)]
        if record.holders:
            place.write_text(json.dumps(asdict(record)))
            return
        self._put_back(record)
        place.unlink(missing_ok=True)

    def _put_back(self, record: Record) -> None:
        try:
            status = os.stat(record.path)
        except OSError:  # it has gone, and its label with it
            return
        ours = real_label(record.path) == record.label
        if not ours or (status.st_dev, status.st_ino) != (record.device, record.inode):
            return  # somebody gave it another label meanwhile, or it is another file
        with suppress(OSError):  # we may have fewer rights now; the record says nothing that could be done later
            if record.before is None:
                os.removexattr(record.path, ATTRIBUTE)
            else:
                os.setxattr(record.path, ATTRIBUTE, record.before.encode() + b"\0")


def split(context: str) -> tuple[str, str, str]:
    """(user:role:type, type, range) of a context; the range is empty without MLS."""
    user, role, type_, *range_ = context.split(":", 3)
    return f"{user}:{role}:{type_}", type_, range_[0] if range_ else ""


def read(place: Path) -> Record | None:
    """A record, ``None`` when there is none, or it is damaged."""
    try:
        table: dict[str, Any] = json.loads(place.read_text())
        return Record(**table)
    except (OSError, ValueError, TypeError):
        return None
