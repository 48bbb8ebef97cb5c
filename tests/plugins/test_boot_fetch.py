"""Fetching a kernel and busybox with apt, from a small archive made here; and the cache they are kept in."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from attrs import define, field
from cardcage.errors import HostError
from cardcage_boot.apt import depends
from cardcage_boot.cache import cache_root, locked, publish_file, publish_folder
from cardcage_boot.check import check
from cardcage_boot.fetch import Shelf
from cardcage_boot.report import Report

needs_apt = pytest.mark.skipif(
    not all(map(shutil.which, ("apt-get", "apt-cache", "dpkg-deb"))), reason="needs apt and dpkg"
)


@define
class Archive:
    """A flat apt repository."""

    root: Path
    packages: str = ""
    work: Path = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.work = self.root.with_name("work")
        self.root.mkdir()

    def add(self, name: str, files: dict[str, bytes], *, needs: str = "", version: str = "1.0") -> None:
        tree = self.work / f"{name}-{version}"
        control = f"Package: {name}\nVersion: {version}\nArchitecture: amd64\nMaintainer: x <x@example.org>\n"
        control += (f"Depends: {needs}\n" if needs else "") + "Description: test\n"
        (tree / "DEBIAN").mkdir(parents=True)
        (tree / "DEBIAN/control").write_text(control)
        for path, data in files.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_bytes(data)
        target = self.root / f"{name}_{version}_amd64.deb"
        subprocess.run(["dpkg-deb", "--root-owner-group", "-b", tree, target], check=True, capture_output=True)
        data = target.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        self.packages += f"{control}Filename: ./{target.name}\nSize: {len(data)}\nSHA256: {digest}\n\n"
        (self.root / "Packages").write_text(self.packages)


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Archive:
    """The only source that apt knows here; the host counts as Debian 12."""
    made = Archive(tmp_path / "repository")
    sources = tmp_path / "sources.list"
    sources.write_text(f"deb [trusted=yes] file:{made.root} ./\n")
    config = tmp_path / "apt.conf"
    config.write_text(f'Dir::Etc::sourcelist "{sources}";\nDir::Etc::sourceparts "/dev/null";\n')
    monkeypatch.setenv("APT_CONFIG", str(config))
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: {"ID": "debian", "VERSION_ID": "12"})
    return made


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "cache", lambda what, percent: None, lambda line: None)


def add_kernel(archive: Archive, release: str) -> None:
    files = {f"boot/vmlinuz-{release}": b"kernel " + release.encode(), f"lib/modules/{release}/kernel/a.ko": b"a"}
    archive.add(f"linux-image-{release}", files)
    archive.add("linux-image-cloud-amd64", {}, needs=f"linux-image-{release} (= 1.0), other", version=release)


@needs_apt
def test_kernel_is_fetched_once_and_kept(archive: Archive, shelf: Shelf) -> None:
    """The distribution's kernel and its modules come from the archive once; later runs need no archive."""
    add_kernel(archive, "9.9.9-1-cloud-amd64")
    kernel = shelf.kernel()
    assert (kernel.release, kernel.source) == ("9.9.9-1-cloud-amd64", "fetched from Debian")
    assert kernel.path.read_bytes() == b"kernel 9.9.9-1-cloud-amd64"
    assert kernel.modules is not None
    assert (kernel.modules / "kernel/a.ko").read_bytes() == b"a"
    shutil.rmtree(archive.root)
    assert shelf.kernel() == kernel


@needs_apt
def test_progress_has_names_and_bytes(archive: Archive, tmp_path: Path) -> None:
    """Who waits reads first that a kernel is fetched, then each file's name, and how many of its bytes have come."""
    release = "9.9.9-1-cloud-amd64"
    archive.add(f"linux-image-{release}", {f"boot/vmlinuz-{release}": os.urandom(3_000_000)})
    archive.add("linux-image-cloud-amd64", {}, needs=f"linux-image-{release}")
    said: list[str] = []
    shelf = Shelf(tmp_path / "cache", lambda what, percent: said.append(what), said.append)
    shelf.kernel()
    assert said[:2] == [
        "no kernel is in the cache yet: it is fetched from where this host's apt gets its packages, once",
        "package lists",
    ]
    assert f"linux-image-{release}: 0 of 3.0 MB" in said
    assert f"linux-image-{release}: 3.0 of 3.0 MB" in said
    said.clear()
    shelf.kernel()
    assert said == []


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    """A download is one line when it begins, however often it moves within five seconds."""
    report = Report()
    for percent in range(100):
        report.progress(f"linux-image: {percent} of 100.0 MB", percent)
    report.progress("busybox", 0)
    assert capsys.readouterr().err.splitlines() == [
        "  fetching     linux-image: 0 of 100.0 MB",
        "  fetching     busybox",
    ]


