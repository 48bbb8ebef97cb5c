"""Commands about file descriptors that a peer sends along (SCM_RIGHTS)."""

from __future__ import annotations

import os
from typing import NotRequired, TypedDict

from cardcage_qmp.errors import QmpError
from cardcage_qmp.session import FDS, Session

__all__ = ["add_fd", "closefd", "getfd", "query_fdsets", "remove_fd"]

AddfdInfo = TypedDict("AddfdInfo", {"fdset-id": int, "fd": int})


class FdsetFdInfo(TypedDict):
    """A descriptor of a set."""

    fd: int
    opaque: NotRequired[str]


FdsetInfo = TypedDict("FdsetInfo", {"fdset-id": int, "fds": list[FdsetFdInfo]})


def getfd(session: Session, fdname: str) -> None:
    """Keep the descriptor that came along, under a name."""
    fd = session.next_fd()
    if not fdname or fdname[0].isdigit():
        os.close(fd)
        raise QmpError("Parameter 'fdname' expects a name not starting with a digit")
    session.keep_fd(fdname, fd)


def closefd(session: Session, fdname: str) -> None:
    """Close a descriptor by its name."""
    fd = session.fds.pop(fdname, None)
    if fd is None:
        raise QmpError(f"File descriptor named '{fdname}' not found")
    os.close(fd)


def add_fd(session: Session, fdset_id: int | None = None, opaque: str | None = None) -> AddfdInfo:
    """Add the descriptor that came along to a set, a new one where none is named."""
    fd = session.next_fd()
    control = session.control
    with control.lock:
        sets = control.fdsets
        if sum(len(one) for one in sets.values()) >= FDS:
            os.close(fd)
            raise QmpError(f"{FDS} file descriptors are in sets already")
        if fdset_id is None:
            fdset_id = next(at for at in range(len(sets) + 1) if at not in sets)
        elif fdset_id < 0:
            os.close(fd)
            raise QmpError("Parameter 'fdset-id' expects a non-negative value")
        sets.setdefault(fdset_id, []).append((fd, opaque or ""))
    return {"fdset-id": fdset_id, "fd": fd}


def remove_fd(session: Session, fdset_id: int, fd: int | None = None) -> None:
    """Close a descriptor of a set, or all of them."""
    control = session.control
    with control.lock:
        there = control.fdsets.get(fdset_id, [])
        gone = [one for one in there if fd is None or one[0] == fd]
        if not gone:
            which = f"fdset-id:{fdset_id}" + (f", fd:{fd}" if fd is not None else "")
            raise QmpError(f"File descriptor named '{which}' not found")
        left = [one for one in there if one not in gone]
        control.fdsets[fdset_id] = left
        if not left:
            del control.fdsets[fdset_id]
    for number, _ in gone:
        os.close(number)


def query_fdsets(session: Session) -> list[FdsetInfo]:
    """The sets."""
    with session.control.lock:
        sets = {number: list(one) for number, one in session.control.fdsets.items()}
    return [
        {"fdset-id": number, "fds": [{"fd": fd, "opaque": said} if said else {"fd": fd} for fd, said in one]}
        for number, one in sorted(sets.items())
    ]
