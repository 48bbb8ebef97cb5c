"""The FUSE server over a real directory, and attempts to leave it."""

from __future__ import annotations

import errno
import os
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from cardcage.errors import ConfigError
from cardcage_virtio.share.fs import Fs, FsOptions
from cardcage_virtio.share.fuse import Op, Set
from cardcage_virtio.share.fuse_tree import Tree
from cardcage_virtio.share.p9_tree import Node
from cardcage_virtio.testing import Bench
from fuse_client import Client, FuseError, fails
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def client(share: Path) -> Iterator[Client]:
    client = Client(share)
    yield client
    client.close()


def test_files_are_read_and_written(client: Client, share: Path) -> None:
    """Lookup, open, read, write, create, fsync, seek, copy and attributes act on the host's files."""
    handle = client.open(client.lookup(b"file"), os.O_RDWR)
    assert client.read(handle) == b"hello"
    assert client.write(handle, 5, b" world") == 6
    client.call(Op.FSYNC, 1, struct.pack("<QII", handle, 0, 0))
    assert (share / "file").read_text() == "hello world"
    node, new = client.create(b"new", mode=0o4640, node=client.lookup(b"sub"))
    assert client.write(new, 0, b"x" * 50000) == 50000
    assert client.read(new) == b"x" * 50000
    assert (share / "sub" / "new").stat().st_mode & 0o7777 == 0o640
    assert struct.unpack_from("<Q", client.call(Op.LSEEK, node, struct.pack("<QQII", new, 10, os.SEEK_HOLE, 0))) == (
        50000,
    )
    copied = client.call(Op.COPY_FILE_RANGE, node, struct.pack("<7Q", handle, 0, node, new, 2, 5, 0))
    assert copied[:4] == struct.pack("<I", 5)
    assert client.read(new, 0, 9) == b"xxhelloxx"
    client.setattr(
        node, Set.MODE | Set.SIZE | Set.ATIME | Set.MTIME, mode=0o600, size=10, atime=7, mtime=-5, mtime_ns=3
    )
    found = (share / "sub" / "new").stat()
    assert (found.st_size, found.st_mode & 0o777) == (10, 0o600)
    assert (found.st_atime_ns, found.st_mtime_ns) == (7 * 10**9, -5 * 10**9 + 3)
    client.setattr(node, Set.SIZE | Set.FH, size=3, fh=new)
    assert struct.unpack_from("<Q", client.call(Op.GETATTR, node, bytes(16)), 16 + 8)[0] == 3
    client.call(Op.RELEASE, 1, struct.pack("<QIIQ", new, 0, 0, 0))
    with fails(errno.EBADF):
        client.read(new)


@pytest.mark.parametrize("plus", [False, True])
def test_directories_are_listed_in_pieces(client: Client, share: Path, plus: bool) -> None:
    """A listing that takes many requests names each entry once, and with READDIRPLUS tells its inode."""
    for at in range(300):
        (share / "sub" / f"file-{at}").touch()
    found = client.names(client.lookup(b"sub"), plus=plus, size=400)
    assert sorted(found) == sorted([b".", b"..", *map(os.fsencode, os.listdir(share / "sub"))])
    if plus:
        assert found[b"deep"] == client.lookup(b"deep", client.lookup(b"sub"))
        assert found[b"."] == found[b".."] == 0


def test_names_are_made_moved_and_removed(client: Client, share: Path) -> None:
    """mkdir, rename, link, symlink, readlink, mknod, unlink, rmdir and statfs work."""
    client.call(Op.MKDIR, 1, struct.pack("<II", 0o755, 0) + b"dir\0")
    client.call(Op.RENAME2, 1, struct.pack("<QII", client.lookup(b"dir"), 0, 0) + b"file\0other\0")
    assert (share / "dir" / "other").read_text() == "hello"
    node = client.lookup(b"other", client.lookup(b"dir"))
    client.call(Op.RENAME, client.lookup(b"dir"), struct.pack("<Q", 1) + b"other\0other\0")
    assert client.read(client.open(node)) == b"hello"
    made = client.call(Op.LINK, 1, struct.pack("<Q", node) + b"again\0")
    assert int.from_bytes(made[:8], "little") == node == client.lookup(b"again")
    client.call(Op.SYMLINK, 1, b"soft\0other\0")
    assert client.call(Op.READLINK, client.lookup(b"soft")) == b"other"
    client.call(Op.MKNOD, 1, struct.pack("<IIII", 0o010644, 0, 0, 0) + b"pipe\0")
    assert (share / "pipe").is_fifo()
    client.call(Op.UNLINK, 1, b"again\0")
    client.call(Op.RMDIR, 1, b"dir\0")
    assert sorted(one.name for one in share.iterdir()) == ["link", "other", "pipe", "soft", "sub", "up"]
    assert struct.unpack("<5Q4I24x", client.call(Op.STATFS))[5] == os.statvfs(share).f_bsize
    with fails(errno.EEXIST):
        client.call(Op.RENAME2, 1, struct.pack("<QII", 1, 1, 0) + b"other\0sub\0")