NO_NETWORK = "ip link set lo up"
HOLE = f"""{NO_NETWORK}; ip link add v0 type veth peer name v1; ip link set v0 up; ip link set v1 up
ip addr add 10.9.9.2/24 dev v0; ip neigh add 10.9.9.1 lladdr 02:00:00:00:00:01 dev v0"""
"""A network card whose other end nobody listens at."""


@needs_apt
@pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "ip"))), reason="needs root, unshare and ip"
)
@pytest.mark.parametrize(
    ("network", "expected"),
    [(NO_NETWORK, "10.9.9.1: Cannot initiate the connection"), (HOLE, "10.9.9.1: no answer for")],
    ids=["no network", "nobody answers"],
)
def test_without_a_network_an_early_word_says_so(archive: Archive, tmp_path: Path, network: str, expected: str) -> None:
    """With an empty cache and no network, or one that swallows everything, the source is named soon; status 70."""
    (tmp_path / "sources.list").write_text("deb [trusted=yes] http://10.9.9.1/debian ./\n")
    program = "import sys; from cardcage_cli import main; sys.exit(main(['boot', '--exec', 'true']))"
    script = f'{network}\nexec {sys.executable} -c "{program}"'
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    with subprocess.Popen(
        ["unshare", "-n", "sh", "-c", script],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stderr is not None
        lines = iter(process.stderr)
        assert "no kernel is in the cache yet" in next(lines)
        seen = []
        for line in lines:
            seen.append(line)
            if expected in line:
                break
        assert expected in seen[-1], seen
        if network == HOLE:
            process.terminate()  # it would give up after half a minute
        else:
            last = [*seen, *lines][-1]
            assert "outcome: host or accelerator failure: no package list could be fetched: 10.9.9.1:" in last
            assert process.wait() == 70


@needs_apt
def test_refresh_takes_the_newest_kernel(archive: Archive, shelf: Shelf) -> None:
    """With refresh a newer kernel replaces the kept one; a refresh that fails leaves the kept one."""
    add_kernel(archive, "9.9.9-1-cloud-amd64")
    shelf.kernel()
    add_kernel(archive, "9.9.9-2-cloud-amd64")
    assert shelf.kernel().release == "9.9.9-1-cloud-amd64"
    assert shelf.kernel(refresh=True).release == "9.9.9-2-cloud-amd64"
    for package in archive.root.glob("linux-image-9*.deb"):
        package.unlink()
    with pytest.raises(HostError, match="apt-get download"):
        shelf.kernel(refresh=True)
    assert shelf.kernel().release == "9.9.9-2-cloud-amd64"


@needs_apt
def test_ubuntu_keeps_modules_in_their_own_package(
    archive: Archive, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Ubuntu the kernel comes by linux-image-virtual, and the modules of linux-modules-RELEASE with it."""
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: {"ID": "mint", "ID_LIKE": "ubuntu debian"})
    archive.add("linux-image-virtual", {}, needs="linux-image-5.15.0-1-generic")
    archive.add(
        "linux-image-5.15.0-1-generic",
        {"boot/vmlinuz-5.15.0-1-generic": b"k"},
        needs="kmod, linux-base | x, linux-modules-5.15.0-1-generic",
    )
    archive.add("linux-modules-5.15.0-1-generic", {"usr/lib/modules/5.15.0-1-generic/kernel/b.ko.zst": b"b"})
    kernel = shelf.kernel()
    assert kernel.modules is not None
    assert (kernel.modules / "kernel/b.ko.zst").read_bytes() == b"b"


@needs_apt
def test_busybox_comes_from_the_archive_when_the_host_has_none(
    archive: Archive, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a static busybox on the host the package busybox-static is fetched, once; what is none is refused."""
    monkeypatch.setattr("cardcage_boot.fetch.is_static_busybox", lambda path: path.read_bytes() == b"static")
    archive.add("busybox-static", {"bin/busybox": b"not that"})
    with pytest.raises(HostError, match="no static busybox"):
        shelf.busybox()
    archive.packages = ""
    archive.add("busybox-static", {"usr/bin/busybox": b"static"}, version="2.0")
    assert shelf.busybox().read_bytes() == b"static"
    shutil.rmtree(archive.root)
    assert shelf.busybox() == shelf.root / "busybox"


@needs_apt
def test_archive_without_a_kernel_is_one_clear_error(archive: Archive, shelf: Shelf) -> None:
    """An archive that has no kernel package, or cannot be reached, ends in what to give instead."""
    archive.add("something", {})
    with pytest.raises(HostError, match=r"no linux-image-cloud-amd64 .*give --kernel and --initrd"):
        shelf.kernel()


@needs_apt
def test_without_room_nothing_is_fetched(archive: Archive, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk without room for a kernel the run ends with one sentence, and apt is not started."""
    add_kernel(archive, "9.9.9-1-cloud-amd64")
    usage = shutil.disk_usage(shelf.root.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(HostError, match="1 MiB are free, and fetching needs 256 MiB"):
        shelf.kernel()


@needs_apt
def test_doctor_says_what_is_there(archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor's line tells a kept kernel from one that can be fetched and from one that cannot."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    works, found, _ = check()
    assert works
    assert "kernel not fetched yet" in found
    add_kernel(archive, "9.9.9-1-cloud-amd64")
    Shelf(cache_root(), lambda what, percent: None, lambda line: None).kernel()
    assert "kernel 9.9.9-1-cloud-amd64" in check()[1]
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: {"ID": "arch"})
    assert check()[0] is False


def test_other_distribution_is_one_clear_error(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a distribution that is neither Debian nor Ubuntu nor like them the error says what to give."""
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: {"ID": "arch"})
    with pytest.raises(HostError, match=r"this host: arch.*give --kernel and --initrd"):
        shelf.kernel()


@needs_apt
def test_two_runs_at_once_fetch_once(archive: Archive, tmp_path: Path) -> None:
    """Of two runs that need a kernel at the same time one fetches it, the other waits, and both get the same."""
    add_kernel(archive, "9.9.9-1-cloud-amd64")
    fetched: list[str] = []
    found = []

    def one() -> None:
        shelf = Shelf(tmp_path / "cache", lambda what, percent: fetched.append(what), lambda line: None)
        found.append(shelf.kernel())

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert not [one for one in (tmp_path / "cache/debian-12").iterdir() if one.name != "kernel"]


def test_depends_finds_alternatives_and_versions() -> None:
    """A dependency is found whatever stands around its name."""
    fields = {"Depends": "kmod (>= 1), linux-base | linux-image-x, linux-image-6.1.0-9 (= 6.1.1-1)"}
    assert depends(fields, r"linux-image-\d") == "linux-image-6.1.0-9"
    assert depends({}, "x") is None


def test_cache_root_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """XDG_CACHE_HOME is used when it is absolute, else ~/.cache; a folder that cannot be made is a HostError."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_root() == tmp_path / "x/cardcage"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_root() == tmp_path / "home/.cache/cardcage"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(HostError, match="XDG_CACHE_HOME"):
        cache_root()


def test_published_things_are_whole_or_absent(tmp_path: Path) -> None:
    """A failure while a file or folder is made leaves the old one, and no leftovers."""
    publish_file(tmp_path / "a/file", b"one")
    with publish_folder(tmp_path / "a/folder") as fresh:
        (fresh / "x").write_text("1")
    with pytest.raises(FileNotFoundError), publish_folder(tmp_path / "a/folder") as fresh:
        (fresh / "x").rename(fresh / "never there")
    with publish_folder(tmp_path / "a/folder") as fresh:
        (fresh / "y").write_text("3")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["file", "folder"]
    assert os.listdir(tmp_path / "a/folder") == ["y"]


def test_a_cache_that_cannot_be_written_is_the_hosts_fault(tmp_path: Path) -> None:
    """A file that cannot be kept is an error about the cache folder."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(HostError, match="XDG_CACHE_HOME"):
        publish_file(tmp_path / "file/below", b"x")


def test_lock_is_exclusive_and_says_that_it_waits(tmp_path: Path) -> None:
    """The second holder of a lock is told that it waits, and gets it when the first lets go."""
    waiting, order = threading.Event(), []

    def second() -> None:
        with locked(tmp_path / "lock", waiting.set):
            order.append("second")

    thread = threading.Thread(target=second)
    with locked(tmp_path / "lock", lambda: None):
        thread.start()
        assert waiting.wait(30)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
