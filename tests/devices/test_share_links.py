"""Both servers of shared directories: links that are files of their own, kept attributes, whiteouts, and races."""

from __future__ import annotations

import errno
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cardcage.errors import ConfigError
from cardcage_virtio.share.fuse import Op
from cardcage_virtio.share.p9_wire import text
from share_wire import WIRES, Fuse, Nine

HOST_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, whose attributes trusted.* are")

SWAP = """
import os, shutil, sys
name, outside = sys.argv[1:]
makes = lambda: os.mkdir(name), lambda: os.symlink(outside, name), lambda: os.symlink(outside + "/secret", name)
print("begun", flush=True)
while True:
    for make in makes:
        for act in (make, lambda: os.unlink(name), lambda: shutil.rmtree(name)):  # which follows no link
            try:
                act()
            except OSError:
                pass
"""


@pytest.fixture(params=["fs", "9p"])
def wire(request: pytest.FixtureRequest, share: Path) -> Iterator[Any]:
    made = WIRES[request.param](share)
    yield made
    made.close()


@pytest.fixture
def fs(share: Path) -> Iterator[Fuse]:
    made = Fuse(share)
    yield made
    made.close()


@pytest.fixture
def nine(share: Path) -> Iterator[Nine]:
    made = Nine(share)
    yield made
    made.close()


def fails(wire: Any, code: int) -> Any:
    return pytest.raises(wire.error, match=errno.errorcode[code])


def everything(folder: Path) -> list[Any]:
    """All that can be told of *folder* and what is in it."""
    found = []
    for path in (folder, *sorted(folder.rglob("*"))):
        about = path.lstat()
        data = path.read_bytes() if stat.S_ISREG(about.st_mode) else b""
        names = os.listxattr(path, follow_symlinks=False)
        found.append((path, about.st_mode, about.st_nlink, about.st_uid, about.st_gid, about.st_mtime_ns, data, names))
    return found


def test_a_link_is_a_file_of_its_own(wire: Any, share: Path) -> None:
    """Owner, times, names and attributes of a symbolic link are its own, and what it leads to stays as it is."""
    before = everything(share.parent / "outside")
    up = wire.lookup(1, b"up")
    wire.set(up, uid=os.getuid(), gid=os.getgid())
    wire.set(up, atime=(5, 6), mtime=(7, 8))
    wire.link(up, 1, b"other")
    found = (share / "other").lstat()
    assert stat.S_ISLNK(found.st_mode)
    assert (found.st_nlink, found.st_mtime_ns, found.st_uid) == (2, 7_000_000_008, os.getuid())
    for key in (b"user.x", b"trusted.x", b"security.capability"):
        with fails(wire, errno.EPERM):
            wire.set_attribute(up, key, b"v", 0)
        with fails(wire, errno.ENODATA):
            wire.attribute(up, key)
    assert wire.attributes(up) == []
    with fails(wire, errno.EOPNOTSUPP):
        wire.set(up, mode=0o777)
    assert everything(share.parent / "outside") == before


def test_a_link_that_is_swapped_leads_nowhere(wire: Any, share: Path) -> None:
    """A link that was looked up stays that link when the host puts another in its place, and so does a file."""
    outside = share.parent / "outside"
    before = everything(outside)
    up, file = wire.lookup(1, b"up"), wire.lookup(1, b"file")
    for name in ("up", "file"):
        (share / name).rename(share / f"old-{name}")
        (share / name).symlink_to(outside / "secret")
    for node in (up, file):
        wire.set(node, uid=os.getuid(), atime=(5, 6), mtime=(7, 8))
        wire.link(node, 1, b"linked-%d" % node)
    wire.set_attribute(file, b"user.x", b"v", 0)
    wire.set(file, mode=0o640, size=3)
    assert (share / f"linked-{up}").readlink() == Path("../outside/secret")
    assert (share / "old-file").read_text() == "hel"
    assert everything(outside) == before