@pytest.mark.parametrize("name", [b"..", b".", b"../outside", b"sub/..", b"/etc", b"", b"x" * 300])
def test_names_with_paths_in_them_are_refused(client: Client, share: Path, name: bytes) -> None:
    """A name is one component: no slash, no dots that lead up."""
    with pytest.raises(FuseError):
        client.lookup(name)
    with pytest.raises(FuseError):
        client.create(name)
    with pytest.raises(FuseError):
        client.call(Op.RENAME, 1, struct.pack("<Q", 1) + b"file\0" + name + b"\0")
    with pytest.raises(FuseError):
        client.call(Op.MKDIR, 1, struct.pack("<II", 0o755, 0) + name + b"\0")
    assert (share / "file").exists()


def test_links_lead_nowhere(client: Client, share: Path) -> None:
    """A symbolic link cannot be walked through, opened, created over, or have its target changed."""
    link, up = client.lookup(b"link"), client.lookup(b"up")
    with fails(errno.ENOTDIR):
        client.lookup(b"secret", link)
    for flags in (0, os.O_RDWR, os.O_TRUNC | os.O_WRONLY):
        with fails(errno.ELOOP):
            client.open(up, flags)
    with pytest.raises(FuseError):
        client.create(b"up", os.O_WRONLY | os.O_TRUNC)
    secret = share.parent / "outside" / "secret"
    before = secret.stat()
    for valid in (Set.MODE, Set.SIZE):
        with pytest.raises(FuseError):
            client.setattr(up, valid, mode=0o777)
    client.setattr(up, Set.ATIME | Set.UID, atime=5, uid=7)
    client.call(Op.LINK, 1, struct.pack("<Q", up) + b"hard\0")
    assert (share / "hard").is_symlink()
    assert secret.stat() == before
    assert secret.read_text() == "secret"
    assert secret.stat().st_mode & 0o777 != 0o777


def test_an_inode_is_the_file_it_was(client: Client, share: Path) -> None:
    """An inode means the file that was looked up, whatever the host puts in its place."""
    sub = client.lookup(b"sub")
    (share / "sub").rename(share / "old")
    (share / "sub").symlink_to(share.parent / "outside")
    with fails(errno.ENOENT):
        client.lookup(b"secret", sub)
    client.create(b"made", node=sub)
    assert (share / "old" / "made").exists()
    assert not (share.parent / "outside" / "made").exists()


def test_special_files_are_not_opened_or_made(client: Client, share: Path) -> None:
    """A FIFO does not hang the server, and no device nodes are made."""
    os.mkfifo(share / "pipe")
    with fails(errno.EOPNOTSUPP):
        client.open(client.lookup(b"pipe"))
    with fails(errno.EPERM):
        client.call(Op.MKNOD, 1, struct.pack("<IIII", 0o020666, 0x103, 0, 0) + b"null\0")


def test_a_readonly_share_changes_nothing(share: Path) -> None:
    """Each request that would change the share is refused, and reading works."""
    client = Client(share, readonly=True)
    node = client.lookup(b"file")
    for flags in (os.O_RDWR, os.O_WRONLY, os.O_TRUNC):
        with fails(errno.EROFS):
            client.open(node, flags)
    with fails(errno.EROFS):
        client.create(b"x")
    with fails(errno.EROFS):
        client.setattr(node, Set.MODE, mode=0)
    handle = client.open(node)
    with fails(errno.EROFS):
        client.write(handle, 0, b"x")
    assert client.read(handle) == b"hello"
    client.close()


def test_forgotten_inodes_are_gone(client: Client) -> None:
    """A number is stale once the guest forgot it as often as it was told, and forgetting more or others is harmless."""
    node = client.lookup(b"file")
    assert client.lookup(b"file") == node
    client.forget(node, 1)
    client.call(Op.GETATTR, node, bytes(16))
    client.forget(node, 1 << 40)
    client.forget(node, 1)
    client.forget(1, 1 << 40)
    with fails(errno.ESTALE):
        client.call(Op.GETATTR, node, bytes(16))
    assert client.lookup(b"file") != node
    assert len(client.bench.device.tree) == 2


