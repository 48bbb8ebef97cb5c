"""A guest whose kernel has 9p (Debian's generic one; its cloud kernel has none) on a shared directory of the host."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from installed import PROGRAM

SCRIPT = r"""
cd /mnt/share || exit 1
cat file; head -c 3000000 big | md5sum; dd if=/dev/urandom of=random bs=64k count=20 2>/dev/null; md5sum < random
mv random sub/moved; mkdir made; echo text > made/new; echo more >> made/new; chmod 600 made/new
ls sub made | sort -u | tr '\n' ' '; echo
ln -s file link; readlink link; rm file; cat file 2>/dev/null || echo gone
cat ../outside/secret 2>/dev/null || echo no way up
cat away 2>/dev/null || echo no way by a link
ls swapped; echo swap; until [ -e swapped-now ]; do sleep 0.1; done
cat swapped/secret 2>/dev/null || echo no way by a swap; echo x 2>/dev/null > swapped/new || echo nor to write
cd /; umount /mnt/share && echo unmounted
dmesg -r | grep -E '^<[0-4]>'; :
"""
DEVICES = ("virtio-rng", "virtio-balloon", "virtio-console,char=null")


@pytest.mark.once
@pytest.mark.timeout(600)
def test_linux_uses_a_directory_by_9p(generic: Path, tmp_path: Path) -> None:
    """Linux's 9p reads, writes, renames and lists; nothing leads out of the directory, not even what the host swaps
    under it; and with every device plugged in the generic kernel warns of nothing.
    """
    share, outside = tmp_path / "share", tmp_path / "outside"
    for folder in (share / "sub", share / "swapped", outside):
        folder.mkdir(parents=True)
    (outside / "secret").write_text("secret\n")
    (share / "file").write_text("hello\n")
    (share / "big").write_bytes(bytes(range(256)) * 16384)
    (share / "away").symlink_to(outside / "secret")
    (share / "swapped" / "inside").touch()
    disk = tmp_path / "disk"
    disk.touch()
    os.truncate(disk, 1 << 20)
    command = [*PROGRAM, "boot", "--accel", "tcg", "--timeout", "300", "--share", f"{share},type=9p", "--net", "null"]
    command += ["--vsock", f"5,uds={tmp_path}/v", "--drive", f"{disk},format=raw"]
    command += [word for one in DEVICES for word in ("--device", one)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(generic)}
    pipe = subprocess.PIPE
    with subprocess.Popen([*command, "--exec", SCRIPT], env=environment, stdout=pipe, stderr=pipe, text=True) as guest:
        lines = []
        for line in guest.stdout:
            lines.append(line.rstrip("\n"))
            if line == "swap\n":
                (share / "swapped").rename(outside / "was")
                (share / "swapped").symlink_to(outside)
                (share / "swapped-now").touch()
        errors = guest.stderr.read()
    assert guest.returncode == 0, errors
    big = subprocess.run(["md5sum"], input=(share / "big").read_bytes()[:3000000], capture_output=True, check=True)
    moved = subprocess.run(["md5sum"], input=(share / "sub/moved").read_bytes(), capture_output=True, check=True)
    assert lines == [
        *("hello", big.stdout.decode().strip(), moved.stdout.decode().strip(), " made: moved new sub: "),
        *("file", "gone", "no way up", "no way by a link", "inside", "swap"),
        *("no way by a swap", "nor to write", "unmounted"),
    ], errors
    assert (share / "made/new").read_text() == "text\nmore\n"
    assert (share / "made/new").stat().st_mode & 0o777 == 0o600
    assert os.readlink(share / "link") == "file"
    assert sorted(path.name for path in outside.iterdir()) == ["secret", "was"]
