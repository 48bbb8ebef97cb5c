"""A guest's own calls on a shared directory, by Linux's virtiofs and 9p, with the host's programs: as on the host."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import share_calls
from cardcage_boot.cache import cache_root
from cardcage_boot.fetch import Shelf
from guest_boot import BOOT
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from share_strategies import ACTS, FS_ACTS

pytestmark = [pytest.mark.once, pytest.mark.timeout(600)]
PYTHON = os.path.realpath(sys.executable)
PREPARE = """
for i in proc dev; do mount --bind /$i /mnt/host/$i; done; mount -t tmpfs none /mnt/host/tmp
mount --bind /mnt/share /mnt/host/mnt
test ! -e /mnt/share/overlay.ko || insmod /mnt/share/overlay.ko || exit 8
mv /mnt/share/script /mnt/host/tmp
"""
LINKS = """
set -e; cd /mnt; T=/tmp/t; mkdir -p $T/d; echo x > $T/x; ln -s x $T/l; ln -s x $T/d/l2
chown -h 3:4 $T/l; touch -h -d '2001-02-03 04:05:06' $T/l
cp -a $T one; cp -al one two; mv one three; ln -P three/l hard; stat -c '%F %h %u %g %y' hard
cp -a three $T/back; stat -c '%u %g %y' $T/back/l; diff -r --no-dereference $T/back/d $T/d && echo same
PYTHON -c 'import shutil; shutil.copytree("three", "tree", symlinks=True)'; stat -c '%N %Y' tree/l
"""
LINKS_DONE = """symbolic link 3 3 4 2001-02-03 04:05:06.000000000 +0000
3 4 2001-02-03 04:05:06.000000000 +0000
same
'tree/l' -> 'x' 981173106
"""
LOWER = """
set -e; mkdir -p /mnt/up /mnt/work /tmp/low/dir /tmp/low/ren /tmp/m
cd /tmp/low; echo low > f; echo g > dir/g; ln -s f l; echo x > gone; echo x > ren/x; echo x > c
PYTHON -c 'import os; os.setxattr("c", "security.capability", bytes.fromhex("01000002002" + "0" * 29))'
again() { cd /; umount /tmp/m; mount -t overlay -o lowerdir=/tmp/low,upperdir=/mnt/up,workdir=/mnt/work$1 o /tmp/m; }
mount -t tmpfs none /tmp/m; again $1; cd /tmp/m
echo more >> f; chown -h 3:4 l; touch c; rm gone; echo new > new; ln new linked
"""
OVERLAY = """
rm -r dir; mkdir dir; touch dir/n; mv ren moved
again $1; cd /tmp/m; ls -1; ls -1 dir moved; cat f; stat -c '%u %g %h' l linked
PYTHON -c 'import os; print(os.listxattr("c"))'; cd /tmp; umount /tmp/m
"""
OVERLAY_DONE = (
    """c\ndir\nf\nl\nlinked\nmoved\nnew\ndir:\nn\n\nmoved:\nx\nlow\nmore\n3 4 1\n0 0 2\n['security.capability']\n"""
)
OVERLAY_9P = """
mv ren moved 2>/dev/null || echo no directory is renamed; rm -r dir 2>/dev/null || echo nor removed
again; cd /tmp/m; ls -1; cat f
"""
OVERLAY_9P_DONE = "no directory is renamed\nnor removed\nc\ndir\nf\nl\nlinked\nmoved\nnew\nren\nlow\nmore\n"


@pytest.fixture(params=["fs", "9p"])
def kind(request: pytest.FixtureRequest) -> str:
    """The device that shares; the tests are skipped where its kernel cannot be had."""
    request.getfixturevalue("kernel" if request.param == "fs" else "generic")
    if os.geteuid() != 0:
        pytest.skip("needs root, which may give files to others")
    return str(request.param)


def in_guest(kind: str, share: Path, script: str, *arguments: str) -> str:
    """The output of *script*, which sees the host's files, and the shared directory as /mnt."""
    (share / "script").write_text(script.replace("PYTHON", PYTHON))
    command = [*BOOT, "--memory", "1G", "--share", "/,tag=host,readonly=on"]
    command += ["--share", f"{share},type=9p" if kind == "9p" else str(share)]
    prepare = PREPARE
    prepare += shlex.join(["exec", "chroot", "/mnt/host", "/bin/sh", "/tmp/script", *arguments])
    cache = cache_root().parent if kind == "fs" else cache_root() / "tests" / "generic"
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    done = subprocess.run(
        [*command, "--exec", prepare], env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def overlay(kind: str, share: Path, script: str, options: str = "") -> str:
    """As :func:`in_guest`, with the module of the guest's kernel."""
    shelf = cache_root() if kind == "fs" else cache_root() / "tests" / "generic" / "cardcage"
    wanted = [] if kind == "fs" else [("linux-image-amd64",)]
    kernel = Shelf(shelf, lambda what, percent: None, lambda line: None, *wanted).kernel().path
    (found,) = kernel.parents[1].glob(f"lib/modules/{kernel.name.partition('-')[2]}/kernel/fs/overlayfs/overlay.ko*")
    shutil.copy(found, share / "overlay.ko")
    return in_guest(kind, share, LOWER + script, options)


def test_links_are_copied_as_links(kind: str, tmp_path: Path) -> None:
    """With cp -a, cp -al, ln -P, mv, chown -h, touch -h and shutil.copytree, a symbolic link is a file like others."""
    assert in_guest(kind, tmp_path, LINKS) == LINKS_DONE
    made = (tmp_path / "hard").lstat()
    assert (made.st_nlink, made.st_uid, made.st_gid, made.st_mtime) == (3, 3, 4, 981173106)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("options", ["", ",userxattr", ",redirect_dir=on,index=on,metacopy=on"])
def test_a_share_is_an_overlays_upper_directory(options: str, tmp_path: Path) -> None:
    """Files are copied up, removed, linked, and directories made anew and renamed, also after mounting again."""
    if os.geteuid() != 0:
        pytest.skip("needs root, which may give files to others")
    assert overlay("fs", tmp_path, OVERLAY, options) == OVERLAY_DONE
    assert (tmp_path / "up" / "gone").stat().st_rdev == 0
    assert (tmp_path / "up" / "f").read_text() == "low\nmore\n"


@pytest.mark.usefixtures("generic")
def test_what_an_overlay_can_do_on_9p(tmp_path: Path) -> None:
    """By 9p files are copied up, removed and linked; directories of the lower layer stay, for lack of renameat2."""
    if os.geteuid() != 0:
        pytest.skip("needs root, which may give files to others")
    assert overlay("9p", tmp_path, OVERLAY_9P) == OVERLAY_9P_DONE


def random_scripts(acts: st.SearchStrategy[Any]) -> list[list[Any]]:
    """The same 200 each time."""
    found: list[list[Any]] = []
    for at in range(50):

        @seed(at)
        @settings(max_examples=4, phases=[Phase.generate], database=None, suppress_health_check=list(HealthCheck))
        @given(st.lists(acts, min_size=25, max_size=50))
        def collect(script: list[Any]) -> None:
            found.append(script)

        collect()
    return found


def test_calls_end_as_on_the_host(kind: str, tmp_path: Path) -> None:
    """Random calls, some 70 forms with their flags, have the same results, errors and files in a guest and on the host,
    but for what docs/virtio.md says of 9p.
    """
    scripts = random_scripts(FS_ACTS if kind == "fs" else ACTS)
    share, host = tmp_path / "share", tmp_path / "host"
    (share / "t").mkdir(parents=True)
    (share / "scripts").write_text(json.dumps(scripts))
    shutil.copy(share_calls.__file__, share)
    said = in_guest(kind, share, "cd /tmp; cp /mnt/share_calls.py /mnt/scripts .; PYTHON share_calls.py /mnt/t scripts")
    command = [sys.executable, share_calls.__file__, str(host), str(share / "scripts")]
    expected = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert len(expected.splitlines()) == len(scripts)
    for script, here, there in zip(scripts, expected.splitlines(), said.splitlines(), strict=True):
        (ends, files), (guests_ends, guests_files) = json.loads(here), json.loads(there)
        assert list(zip(script, guests_ends, strict=True)) == list(zip(script, ends, strict=True))
        assert guests_files == files
