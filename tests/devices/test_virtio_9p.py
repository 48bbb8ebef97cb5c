"""The 9P server over a real directory, and attempts to leave it."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from cardcage.errors import ConfigError
from cardcage_virtio.share.p9 import P9, P9Options
from cardcage_virtio.share.p9_wire import text
from cardcage_virtio.testing import Bench
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nine_client import Client, NineError


@pytest.fixture
def client(share: Path) -> Any:
    client = Client(share)
    yield client
    client.close()


def test_files_are_read_and_written(client: Client, share: Path) -> None:
    """Walk, open, read, write, create, fsync and attributes act on the host's files."""
    client.walk(0, 1, b"file")
    client.open(1, os.O_RDWR)
    assert client.read(1) == b"hello"
    assert client.write(1, 5, b" world") == 6
    client.call(50, struct.pack("<II", 1, 0))
    assert (share / "file").read_text() == "hello world"
    client.walk(0, 2, b"sub")
    client.create(2, b"new", mode=0o4755)
    client.write(2, 0, b"x" * 50000)
    assert client.read(2) == b"x" * 50000
    assert (share / "sub" / "new").stat().st_mode & 0o7777 in (0o755, 0o750, 0o700)
    data = client.call(24, struct.pack("<IQ", 2, 0x7FF))
    assert struct.unpack_from("<Q", data, 8 + 13 + 12 + 16)[0] == 50000
    client.call(26, struct.pack("<IIIIIQQQQQ", 2, 1 | 8 | 0x20 | 0x100, 0o600, 0, 0, 10, 0, 0, 1000, 5))
    found = (share / "sub" / "new").stat()
    assert (found.st_size, found.st_mode & 0o777, found.st_mtime_ns) == (10, 0o600, 1000 * 10**9 + 5)
    client.call(120, struct.pack("<I", 2))
    with client.fails(errno.EBADF):
        client.read(2)


def test_directories_and_names(client: Client, share: Path) -> None:
    """Listing in small pieces, mkdir, rename, link, symlink, readlink, unlink and remove work."""
    client.walk(0, 1)
    client.open(1)
    assert sorted(client.names(1)) == [b".", b"..", b"file", b"link", b"sub", b"up"]
    client.call(72, struct.pack("<I", 0) + text(b"dir") + struct.pack("<II", 0o755, 0))
    client.call(74, struct.pack("<I", 0) + text(b"file") + struct.pack("<I", 0) + text(b"other"))
    assert (share / "other").read_text() == "hello"
    client.walk(0, 2, b"other")
    client.call(70, struct.pack("<II", 0, 2) + text(b"again"))
    assert (share / "again").read_text() == "hello"
    client.call(16, struct.pack("<I", 0) + text(b"soft") + text(b"other") + bytes(4))
    client.walk(0, 3, b"soft")
    assert client.call(22, struct.pack("<I", 3)) == text(b"other")
    client.call(76, struct.pack("<I", 0) + text(b"dir") + struct.pack("<I", 0x200))
    client.walk(0, 4, b"again")
    client.call(122, struct.pack("<I", 4))
    assert sorted(one.name for one in share.iterdir()) == ["link", "other", "soft", "sub", "up"]
    assert struct.unpack_from("<I", client.call(8, struct.pack("<I", 0)))[0] == 0x01021997
    client.call(18, struct.pack("<I", 0) + text(b"pipe") + struct.pack("<IIII", 0o010644, 0, 0, 0))
    assert (share / "pipe").is_fifo()


def test_partial_walks_say_how_far_they_came(client: Client) -> None:
    """A walk that fails later returns the qids so far and leaves the new fid unset."""
    assert client.walk(0, 5, b"sub", b"nothing") == 1
    with client.fails(errno.EBADF):
        client.open(5)
    with client.fails(errno.ENOENT):
        client.walk(0, 5, b"nothing", b"sub")


@pytest.mark.parametrize("name", [b"../outside", b"sub/../..", b"/etc", b"a\0b", b".", b"", b"x" * 300])
def test_names_with_paths_in_them_are_refused(client: Client, name: bytes) -> None:
    """A name is one component: no slash, no NUL, no dot."""
    with pytest.raises(NineError):
        client.walk(0, 9, name)
    with pytest.raises(NineError):
        client.create(0, name)


def test_dotdot_ends_at_the_root(client: Client, share: Path) -> None:
    """Any number of .. stays inside, also after the host moved a directory elsewhere."""
    assert client.walk(0, 1, *[b".."] * 16) == 16
    client.open(1)
    assert b"outside" not in client.names(1)
    client.walk(0, 2, b"sub")
    (share / "sub").rename(share.parent / "outside" / "moved")
    client.walk(2, 3, b"..", b"..")
    client.open(3)
    assert b"outside" not in client.names(3)
    assert b"secret" not in client.names(3)


def test_links_are_not_followed(client: Client) -> None:
    """A symbolic link is not walked through."""
    assert client.walk(0, 1, b"link", b"secret") == 1
    with client.fails(errno.EBADF):
        client.open(1)


def test_links_cannot_be_opened_or_created_over(client: Client, share: Path) -> None:
    """Opening a link, or creating through one, is refused and leaves its target alone."""
    client.walk(0, 1, b"up")
    for flags in (0, os.O_RDWR, os.O_TRUNC | os.O_WRONLY):
        with client.fails(errno.ELOOP):
            client.open(1, flags)
    with pytest.raises(NineError):
        client.create(0, b"up", os.O_WRONLY | os.O_TRUNC)
    secret = share.parent / "outside" / "secret"
    before = secret.stat()
    for valid in (1, 8):
        with pytest.raises(NineError):
            client.call(26, struct.pack("<IIIIIQQQQQ", 1, valid, 0o777, 0, 0, 0, 0, 0, 0, 0))
    client.call(26, struct.pack("<IIIIIQQQQQ", 1, 2 | 0x20, 0, 7, 0, 0, 0, 0, 0, 0))
    client.call(70, struct.pack("<II", 0, 1) + text(b"hard"))
    assert (share / "hard").is_symlink()
    assert secret.stat() == before
    assert secret.read_text() == "secret"
    assert secret.stat().st_mode & 0o777 != 0o777


