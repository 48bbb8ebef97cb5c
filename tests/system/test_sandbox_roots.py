"""Sandboxes that begin with something: a directory, an archive, or what another one was kept as."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cardcage.errors import ConfigError, UsageError
from cardcage_boot.cache import cache_root
from cardcage_boot.fetch import Shelf
from cardcage_sandbox import Sandbox, Template, stop_templates
from sandbox_kit import own_templates

if TYPE_CHECKING:
    from collections.abc import Iterator

LONG = bool(os.environ.get("CARDCAGE_LONG_TESTS"))


@pytest.fixture(autouse=True)
def templates(runtime: Path, kernel: Path) -> Iterator[None]:
    """Templates' processes of the test's own, of which nothing is left."""
    with own_templates(runtime):
        yield


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A root of busybox alone."""
    busybox = Shelf(cache_root(), lambda what, percent: None, lambda line: None).busybox()
    tree = tmp_path / "tree"
    (tree / "bin").mkdir(parents=True)
    (tree / "etc").mkdir()
    shutil.copy(busybox, tree / "bin/busybox")
    (tree / "bin/busybox").chmod(0o755)
    (tree / "bin/sh").symlink_to("busybox")
    (tree / "etc/name").write_text("of the host\n")
    return tree


def test_a_directory(tree: Path) -> None:
    """A directory is the root of a sandbox and of its forks: it is read as it is, and never changed."""
    with Sandbox.create(root=tree, memory="128M") as sandbox:
        sandbox.commands.run("echo mine >/etc/name; mkdir /etc/new", user="root", check=True)
        first, second = sandbox.fork(2)
        first.commands.run("rm /etc/name", user="root", check=True)
        (tree / "etc/later").write_text("later\n")
        for one in (sandbox, second):
            assert one.commands.run("cat /etc/name; ls /etc", check=True).stdout.split()[0] == "mine"
            assert {"later", "name", "new"} <= {entry.name for entry in one.files.list("/etc")}
        assert not first.files.exists("/etc/name")
        with Sandbox.create(root=tree, memory="128M") as other:
            assert other.commands.run("cat /etc/name", check=True).stdout == "of the host\n"
    assert sorted(one.name for one in (tree / "etc").iterdir()) == ["later", "name"]
    assert (tree / "etc/name").read_text() == "of the host\n"


@pytest.mark.skipif(not LONG, reason="boots one more template: set CARDCAGE_LONG_TESTS")
def test_an_archive(tree: Path, tmp_path: Path) -> None:
    """A tar archive is the root of a sandbox, and of its forks."""
    with tarfile.open(tmp_path / "root.tar", "w") as archive:
        archive.add(tree, ".")
    with Sandbox.create(root=tmp_path / "root.tar") as sandbox, sandbox.fork()[0] as other:
        for one in (sandbox, other):
            assert one.commands.run("cat /etc/name").stdout == "of the host\n"


def test_a_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sandbox is kept on the disk, and others go on from there once nothing of it is left: by their template's word
    of what they may have of this host, whatever the snapshot says."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    template = Template(name="kept", memory="96M", envs={"A": "b"})  # type: ignore[arg-type]  # attrs converts
    with Sandbox.create(template) as sandbox:
        sandbox.commands.run("echo kept >here; (exec sleep 1000 >/dev/null 2>&1 &)", check=True)
        made = sandbox.snapshot("ready")
        assert made.memory == 96 << 20
        sandbox.commands.run("rm here", check=True)
        with pytest.raises(ConfigError, match="ready"):
            sandbox.snapshot("ready")
        assert sandbox.pause()
        sandbox.snapshot(tmp_path / "stands")
        assert not sandbox.is_running
    with pytest.raises(UsageError):
        sandbox.snapshot("ended")
    stop_templates()
    manifest = json.loads((made.path / "manifest.json").read_text())
    (made.path / "manifest.json").write_text(json.dumps({**manifest, "config": {"boot": {"kernel": "/etc/passwd"}}}))
    with Sandbox.create(template, snapshot="ready") as again, again.fork()[0] as copy:
        assert again.info().memory == 96 << 20
        for one in (again, copy):
            assert one.commands.run("cat here; echo $A; ps | grep -q '[s]leep 1000'", check=True).stdout == "kept\nb\n"
        said = [one.commands.run("head -c 16 /dev/urandom | md5sum").stdout for one in (again, copy)]
        assert said[0] != said[1]
    for keys, why in (({"memory": "1G"}, "memory: a snapshot has its own"), ({"egress": ["192.0.2.1"]}, "net")):
        with pytest.raises((UsageError, ConfigError), match=why) as caught:
            Sandbox.create(template, snapshot="ready", **keys)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="there is no such snapshot"):
        Sandbox.create(snapshot="none")