def test_a_race_leads_nowhere(wire: Any, share: Path) -> None:
    """While the host swaps a name between a file, a directory and links that lead out, nothing outside changes."""
    outside = share.parent / "outside"
    before = everything(outside)
    swapper = subprocess.Popen([sys.executable, "-c", SWAP, share / "x", outside], stdout=subprocess.PIPE)
    assert swapper.stdout is not None
    swapper.stdout.readline()
    try:
        for at in range(60):
            for call, values in (
                ("mkdir", (1, b"x", 0o777)),
                ("create", (1, b"x", os.O_RDWR | os.O_TRUNC, 0o666)),
                ("symlink", (1, b"x", b"../outside/secret")),
                ("mknod", (1, b"x", stat.S_IFIFO | 0o777, 0)),
                ("rename", (1, b"x", 1, b"y%d" % at, 0)),
            ):
                try:
                    made = getattr(wire, call)(*values)
                    node = made[0] if isinstance(made, tuple) else made or wire.lookup(1, b"x")
                    wire.set(node, uid=os.getuid(), mtime=(7, 8))
                    wire.set_attribute(node, b"user.x", b"v", 0)
                    wire.set(node, mode=0o777, size=0)
                    wire.create(node, b"made", os.O_RDWR, 0o666)
                except wire.error:
                    continue
    finally:
        swapper.kill()
        swapper.communicate()
    assert everything(outside) == before


def test_what_is_there_is_not_opened_to_be_made(wire: Any, share: Path) -> None:
    """O_CREAT of a FIFO or socket that the host has opens neither, and a file that is there keeps owner and mode."""
    os.mkfifo(share / "pipe")
    with fails(wire, errno.EOPNOTSUPP):
        wire.create(1, b"pipe", os.O_WRONLY, 0o600)
    with fails(wire, errno.EISDIR):
        wire.create(1, b"sub", os.O_RDONLY, 0o600)
    with fails(wire, errno.EEXIST):
        wire.create(1, b"file", os.O_RDWR | os.O_EXCL, 0o600)
    before = (share / "file").stat()
    handle = wire.create(1, b"file", os.O_RDWR | os.O_TRUNC, 0o777)[1]
    found = (share / "file").stat()
    assert (found.st_size, found.st_mode, found.st_uid) == (0, before.st_mode, before.st_uid)
    wire.drop(handle)


@HOST_ONLY
def test_attributes_of_the_guest_are_not_the_hosts(wire: Any, share: Path) -> None:
    """trusted.* and security.* of the guest are kept apart from the host's, which it neither sees nor sets."""
    os.setxattr(share / "file", "trusted.x", b"host")
    os.setxattr(share / "file", "trusted.host", b"host")
    node = wire.lookup(1, b"file")
    assert wire.attributes(node) == []
    for key in (b"trusted.x", b"trusted.host"):
        with fails(wire, errno.ENODATA):
            wire.attribute(node, key)
    for key in (b"trusted.x", b"security.capability", b"user.x"):
        wire.set_attribute(node, key, b"guest", os.XATTR_CREATE)
        assert wire.attribute(node, key) == b"guest"
    assert wire.attributes(node) == [b"security.capability", b"trusted.x", b"user.x"]
    assert os.getxattr(share / "file", "trusted.x") == b"host"
    assert "security.capability" not in os.listxattr(share / "file")
    assert os.getxattr(share / "file", "user.virtiofs.trusted.x") == b"guest"
    for key in wire.attributes(node):
        wire.remove_attribute(node, key)
    assert sorted(os.listxattr(share / "file")) == ["trusted.host", "trusted.x"]


def test_no_user_of_the_guest_forges_what_is_kept(wire: Any, share: Path) -> None:
    """The names by which attributes are kept are not the guest's: any user of it may set user.*."""
    node = wire.lookup(1, b"file")
    wire.set_attribute(node, b"trusted.x", b"root's", 0)
    key = b"user.virtiofs.trusted.x"
    with fails(wire, errno.EPERM):
        wire.set_attribute(node, key, b"forged", 0)
    with fails(wire, errno.ENODATA):
        wire.attribute(node, key)
    with pytest.raises(wire.error):
        wire.remove_attribute(node, key)
    assert wire.attributes(node) == [b"trusted.x"]
    assert wire.attribute(node, b"trusted.x") == b"root's"