def test_a_directory_swapped_for_a_link_stays_the_directory(client: Client, share: Path) -> None:
    """A fid means the file it was walked to, whatever the host puts in its place."""
    client.walk(0, 1, b"sub")
    (share / "sub").rename(share / "old")
    (share / "sub").symlink_to(share.parent / "outside")
    with client.fails(errno.ENOENT):
        client.walk(1, 2, b"secret")
    client.create(1, b"made")
    assert (share / "old" / "made").exists()
    assert not (share.parent / "outside" / "made").exists()


def test_special_files_are_not_opened_or_made(client: Client, share: Path) -> None:
    """A FIFO does not hang the server, and no device nodes are made."""
    os.mkfifo(share / "pipe")
    client.walk(0, 1, b"pipe")
    with client.fails(errno.EOPNOTSUPP):
        client.open(1)
    with client.fails(errno.EPERM):
        client.call(18, struct.pack("<I", 0) + text(b"null") + struct.pack("<IIII", 0o020666, 1, 3, 0))


def test_a_readonly_share_changes_nothing(share: Path) -> None:
    """Each request that would change the share is refused."""
    client = Client(share, readonly=True)
    client.walk(0, 1, b"file")
    with client.fails(errno.EROFS):
        client.open(1, os.O_RDWR)
    with client.fails(errno.EROFS):
        client.create(0, b"x")
    client.open(1)
    assert client.read(1) == b"hello"
    client.close()


def test_state_reopens_files(client: Client, share: Path) -> None:
    """A saved server's fids open again, at the same numbers; files that are gone are logged."""
    client.walk(0, 1, b"file")
    client.open(1, os.O_RDWR)
    client.walk(0, 2, b"sub", b"deep")
    state = client.bench.device.save()
    (share / "sub" / "deep").unlink()
    other = Client(share)
    other.bench.device.load(state)
    assert other.read(1) == b"hello"
    assert other.bench.slot.log.entries[0][1] == "9p: a file is gone"
    other.close()


def test_a_missing_directory_is_a_configuration_error(tmp_path: Path) -> None:
    """A path that is no directory is refused with its name."""
    with pytest.raises(ConfigError, match="nothing"):
        Bench(P9(P9Options(path=str(tmp_path / "nothing"))))


NAME = st.sampled_from([b"..", b"file", b"sub", b"deep", b"link", b"up", b"new", b"../outside", b"", b"\0"]).map(text)
NUMBER = st.sampled_from([0, 1, 2, 0xFFFFFFFF, 5, 1 << 20]).map(lambda value: struct.pack("<I", value))
BODY = st.lists(NAME | NUMBER | st.binary(max_size=12), max_size=8).map(b"".join)
KINDS = [8, 12, 14, 16, 18, 20, 22, 24, 26, 30, 40, 50, 52, 54, 70, 72, 74, 76, 100, 102, 104, 108, 110, 116, 118, 120]


@given(messages=st.lists(st.tuples(st.sampled_from(KINDS), BODY), max_size=30), packed=st.booleans())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_messages_stay_inside(messages: list[tuple[int, bytes]], packed: bool, tmp_path_factory: Any) -> None:
    """Whatever a guest asks, it is answered, and nothing outside the share is touched."""
    base = tmp_path_factory.mktemp("nine")
    (base / "outside").mkdir()
    (base / "outside" / "secret").write_text("secret")
    share = base / "share"
    (share / "sub").mkdir(parents=True)
    (share / "file").write_text("hello")
    (share / "link").symlink_to("../outside")
    (share / "up").symlink_to("../outside/secret")
    client = Client(share, packed=packed)
    for fid, name in ((1, b"file"), (2, b"link"), (5, b"sub")):
        client.walk(0, fid, name)
    for kind, body in messages:
        try:
            client.call(kind, body)
        except NineError:
            continue
    assert sorted(os.listdir(base)) == ["outside", "share"]
    assert os.listdir(base / "outside") == ["secret"]
    assert (base / "outside" / "secret").read_text() == "secret"
    client.close()


def test_a_revoked_share_refuses_and_comes_back(client: Client, share: Path) -> None:
    """While policy bars the directory each request is EACCES, what gives up access is served, and then it goes on."""
    client.walk(0, 1, b"file")
    client.open(1, os.O_RDWR)
    client.walk(0, 2, b"sub")
    slot = client.bench.slot
    slot.host.change("image", "read", allowed=False)
    for act in (
        lambda: client.read(1),
        lambda: client.write(1, 0, b"x"),
        lambda: client.walk(0, 3, b"file"),
        lambda: client.names(2),
        lambda: client.attach(4),
        lambda: client.call(122, struct.pack("<I", 2)),
    ):
        with client.fails(errno.EACCES):
            act()
    client.call(120, struct.pack("<I", 1))
    assert (share / "file").read_text() == "hello"
    assert (share / "sub").exists()
    assert set(client.bench.device.fids) == {0}
    slot.host.change("image", "read", allowed=True)
    client.walk(0, 1, b"file")
    client.open(1)
    assert client.read(1) == b"hello"
