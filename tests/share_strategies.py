"""Random file system calls for :mod:`share_calls`, with their flags."""

from __future__ import annotations

import os
import stat

from hypothesis import strategies as st
from share_calls import EACCESS, FOLLOW, NOFOLLOW, NOW, OMIT

NAMES = st.sampled_from(("a", "b", "d", "d/a", "d/b", "l", "m", "m/a", "n", "a/x", "s", "d/t", "q" * 256, ""))
SHORT_NAMES = st.sampled_from(("a", "b", "d", "d/a", "d/b", "l", "m/a", "a/x", "s"))
"""Without one that is too long: of two errors kernels give one or the other."""
SLOTS = st.sampled_from((0, 1))
FLAGS = st.builds(
    lambda kind, more: kind | sum(more),
    st.sampled_from((os.O_RDONLY, os.O_WRONLY, os.O_RDWR)),
    st.sets(
        st.sampled_from((os.O_CREAT, os.O_EXCL, os.O_TRUNC, os.O_APPEND, os.O_DIRECTORY, os.O_NOFOLLOW, os.O_DSYNC)),
        max_size=3,
    ),
)
OPEN_FLAGS = st.one_of(
    FLAGS, st.just(os.O_RDWR), st.just(os.O_RDWR | os.O_CREAT), st.sampled_from((os.O_PATH, os.O_PATH | os.O_NOFOLLOW))
)
ROOT = os.geteuid() == 0
MODES = st.sampled_from((0o600, 0o644, 0o777, 0o000, 0o1777) if ROOT else (0o700, 0o744, 0o777, 0o1777))
OFFSETS = st.sampled_from((0, 1, 4095, 4096, 8192, 100_000))
SIZES = st.sampled_from((0, 1, 300, 5000))
OWNERS = st.sampled_from((-1, 0, 7, 1000))
BOTH = st.booleans()
KEYS = st.sampled_from(("user.x", "user.y", "user." + "z" * 250, "user.", "trusted.x" if ROOT else "user.w", "nothing"))
SECONDS = st.sampled_from((0, 10**9, 1_700_000_000 * 10**9))
MOMENTS = st.sampled_from((0, 1, 10**9 + 5, 1_700_000_000_123_456_789, -1_500_000_001))
WHOLE = st.sampled_from(([0, 0], [5, 0], [1_700_000_000, 0], [0, NOW], [0, OMIT], [0, 10**9]))
TIMES = st.sampled_from(([5, 7], [1_700_000_000, 123_456_789], [-3, 5], [0, OMIT]))
NODES = st.sampled_from(
    [
        *((stat.S_IFIFO | 0o644, 0), (stat.S_IFREG | 0o600, 0), (stat.S_IFSOCK | 0o777, 0), (stat.S_IFCHR | 0o600, 0)),
        *((0o640, 0), (stat.S_IFDIR | 0o755, 0)),
    ]
)


def _act(name: str, *values: st.SearchStrategy[object]) -> st.SearchStrategy[tuple[object, ...]]:
    return st.tuples(st.just(name), *values)


OPENED = st.one_of(
    _act("open", SLOTS, NAMES, OPEN_FLAGS, MODES),
    _act("open", SLOTS, NAMES, st.sampled_from((os.O_RDWR, os.O_RDWR | os.O_CREAT | os.O_APPEND)), MODES),
    _act("drop", SLOTS),
    _act("read", SLOTS, OFFSETS, SIZES),
    _act("write", SLOTS, OFFSETS, SIZES, st.sampled_from((0, 0, os.RWF_DSYNC, os.RWF_SYNC, os.RWF_APPEND))),
    _act("seek", SLOTS, OFFSETS, st.sampled_from((os.SEEK_SET, os.SEEK_END, os.SEEK_DATA, os.SEEK_HOLE))),
    _act("copy", SLOTS, SLOTS, OFFSETS, OFFSETS, SIZES),
    _act("send", SLOTS, SLOTS, OFFSETS, SIZES),
    _act("sync", SLOTS, st.sampled_from(("file", "data", "range", "advise"))),
    _act("lock", SLOTS, st.sampled_from(("shared", "part"))),
    _act("about_open", SLOTS),
    _act("truncate_open", SLOTS, OFFSETS),
    _act("chmod_open", SLOTS, MODES),
    _act("chown_open", SLOTS, OWNERS, OWNERS),
    _act("times_open", SLOTS, SECONDS, SECONDS),
    _act("link_open", SLOTS, NAMES),
    _act("list_open", SLOTS),
)
NAMED = st.one_of(
    _act("mkdir", NAMES, st.one_of(MODES, st.just(0o2755))),
    NODES.flatmap(lambda node: _act("mknod", NAMES, st.just(node[0]), st.just(node[1]))),
    _act("bind", st.sampled_from(("b", "d/b", "s", "l", "a"))),
    _act("symlink", NAMES, st.sampled_from(("a", "d", "nowhere", "../d/a", "l", "s"))),
    _act("readlink", NAMES),
    _act("link", NAMES, NAMES, st.sampled_from((0, FOLLOW))),
    _act("unlink", NAMES),
    _act("rmdir", NAMES),
    _act("rename", NAMES, SHORT_NAMES, st.just(0)),
    _act("listing", NAMES),
    _act("copy_tree", st.sampled_from(("d", "m", "a", "l")), st.sampled_from(("b", "s"))),
    _act("about", NAMES, BOTH),
    _act("access", NAMES, st.integers(0, 7), st.sampled_from((0, EACCESS, NOFOLLOW))),
    _act("chmod", NAMES, MODES),
    _act("chown", NAMES, OWNERS, OWNERS, BOTH),
    _act("truncate", NAMES, OFFSETS),
    _act("times", NAMES, WHOLE, WHOLE, BOTH),
    _act("set_attribute", NAMES, KEYS, st.sampled_from((0, 1, 300)), st.sampled_from((0, 1)), BOTH),
    _act("set_attribute", NAMES, KEYS, st.sampled_from((1, 300)), st.just(os.XATTR_REPLACE), BOTH),
    _act("attribute", NAMES, KEYS, BOTH),
    _act("attribute_room", NAMES, KEYS, st.sampled_from((0, 1, 300))),
    _act("remove_attribute", NAMES, KEYS, BOTH),
    _act("attributes", NAMES, BOTH),
    _act("room", NAMES),
)
ACTS = st.one_of(OPENED, NAMED)
"""What both clients of Linux can do."""
FS_ACTS = st.one_of(
    ACTS,
    _act("rename", NAMES, SHORT_NAMES, st.sampled_from((1, 2, 4, 5, 3))),
    _act("times", NAMES, TIMES, TIMES, BOTH),
    _act("times_open", SLOTS, MOMENTS, MOMENTS),
    _act("allocate", SLOTS, st.sampled_from((0, 1, 2, 3, 0x10, 0x11)), OFFSETS, OFFSETS),
    _act("set_flags", SLOTS, st.sampled_from((0, os.O_APPEND))),
    _act("map", SLOTS, OFFSETS),
    _act("lock", SLOTS, st.just("whole")),
    _act("set_attribute", NAMES, KEYS, st.just(0), st.just(os.XATTR_REPLACE), BOTH),
)
"""More that Linux's virtiofs can do, and its 9p cannot: see docs/virtio.md."""

