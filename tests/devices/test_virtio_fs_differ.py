"""The FUSE server against the host's own file system: the same acts on two directories have the same ends."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cardcage_virtio.share import fuse
from cardcage_virtio.share.fuse import Op, Set
from fuse_client import Client, FuseError, fails
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

LIBC = ctypes.CDLL(None, use_errno=True)
NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4
U64 = struct.Struct("<Q")


def checked(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), "")


class Direct:
    """The acts by path, on a directory of the host, as far as the server means to serve them."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def at(self, name: str) -> str:
        return str(self.root / name)

    def there(self, name: str) -> str:
        """The path of something that is there: a FUSE client looks a name up before it asks for more."""
        os.lstat(self.at(name))
        return self.at(name)

    @contextmanager
    def open(self, name: str) -> Iterator[int]:
        fd = os.open(self.at(name), os.O_RDWR | os.O_NOFOLLOW)
        try:
            yield fd
        finally:
            os.close(fd)

    def create(self, name: str) -> None:
        os.close(os.open(self.at(name), os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o640))

    def mkdir(self, name: str) -> None:
        os.mkdir(self.at(name), 0o750)

    def symlink(self, name: str) -> None:
        os.symlink("/nowhere", self.at(name))

    def unlink(self, name: str) -> None:
        os.unlink(self.at(name))

    def rmdir(self, name: str) -> None:
        os.rmdir(self.at(name))

    def rename(self, name: str, to: str, flags: int) -> None:
        checked(LIBC.renameat2(-100, self.at(name).encode(), -100, self.at(to).encode(), flags))

    def write(self, name: str, offset: int, size: int) -> int:
        with self.open(name) as fd:
            return os.pwrite(fd, b"w" * size, offset)

    def allocate(self, name: str, mode: int, offset: int, length: int) -> None:
        with self.open(name) as fd:
            checked(LIBC.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)))

    def seek(self, name: str, offset: int, whence: int) -> int:
        with self.open(name) as fd:
            return os.lseek(fd, offset, whence)

    def copy(self, name: str, to: str, at: int, length: int) -> int:
        with self.open(name) as source, self.open(to) as target:
            return os.copy_file_range(source, target, length, at, 0)

    def truncate(self, name: str, size: int) -> None:
        with self.open(name) as fd:
            os.ftruncate(fd, size)

    def times(self, name: str, accessed: int, modified: int) -> tuple[int, int]:
        os.utime(self.at(name), ns=(accessed, modified), follow_symlinks=False)
        found = os.lstat(self.at(name))
        return found.st_atime_ns, found.st_mtime_ns

    def set_attribute(self, name: str, key: str, size: int, flags: int) -> None:
        os.setxattr(self.there(name), key, b"v" * size, flags, follow_symlinks=False)

    def attribute(self, name: str, key: str, size: int) -> bytes:
        found = os.getxattr(self.there(name), key, follow_symlinks=False)
        if size and len(found) > size:
            raise OSError(errno.ERANGE, "")
        return found if size else struct.pack("<II", len(found), 0)

    def remove_attribute(self, name: str, key: str) -> None:
        os.removexattr(self.there(name), key, follow_symlinks=False)

    def attributes(self, name: str) -> list[bytes]:
        return sorted(os.fsencode(key) for key in os.listxattr(self.at(name), follow_symlinks=False))