def test_many_inodes_need_few_descriptors(share: Path) -> None:
    """Inodes beyond the descriptors are opened again by name, and are stale when another file has the name."""
    tree = Tree(Node.root(str(share)), 16)
    for at in range(100):
        (share / "sub" / f"{at}").write_text(f"{at}")
    sub = tree.lookup(tree.root, b"sub")
    inodes = [tree.lookup(sub, b"%d" % at) for at in range(100)]
    assert sum(one.node is not None for one in inodes) <= 16
    for at, inode in enumerate(inodes):
        assert os.pread(tree.node(inode).open(0), 9, 0) == b"%d" % at
    (share / "keep").touch()  # so that the number of the file that goes is not used again
    os.replace(share / "keep", share / "sub" / "0")
    with pytest.raises(OSError, match="meanwhile"):
        tree.node(inodes[0])
    tree.moved(sub, b"1")
    (share / "sub").rename(share / "moved")
    sub.node = None
    with pytest.raises(OSError, match="meanwhile"):
        tree.node(inodes[2])


def test_a_directory_moved_below_its_child_is_stale(share: Path) -> None:
    """When the host turns a directory's parent into its child, the guest's view goes stale instead of going round."""
    (share / "sub" / "inner").mkdir()
    tree = Tree(Node.root(str(share)), 16)
    sub = tree.lookup(tree.root, b"sub")
    inner = tree.lookup(sub, b"inner")
    (share / "sub" / "inner").rename(share / "inner")
    (share / "sub").rename(share / "inner" / "sub")
    with pytest.raises(OSError, match="moved meanwhile"):
        tree.lookup(inner, b"sub")
    assert inner.path == (b"sub", b"inner")


def test_state_reopens_files(client: Client, share: Path) -> None:
    """A saved server's inodes and handles go on at the same numbers in another; what is gone is logged."""
    node = client.lookup(b"deep", client.lookup(b"sub"))
    handle = client.open(client.lookup(b"file"), os.O_RDWR)
    gone = client.lookup(b"up")
    state = client.bench.device.save()
    (share / "up").unlink()
    other = Client(share, init=False)
    other.bench.device.load(state)
    assert other.read(handle) == b"hello"
    assert other.read(other.open(node)) == b"deep"
    with fails(errno.ESTALE):
        other.call(Op.READLINK, gone)
    assert [event for _, event, _ in other.bench.slot.log.entries] == ["virtio-fs: a file is gone"]
    other.close()


def test_a_share_in_two_processes(share: Path) -> None:
    """A share that is only read may be a copy's too, whose listings are its own; one that is written may not."""
    client = Client(share, readonly=True)
    device: Fs = client.bench.device
    client.open(1, op=Op.OPENDIR)
    file = client.open(client.lookup(b"file"))
    (there,) = [one.fd for one in device.handles.values() if one.inode.number == 1]
    parents = os.dup(there)  # the same open file, as the parent of a fork has it
    assert device.may_fork() == ""
    device.forked()
    os.lseek(there, 0, os.SEEK_END)
    assert os.lseek(parents, 0, os.SEEK_CUR) == 0
    assert not os.get_inheritable(there)
    os.close(parents)
    assert b"file" in client.names()
    assert client.read(file)
    client.close()
    written = Client(share)
    assert "may change" in written.bench.device.may_fork()
    written.close()


def test_an_older_kernel_settles_on_this_version(share: Path) -> None:
    """INIT of another major version is answered with ours alone, and INIT again forgets what was open."""
    client = Client(share)
    handle = client.open(client.lookup(b"file"))
    assert client.call(Op.INIT, 0, struct.pack("<IIII", 8, 0, 0, 0))[:8] == struct.pack("<II", 7, 31)
    with fails(errno.EBADF):
        client.read(handle)
    with fails(errno.ENOSYS):
        client.call(39)
    client.close()


@pytest.mark.parametrize("options", [{"path": "/nonexistent/x"}, {"path": "/", "tag": "ü" * 30}])
def test_bad_options_are_configuration_errors(options: dict[str, Any]) -> None:
    """A path that is no directory, or a tag that does not fit, is refused with its name."""
    with pytest.raises(ConfigError, match=r"nonexistent|36 bytes"):
        Bench(Fs(FsOptions(**options)))


NAME = st.sampled_from(
    [b"..\0", b"file\0", b"sub\0", b"deep\0", b"link\0", b"up\0", b"new\0", b"../outside\0", b"\0", b"x"]
)
NUMBER = st.sampled_from([0, 1, 2, 3, 5, 64, 1 << 20, (1 << 32) - 1]).map(lambda value: struct.pack("<I", value))
LONG = st.sampled_from([0, 1, 2, 3, 4096, (1 << 63) - 1, (1 << 64) - 1]).map(lambda value: struct.pack("<Q", value))
BODY = st.lists(NAME | NUMBER | LONG | st.binary(max_size=12), max_size=9).map(b"".join)