def test_whiteouts_are_made_and_devices_are_not(wire: Any, share: Path) -> None:
    """The character device 0:0, which is overlayfs's mark, can be made and listed; no other device can."""
    wire.mknod(1, b"gone", stat.S_IFCHR, 0)
    found = (share / "gone").lstat()
    assert (stat.S_IFMT(found.st_mode), found.st_rdev) == (stat.S_IFCHR, 0)
    for mode, device in ((stat.S_IFCHR, 0x103), (stat.S_IFBLK, 0), (stat.S_IFBLK, 0x800)):
        with fails(wire, errno.EPERM):
            wire.mknod(1, b"null", mode | 0o666, device)
    with fails(wire, errno.EOPNOTSUPP):
        wire.open(wire.lookup(1, b"gone"), os.O_RDWR)


def test_set_user_id_is_not_set(wire: Any, share: Path) -> None:
    """Set-user-id never reaches the host, and set-group-id is of directories alone."""
    wire.set(wire.lookup(1, b"file"), mode=0o6755)
    wire.set(wire.lookup(1, b"sub"), mode=0o6755)
    wire.drop(wire.create(1, b"new", os.O_RDWR, 0o6755)[1])
    modes = [stat.S_IMODE((share / name).stat().st_mode) for name in ("file", "sub", "new")]
    assert modes == [0o755, 0o2755, 0o755]


def test_a_rename_leaves_a_whiteout(fs: Fuse, share: Path) -> None:
    """renameat2 with RENAME_WHITEOUT moves the file and leaves a character device 0:0."""
    fs.rename(1, b"file", 1, b"moved", 4)
    assert (share / "moved").read_text() == "hello"
    assert stat.S_ISCHR((share / "file").lstat().st_mode)


def test_a_nameless_file_is_given_a_name(fs: Fuse, share: Path) -> None:
    """O_TMPFILE makes a file that link names, unless with O_EXCL; a file or link is no place for one."""
    node, handle = fs.temporary(1, os.O_RDWR, 0o640)
    assert fs.write(handle, 0, b"text") == 4
    assert fs.about(node)[:2] == [stat.S_IFREG | 0o640, 0]
    fs.link(node, 1, b"named")
    assert (share / "named").read_text() == "text"
    fs.drop(handle)
    other, handle = fs.temporary(1, os.O_RDWR | os.O_EXCL, 0o640)
    with fails(fs, errno.ENOENT):
        fs.link(other, 1, b"other")
    for name in (b"file", b"up"):
        with fails(fs, errno.ENOTDIR):
            fs.temporary(fs.lookup(1, name), os.O_RDWR, 0o600)
    readonly = Fuse(share, readonly=True)
    with fails(fs, errno.EROFS):
        readonly.temporary(1, os.O_RDWR, 0o600)
    readonly.close()


def test_each_write_says_whether_it_appends(fs: Fuse, share: Path) -> None:
    """A write appends when the guest's file does as it is written, not when it was opened."""
    handle = fs.open(fs.lookup(1, b"file"), os.O_RDWR | os.O_APPEND)
    assert fs.write(handle, 0, b"J") == 1
    with (share / "file").open("ab") as file:
        file.write(b" host")
    assert fs.write(handle, 5, b" guest", os.O_APPEND | os.O_RDWR) == 6
    assert (share / "file").read_text() == "Jello host guest"


def test_types_are_listed(fs: Fuse, share: Path) -> None:
    """A listing tells the type of each kind of file."""
    os.mkfifo(share / "pipe")
    fs.mknod(1, b"gone", stat.S_IFCHR, 0)
    handle = fs.client.open(1, op=Op.OPENDIR)
    rows = fs.client.call(Op.READDIR, 1, struct.pack("<QQIIQII", handle, 0, 4096, 0, 0, 0, 0))
    found = {}
    while rows:
        length, kind = struct.unpack_from("<II", rows, 16)
        found[rows[24 : 24 + length]] = kind
        rows = rows[24 + (length + 7 & ~7) :]
    assert found == {b".": 4, b"..": 4, b"file": 8, b"sub": 4, b"link": 10, b"up": 10, b"pipe": 1, b"gone": 2}


