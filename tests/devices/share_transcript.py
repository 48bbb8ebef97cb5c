"""A program that serves a directory and plays its guest: ``python share_transcript.py fs|9p DIRECTORY ACT``.

It prints what the guest saw, which is to be the same whatever the program inherited.
"""

from __future__ import annotations

import os
import signal
import stat
import sys
from typing import Any

from share_wire import WIRES

FILES = 120
"""More than half of 64 descriptors, or a quarter of 256."""


def shown(wire: Any, call: str, *values: Any, **fields: Any) -> Any:
    try:
        return getattr(wire, call)(*values, **fields)
    except wire.error as error:
        return str(error)


def names_and_modes(wire: Any) -> None:
    """Make each kind of file with each mode; say whose it is, and what the directory has."""
    for mode in (0o000, 0o640, 0o777, 0o1777):
        wire.mkdir(1, b"d%o" % mode, mode)
        wire.mknod(1, b"n%o" % mode, stat.S_IFIFO | mode, 0)
        wire.drop(wire.create(1, b"f%o" % mode, os.O_RDWR, mode)[1])
        if hasattr(wire, "temporary"):
            node, handle = wire.temporary(1, os.O_RDWR, mode)
            wire.link(node, 1, b"t%o" % mode)
            wire.drop(handle)
    wire.symlink(1, b"link", b"n\xffwhere")
    for name in ("ü".encode(), b"\xff\xfe", "名".encode("gbk")):
        node, handle = wire.create(1, name, os.O_RDWR, 0o666)
        wire.set_attribute(node, b"user." + name, name, 0)
        print(name, wire.attributes(node), wire.attribute(node, b"user." + name))
        wire.drop(handle)
    before = wire.about(wire.lookup(1, b"f640"))
    wire.drop(wire.create(1, b"f640", os.O_RDWR, 0o777)[1])  # which is there already
    assert wire.about(wire.lookup(1, b"f640")) == before
    for name in wire.list(1):
        found = wire.about(wire.lookup(1, name)) if name not in (b".", b"..") else [0]
        print(name, oct(found[0]), found[2:4])
    print(wire.readlink(wire.lookup(1, b"link")))


def many_files(wire: Any) -> None:
    """Keep many files open at once."""
    handles = [shown(wire, "create", 1, b"%d" % at, os.O_RDWR, 0o600) for at in range(FILES)]
    print([type(one).__name__ for one in handles], handles[-1] if isinstance(handles[-1], str) else "")


def long_file(wire: Any) -> None:
    """Write where the host lets no file of this process's be so long."""
    node, handle = wire.create(1, b"long", os.O_RDWR, 0o600)
    for offset in (0, 8000, 8192, 100_000):
        print(offset, shown(wire, "write", handle, offset, b"w" * 400), wire.about(node)[4])
    print(shown(wire, "set", node, handle, size=9000), wire.about(node)[4])


def own_directory(wire: Any) -> None:
    """Go elsewhere, and have others do so, while a file is made."""
    os.chdir("/")
    names_and_modes(wire)


def main() -> None:
    kind, path, act = sys.argv[1:4]
    if "SIGXFSZ_AS_THE_SYSTEM_HAS_IT" in os.environ:
        for one in (signal.SIGXFSZ, signal.SIGPIPE):
            signal.signal(one, signal.SIG_DFL)
    before = os.umask(0o22)
    os.umask(before)
    wire = WIRES[kind](path)
    globals()[act](wire)
    wire.close()
    assert os.umask(0) == before
    print("alive")


if __name__ == "__main__":
    main()
