"""A host directory in a Linux guest, through the VMM's own FUSE server."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest
from guest_boot import BOOT, boot

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("kernel")

SCRIPT = """
set -e
cd /mnt/share
cat file; ls -l | wc -l
i=0; while [ $i -lt 200 ]; do echo $i > new/$i 2> /dev/null || { mkdir new; echo $i > new/$i; }; i=$((i + 1)); done
ls new | wc -l; cat new/* | md5sum
mv new moved; rm moved/1??; find moved -type f | wc -l
dd if=/dev/urandom of=big bs=64k count=64 2> /dev/null; echo 3 > /proc/sys/vm/drop_caches; md5sum < big
ln -s file soft; cat soft; ln file hard; stat -c %h file; mkfifo pipe; stat -c %F pipe
truncate -s 5 hard; cat file; echo; touch -d '1969-07-20 00:00:00' file; chmod 600 file; stat -c '%a %Y' file
ln -s /outside/secret out; cat out 2>&1 || echo stays
echo more >> file; tail -c 5 file; sync; df . | wc -l
(cat file & exec 3< big; rm big; dd bs=64k count=64 <&3 2> /dev/null | wc -c; wait)
"""


def test_linux_works_in_a_shared_directory(tmp_path: Path) -> None:
    """Files, directories, links, times and open files that were removed behave in the guest as on a disk of its own."""
    (tmp_path / "file").write_text("hello\n")
    lines = boot("--share", str(tmp_path), script=SCRIPT)
    assert lines[:2] == ["hello", "2"]
    assert lines[2] == "200"
    assert lines[4] == "100"
    assert lines[6:9] == ["hello", "2", "fifo"]
    assert lines[9:11] == ["hello", "600 -14256000"]
    assert "stays" in lines[11:13]
    assert lines[-3:] == ["2", "hellomore", "4194304"]
    assert sorted(os.listdir(tmp_path)) == ["file", "hard", "moved", "out", "pipe", "soft"]
    assert len(os.listdir(tmp_path / "moved")) == 100


def test_a_readonly_share_and_a_tag(tmp_path: Path) -> None:
    """With a tag of its own a share is mounted there, and readonly=on keeps the guest from changing it."""
    (tmp_path / "file").write_text("hello\n")
    script = (
        "cat /mnt/host/file; echo x > /mnt/host/file || echo refused; rm /mnt/host/file || echo kept; umount /mnt/host"
    )
    assert boot("--share", f"{tmp_path},tag=host,readonly=on", script=script) == ["hello", "refused", "kept"]


def test_what_the_host_changes_is_seen(tmp_path: Path) -> None:
    """The guest sees within moments what the host writes, renames and removes."""
    (tmp_path / "ask").mkdir()
    script = "while [ ! -e /mnt/share/go ]; do :; done; cat /mnt/share/go; rm /mnt/share/go"
    command = [*BOOT, "--share", str(tmp_path), "--exec"]
    with subprocess.Popen([*command, f"touch /mnt/share/ask/up; {script}"], stdout=subprocess.PIPE) as run:
        while not (tmp_path / "ask" / "up").exists():
            assert run.poll() is None
        (tmp_path / "new").write_text("from the host\n")
        (tmp_path / "new").rename(tmp_path / "go")
        assert run.stdout is not None
        assert run.stdout.read() == b"from the host\n"
    assert not (tmp_path / "go").exists()