class Served:
    """The same acts by FUSE."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def node(self, name: str) -> int:
        found = 1
        for part in name.split("/"):
            found = self.client.lookup(part.encode(), found)
        return found

    def place(self, name: str) -> tuple[int, bytes]:
        parent, _, last = name.rpartition("/")
        return self.node(parent) if parent else 1, last.encode() + b"\0"

    def call(self, op: int, node: int, form: str, *values: Any, more: bytes = b"") -> bytes:
        return self.client.call(op, node, struct.pack(form, *values) + more)

    @contextmanager
    def open(self, name: str) -> Iterator[int]:
        node = self.node(name)
        handle = self.client.open(node, os.O_RDWR)
        try:
            yield handle
        finally:
            self.call(Op.RELEASE, node, "<QIIQ", handle, 0, 0, 0)

    def create(self, name: str) -> None:
        parent, last = self.place(name)
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR
        node, handle = self.client.create(last[:-1], flags, 0o640, parent)
        self.call(Op.RELEASE, node, "<QIIQ", handle, 0, 0, 0)

    def mkdir(self, name: str) -> None:
        parent, last = self.place(name)
        self.call(Op.MKDIR, parent, "<II", 0o750, 0, more=last)

    def symlink(self, name: str) -> None:
        parent, last = self.place(name)
        self.client.call(Op.SYMLINK, parent, last + b"/nowhere\0")

    def unlink(self, name: str) -> None:
        self.client.call(Op.UNLINK, *self.place(name))

    def rmdir(self, name: str) -> None:
        self.client.call(Op.RMDIR, *self.place(name))

    def rename(self, name: str, to: str, flags: int) -> None:
        (parent, last), (new_parent, new_last) = self.place(name), self.place(to)
        self.call(Op.RENAME2, parent, "<QII", new_parent, flags, 0, more=last + new_last)

    def write(self, name: str, offset: int, size: int) -> int:
        with self.open(name) as handle:
            return self.client.write(handle, offset, b"w" * size)

    def allocate(self, name: str, mode: int, offset: int, length: int) -> None:
        with self.open(name) as handle:
            self.call(Op.FALLOCATE, 1, "<QQQII", handle, offset, length, mode, 0)

    def seek(self, name: str, offset: int, whence: int) -> int:
        with self.open(name) as handle:
            found: int = U64.unpack(self.call(Op.LSEEK, 1, "<QQII", handle, offset, whence, 0))[0]
            return found

    def copy(self, name: str, to: str, at: int, length: int) -> int:
        with self.open(name) as source, self.open(to) as target:
            data = self.call(Op.COPY_FILE_RANGE, 1, "<QQQQQQQ", source, at, 1, target, 0, length, 0)
            return int.from_bytes(data[:4], "little")

    def truncate(self, name: str, size: int) -> None:
        with self.open(name) as handle:
            self.client.setattr(self.node(name), Set.SIZE | Set.FH, size=size, fh=handle)

    def times(self, name: str, accessed: int, modified: int) -> tuple[int, int]:
        (at, at_ns), (mt, mt_ns) = divmod(accessed, 10**9), divmod(modified, 10**9)
        fields = {"atime": at, "atime_ns": at_ns, "mtime": mt, "mtime_ns": mt_ns}
        data = self.client.setattr(self.node(name), Set.ATIME | Set.MTIME, **fields)
        found = fuse.ATTR.unpack_from(data, 16)  # type: ignore[arg-type]  # setattr's answer is bytes
        signed = [seconds - (seconds >> 63 << 64) for seconds in found[3:5]]
        return signed[0] * 10**9 + found[6], signed[1] * 10**9 + found[7]

    def set_attribute(self, name: str, key: str, size: int, flags: int) -> None:
        more = key.encode() + b"\0" + b"v" * size
        self.call(Op.SETXATTR, self.node(name), "<II", size, flags, more=more)

    def attribute(self, name: str, key: str, size: int) -> bytes:
        return self.call(Op.GETXATTR, self.node(name), "<II", size, 0, more=key.encode() + b"\0")

    def remove_attribute(self, name: str, key: str) -> None:
        self.client.call(Op.REMOVEXATTR, self.node(name), key.encode() + b"\0")

    def attributes(self, name: str) -> list[bytes]:
        data = self.call(Op.LISTXATTR, self.node(name), "<II", 4096, 0)
        return sorted(data.split(b"\0")[:-1])


MISSING = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}
"""A path that leads nowhere: which of them depends on who walks it."""


def outcome(acts: Any, act: str, *values: Any) -> Any:
    try:
        return getattr(acts, act)(*values)
    except FuseError as error:
        code = next(code for code, name in errno.errorcode.items() if name == str(error))
    except OSError as error:
        code = error.errno or 0
    return f"errno {errno.errorcode[min(MISSING) if code in MISSING else code]}"


def tree(root: Path) -> dict[str, Any]:
    found = {}
    for path in sorted(root.rglob("*")):
        about = path.lstat()
        data = path.read_bytes() if stat.S_ISREG(about.st_mode) else b""
        found[str(path.relative_to(root))] = about.st_mode, about.st_nlink, data
    return found


names = st.sampled_from(("a", "b", "d", "d/a", "d/b"))
offsets = st.sampled_from((0, 1, 4095, 4096, 8192, 100_000))
keys = st.sampled_from(("user.x", "user.y", "user." + "z" * 250, "user.", "user." + "q" * 251))
sizes = st.sampled_from((0, 1, 300, 70_000))
moments = st.sampled_from((0, 1, 10**9 + 5, 1_700_000_000_123_456_789, -1_500_000_001))
acts = st.one_of(
    st.tuples(st.sampled_from(("create", "mkdir", "symlink", "unlink", "rmdir", "attributes")), names),
    st.tuples(st.just("rename"), names, names, st.sampled_from((0, NOREPLACE, EXCHANGE))),
    st.tuples(st.just("write"), names, offsets, st.integers(0, 5000)),
    st.tuples(st.just("allocate"), names, st.sampled_from((0, 1, 2, 3, 0x10, 0x11)), offsets, offsets),
    st.tuples(st.just("seek"), names, offsets, st.sampled_from((os.SEEK_DATA, os.SEEK_HOLE))),
    st.tuples(st.just("copy"), names, names, offsets, offsets),
    st.tuples(st.just("truncate"), names, offsets),
    st.tuples(st.just("times"), names, moments, moments),
    st.tuples(st.just("set_attribute"), names, keys, sizes, st.sampled_from((0, 1, 2))),
    st.tuples(st.just("attribute"), names, keys, st.sampled_from((0, 1, 300, 65536))),
    st.tuples(st.just("remove_attribute"), names, keys),
)


@pytest.mark.once
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(script=st.lists(acts, max_size=30))
def test_acts_end_as_on_the_host(script: list[tuple[Any, ...]], tmp_path_factory: Any) -> None:
    """Whatever is done, in whatever order, results, errors, trees, data and attributes are those of the host."""
    base = tmp_path_factory.mktemp("differ")
    for name in ("host", "guest"):
        (base / name / "d").mkdir(parents=True)
        (base / name / "a").write_bytes(b"a" * 10_000)
    client = Client(base / "guest")
    direct, served = Direct(base / "host"), Served(client)
    try:
        for act in script:
            assert outcome(served, *act) == outcome(direct, *act), act
        assert tree(base / "guest") == tree(base / "host")
    finally:
        client.close()


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    (tmp_path / "file").write_bytes(b"hello")
    (tmp_path / "link").symlink_to("/nowhere")
    made = Client(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("key", ["system.posix_acl_access", "nothing", "xuser.a"])
def test_other_attributes_are_refused(client: Client, key: str) -> None:
    """Attributes of other kinds are not read, set or removed."""
    served = Served(client)
    for name in ("file", "link"):
        with fails(errno.EOPNOTSUPP):
            served.set_attribute(name, key, 1, 0)
        with fails(errno.EOPNOTSUPP):
            served.attribute(name, key, 100)
        with fails(errno.EOPNOTSUPP):
            served.remove_attribute(name, key)


@pytest.mark.parametrize("flags", [NOREPLACE | EXCHANGE, WHITEOUT | EXCHANGE, 64])
def test_other_renames_are_refused(client: Client, flags: int) -> None:
    """Flags that make no sense together, or are unknown, rename nothing."""
    with fails(errno.EINVAL):
        Served(client).rename("file", "other", flags)
    assert client.lookup(b"file")


def test_a_value_cut_short_is_refused(client: Client) -> None:
    """A message that says more bytes than it has, or a name without an end, sets nothing."""
    served = Served(client)
    with fails(errno.EINVAL):
        served.call(Op.SETXATTR, served.node("file"), "<II", 5, 0, more=b"user.x\0abc")
    with fails(errno.EINVAL):
        served.call(Op.SETXATTR, served.node("file"), "<II", 0, 0, more=b"user.x")
    assert served.attributes("file") == []


@pytest.mark.parametrize(("offset", "length"), [(1 << 63, 1), (0, 1 << 63), ((1 << 63) - 1, 1), ((1 << 64) - 1,) * 2])
def test_no_file_is_as_long_as_that(client: Client, offset: int, length: int) -> None:
    """Offsets that the host's calls would take as negative are refused."""
    served = Served(client)
    with fails(errno.EFBIG):
        served.allocate("file", 0, offset, length)
    with fails(errno.EOPNOTSUPP):
        served.allocate("file", 8, 0, 4096)