def opened_below(folder: Path) -> list[str]:
    """Files of *folder* that this process has open."""
    found = []
    for one in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the listing's own
            found.append(os.readlink(f"/proc/self/fd/{one}"))
    return [one for one in found if one.startswith(f"{folder}/")]


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, 52), st.integers(0, 4), BODY, st.integers(0, 300)), max_size=12))
def test_hostile_messages_stay_inside(tmp_path_factory: Any, messages: list[tuple[int, int, bytes, int]]) -> None:
    """No sequence of messages leaves the share or keeps descriptors, and each is answered or ends in NEEDS_RESET."""
    base = tmp_path_factory.mktemp("fs")
    (base / "outside").mkdir()
    (base / "outside" / "secret").write_text("secret")
    (base / "share" / "sub").mkdir(parents=True)
    (base / "share" / "file").write_text("hello")
    (base / "share" / "link").symlink_to(base / "outside")
    client = Client(base / "share")
    bench = client.bench
    for op, node, body, room in messages:
        bench.driver(1).add([client.send(op, node, body)], [room] if room else [])
        bench.kick(1)
        bench.until(lambda: bool(list(bench.driver(1).used())) or bench.virtio.status & 64 != 0)
        if bench.virtio.status & 64:
            break
    client.close()
    assert set(opened_below(base)) <= {str(base / "share")}  # the shared directory itself
    assert (base / "outside" / "secret").read_text() == "secret"
    assert os.listdir(base / "outside") == ["secret"]
    assert sorted(os.listdir(base)) == ["outside", "share"]


def test_a_revoked_share_refuses_and_comes_back(share: Path) -> None:
    """While policy bars the directory each request is EACCES, what gives up access is served, and then it goes on."""
    client = Client(share)
    node = client.lookup(b"file")
    handle, other = client.open(node, os.O_RDWR), client.open(node)
    client.bench.slot.host.change("image", "write", allowed=False)
    for act in (
        lambda: client.read(handle),
        lambda: client.write(handle, 0, b"x"),
        lambda: client.lookup(b"file"),
        lambda: client.open(node),
        lambda: client.create(b"new"),
        lambda: client.call(Op.GETATTR, 1, bytes(16)),
    ):
        with fails(errno.EACCES):
            act()
    client.call(Op.RELEASE, node, struct.pack("<QIIQ", other, 0, 0, 0))
    client.forget(node, 1)
    assert sorted(client.bench.device.handles) == [handle]
    assert (share / "file").read_text() == "hello"
    assert not (share / "new").exists()
    client.bench.slot.host.change("image", "write", allowed=True)
    assert client.read(handle) == b"hello"
    client.create(b"new")
    client.close()


def served(client: Client) -> dict[str, int]:
    """How many requests are served on the notifying thread, and how many were passed on, from now on."""
    counts = {"quick": 0, "passed on": 0}
    workers = client.bench.device._workers
    quick = workers._quick
    if quick is None:
        pytest.skip("the file system of temporary files is none that is known to be local")

    def count(request: Any) -> int | None:
        written: int | None = quick(request)
        counts["quick" if written is not None else "passed on"] += 1
        return written

    workers._quick = count
    return counts


def test_what_is_at_hand_takes_no_thread(client: Client, share: Path) -> None:
    """Names, attributes and data in the host's caches are served at once; what is written, ends or went is not."""
    node = client.lookup(b"file")
    counts = served(client)
    client.lookup(b"file")
    client.call(Op.GETATTR, node, bytes(16))
    handle = client.open(node)
    assert client.read(handle, size=5) == b"hello"
    client.call(Op.FLUSH, node, bytes(24))
    client.call(Op.RELEASE, node, struct.pack("<QIIQ", handle, 0, 0, 0))
    assert counts == {"quick": 6, "passed on": 0}
    handle = client.open(node, os.O_RDWR)
    assert client.read(handle) == b"hello"
    client.call(Op.RELEASE, node, struct.pack("<QIIQ", handle, 0, 0, 0))
    handle = client.open(node)
    (share / "file").unlink()
    client.call(Op.RELEASE, node, struct.pack("<QIIQ", handle, 0, 0, 0))
    assert counts == {"quick": 7, "passed on": 4}


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.ENOSYS, errno.EXDEV])
def test_what_would_wait_goes_to_the_thread(client: Client, monkeypatch: Any, code: int) -> None:
    """Where the host cannot say at once, or not at all, the thread serves the request, with the same answer."""

    def refuse(fd: int, name: bytes, flags: int) -> int:
        raise OSError(code, "")

    monkeypatch.setattr("cardcage_virtio.share.fuse_tree.open_cached", refuse)
    counts = served(client)
    assert client.read(client.open(client.lookup(b"file")), size=5) == b"hello"
    with fails(errno.ENOENT):
        client.lookup(b"nothing")
    assert counts["passed on"] >= 2
