"""Sandboxes whose files are somebody's: a directory, or an archive."""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cardcage_boot.cache import cache_root
from cardcage_boot.fetch import Shelf
from cardcage_fleet.roster import Roster
from cardcage_sandbox import Sandbox, stop_templates

if TYPE_CHECKING:
    from collections.abc import Iterator

LONG = bool(os.environ.get("CARDCAGE_LONG_TESTS"))


@pytest.fixture(autouse=True)
def templates(runtime: Path, kernel: Path) -> Iterator[None]:
    """Templates' processes of the test's own, of which nothing is left."""
    runtime.parent.chmod(0o700)
    try:
        yield
    finally:
        stop_templates()
    assert not Roster().read()[0], "a machine is left"


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