def test_one_time_is_set_and_the_other_stays(client: Client, tmp_path: Path) -> None:
    """SETATTR with one time leaves the other as it is, to the nanosecond; "now" is the host's."""
    os.utime(tmp_path / "file", ns=(5, 1_600_000_000_000_000_007))
    node = client.lookup(b"file")
    client.setattr(node, Set.ATIME, atime=9, atime_ns=8)
    about = (tmp_path / "file").stat()
    assert (about.st_atime_ns, about.st_mtime_ns) == (9_000_000_008, 1_600_000_000_000_000_007)
    client.setattr(node, Set.MTIME | Set.MTIME_NOW)
    about = (tmp_path / "file").stat()
    assert about.st_atime_ns == 9_000_000_008
    assert about.st_mtime_ns > 1_700_000_000_000_000_000


def test_an_open_file_without_a_name_still_has_attributes(client: Client, tmp_path: Path) -> None:
    """GETATTR with the handle of a file that was unlinked and whose inode was put away answers from the handle."""
    node = client.lookup(b"file")
    handle = client.open(node, os.O_RDWR)
    (tmp_path / "file").unlink()
    tree = client.bench.device.tree
    tree.inode(node).node = None
    with fails(errno.ESTALE):
        client.call(Op.GETATTR, node, struct.pack("<IIQ", 0, 0, 0))
    data = client.call(Op.GETATTR, node, struct.pack("<IIQ", 1, 0, handle))
    assert fuse.ATTR.unpack_from(data, 16)[1] == 5