def test_a_directory_that_was_removed_is_empty(wire: Any, share: Path) -> None:
    """A directory that is open while the host removes it has no entries, as for the host's programs."""
    (share / "empty").mkdir()
    node = wire.lookup(1, b"empty")
    if isinstance(wire, Nine):
        handle = wire.open(node, os.O_DIRECTORY)
        (share / "empty").rmdir()
        assert wire.client.names(handle) == [b".", b".."]
    else:
        handle = wire.client.open(node, op=Op.OPENDIR)
        (share / "empty").rmdir()
        assert wire.client.call(Op.READDIR, node, struct.pack("<QQIIQII", handle, 2, 4096, 0, 0, 0, 0)) == b""


@pytest.mark.parametrize("path", ["a\0b", "sub\ud800"])
@pytest.mark.parametrize("kind", ["fs", "9p"])
def test_a_path_that_is_none_is_a_configuration_error(kind: str, path: str) -> None:
    """A path with a NUL, or with what no file name can have, is refused by its key."""
    with pytest.raises(ConfigError, match="path"):
        WIRES[kind](path)


def test_an_attribute_is_set_when_it_is_given_up(nine: Nine, share: Path) -> None:
    """By 9P a value is set by its clunk, whole; a part of it, too long a one, or one written elsewhere is refused."""
    client, node = nine.client, nine.lookup(1, b"file")

    def begin(fid: int, size: int) -> None:
        client.walk(node, fid)
        client.call(32, struct.pack("<I", fid) + text(b"user.x") + struct.pack("<QI", size, 0))

    begin(90, 4)
    assert client.write(90, 0, b"ab") == 2
    for offset, data in ((0, b"x"), (2, b"xyz"), (1 << 40, b"x")):
        with fails(nine, errno.EINVAL):
            client.write(90, offset, data)
    with fails(nine, errno.EBADF):
        client.read(90)
    with fails(nine, errno.EINVAL):
        nine.drop(90)
    with fails(nine, errno.E2BIG):
        begin(91, 65537)
    assert os.listxattr(share / "file") == []
    nine.set_attribute(node, b"user.x", b"abc", 0)
    nine.remove_attribute(node, b"user.x")
    assert nine.attributes(node) == []
    with fails(nine, errno.EBADF):
        handle = nine.open(node, os.O_RDWR)
        client.call(32, struct.pack("<I", handle) + text(b"user.x") + struct.pack("<QI", 1, 0))


def test_attributes_that_are_written_are_few(nine: Nine) -> None:
    """A guest that begins to write many values, and ends none, hears ENFILE, until it gives them up."""
    node = nine.lookup(1, b"file")

    def begin(fid: int) -> None:
        nine.client.walk(node, fid)
        nine.client.call(32, struct.pack("<I", fid) + text(b"user.x") + struct.pack("<QI", 65536, 0))

    for fid in range(100, 164):
        begin(fid)
    with fails(nine, errno.ENFILE):
        begin(200)
    with fails(nine, errno.EINVAL):
        nine.drop(100)
    begin(201)


def test_an_attribute_is_not_set_while_policy_bars_it(nine: Nine, share: Path) -> None:
    """A value that was written before the share was revoked is not set by giving its fid up, which is served."""
    node = nine.lookup(1, b"file")
    nine.client.walk(node, 90)
    nine.client.call(32, struct.pack("<I", 90) + text(b"user.x") + struct.pack("<QI", 1, 0))
    nine.client.write(90, 0, b"v")
    nine.client.bench.slot.host.change("image", "write", allowed=False)
    with fails(nine, errno.EACCES):
        nine.drop(90)
    assert 90 not in nine.client.bench.device.fids
    assert os.listxattr(share / "file") == []


def test_an_attribute_goes_on_elsewhere(nine: Nine, share: Path) -> None:
    """A value half written, and whose fid is whose, are part of a saved state."""
    node = nine.lookup(1, b"file")
    nine.client.walk(node, 90)
    nine.client.call(32, struct.pack("<I", 90) + text(b"user.x") + struct.pack("<QI", 4, 0))
    nine.client.write(90, 0, b"va")
    state = nine.client.bench.device.save()
    other = Nine(share)
    other.client.bench.device.load(state)
    other.client.write(90, 2, b"lu")
    other.drop(90)
    assert os.getxattr(share / "file", "user.x") == b"valu"
    assert other.client.bench.device.save().users == state.users[:-1]
    other.close()