# What tests/devices/share_kernel.py knows, without a guest.
WIRE_NAMES = st.sampled_from(("a", "b", "d", "d/a", "d/b", "l", "m", "m/a", "n", "a/x", "s", "q" * 256))
WIRE_FLAGS = st.builds(
    lambda kind, more: kind | sum(more),
    st.sampled_from((os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR)),
    st.sets(st.sampled_from((os.O_CREAT, os.O_EXCL, os.O_APPEND, os.O_NOFOLLOW, os.O_DSYNC)), max_size=3),
).map(lambda flags: flags | (os.O_TRUNC if flags & os.O_ACCMODE and flags & os.O_DSYNC else 0))
WIRE_ACTS = st.one_of(
    _act("open", SLOTS, WIRE_NAMES, WIRE_FLAGS, MODES),
    _act("open", SLOTS, WIRE_NAMES, st.just(os.O_RDWR | os.O_CREAT), MODES),
    _act("drop", SLOTS),
    _act("read", SLOTS, OFFSETS, SIZES),
    _act("write", SLOTS, OFFSETS, SIZES, st.just(0)),
    _act("sync", SLOTS, st.sampled_from(("file", "data"))),
    _act("about_open", SLOTS),
    _act("truncate_open", SLOTS, OFFSETS),
    _act("chmod_open", SLOTS, MODES),
    _act("link_open", SLOTS, WIRE_NAMES),
    _act("mkdir", WIRE_NAMES, st.one_of(MODES, st.just(0o2755))),
    NODES.filter(lambda node: not stat.S_ISFIFO(node[0])).flatmap(
        lambda node: _act("mknod", WIRE_NAMES, st.just(node[0]), st.just(node[1]))
    ),
    _act("symlink", WIRE_NAMES, st.sampled_from(("a", "d", "nowhere", "d/a", "l", "s"))),
    _act("readlink", WIRE_NAMES),
    _act("link", WIRE_NAMES, WIRE_NAMES, st.sampled_from((0, FOLLOW))),
    _act("unlink", WIRE_NAMES),
    _act("rmdir", WIRE_NAMES),
    _act("rename", WIRE_NAMES, SHORT_NAMES, st.just(0)),
    _act("names", WIRE_NAMES),
    _act("about", WIRE_NAMES, BOTH),
    _act("chmod", WIRE_NAMES, st.one_of(MODES, st.just(0o1755))),
    _act("truncate", WIRE_NAMES, OFFSETS),
    _act("times", WIRE_NAMES, st.one_of(WHOLE, TIMES), st.one_of(WHOLE, TIMES), BOTH),
    _act(
        "set_attribute", WIRE_NAMES, KEYS, st.sampled_from((0, 1, 300, 65_536, 40_000)), st.sampled_from((0, 1)), BOTH
    ),
    _act("set_attribute", WIRE_NAMES, KEYS, st.sampled_from((1, 300)), st.just(os.XATTR_REPLACE), BOTH),
    _act("attribute", WIRE_NAMES, KEYS, BOTH),
    _act("remove_attribute", WIRE_NAMES, KEYS, BOTH),
    _act("attributes", WIRE_NAMES, BOTH),
    _act("room", WIRE_NAMES),
)
WIRE_OWNS = st.one_of(_act("chown_open", SLOTS, OWNERS, OWNERS), _act("chown", WIRE_NAMES, OWNERS, OWNERS, BOTH))
"""What only root may do."""
WIRE_FS_ACTS = st.one_of(
    _act("rename", WIRE_NAMES, SHORT_NAMES, st.sampled_from((1, 2, 4, 5, 3))),
    _act("write", SLOTS, OFFSETS, SIZES, st.sampled_from((os.RWF_APPEND, os.RWF_DSYNC, os.RWF_SYNC))),
    _act("set_attribute", WIRE_NAMES, KEYS, st.just(0), st.just(os.XATTR_REPLACE), BOTH),
)