def test_a_readonly_share_changes_no_more_than_before(tmp_path: Path) -> None:
    """Attributes, allocation and renames with flags are refused too; attributes can be read."""
    (tmp_path / "file").write_bytes(b"hello")
    os.setxattr(tmp_path / "file", "user.x", b"1")
    client = Client(tmp_path, readonly=True)
    served = Served(client)
    node = served.node("file")
    with fails(errno.EROFS):
        served.set_attribute("file", "user.x", 2, 0)
    with fails(errno.EROFS):
        served.remove_attribute("file", "user.x")
    with fails(errno.EROFS):
        served.rename("file", "other", NOREPLACE)
    handle = client.open(node, os.O_RDONLY)
    with fails(errno.EROFS):
        served.call(Op.FALLOCATE, node, "<QQQII", handle, 0, 4096, 0, 0)
    assert served.attribute("file", "user.x", 10) == b"1"
    client.close()


def test_exchanged_inodes_are_found_again(client: Client, tmp_path: Path) -> None:
    """After an exchange both inodes are what they were, under each other's name, even when they were put away."""
    (tmp_path / "other").write_bytes(b"something else")
    file, other = client.lookup(b"file"), client.lookup(b"other")
    Served(client).rename("file", "other", EXCHANGE)
    for node, size in ((file, 5), (other, 14)):
        client.bench.device.tree.inode(node).node = None
        data = client.call(Op.GETATTR, node, struct.pack("<IIQ", 0, 0, 0))
        assert fuse.ATTR.unpack_from(data, 16)[1] == size
    assert client.lookup(b"other") == file
