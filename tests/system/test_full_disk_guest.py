"""A Linux guest whose disk's image finds no room on the host."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cardcage_block.make import create_qcow2, create_raw
from guest_boot import BOOT

pytestmark = pytest.mark.usefixtures("kernel")
MIB = 1 << 20


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_a_guest_waits_for_room_on_the_host(tmp_path: Path, form: str) -> None:
    """A guest that fills the host's file system sees no error: it stands still until there is room."""
    small = tmp_path / "small"
    small.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12M", "small", small], capture_output=True)
    if done.returncode:
        pytest.skip("needs permission to mount a tmpfs (root)")
    try:
        disk, ballast = small / "disk", small / "ballast"
        (create_raw if form == "raw" else create_qcow2)(str(disk), 32 * MIB)
        ballast.write_bytes(bytes(8 * MIB))
        script = """
            dd if=/dev/urandom of=/tmp/r bs=1M count=9 2>/dev/null
            dd if=/tmp/r of=/dev/vda bs=64k conv=fsync 2>/dev/null; echo $?
            echo 3 > /proc/sys/vm/drop_caches
            md5sum < /tmp/r; head -c 9437184 /dev/vda | md5sum; dmesg | grep -c 'I/O error'
        """
        words = [*BOOT, "--drive", f"{disk},format={form}", "--exec", script]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as guest:
            assert guest.stdout is not None
            assert guest.stderr is not None
            said = ""
            while "machine paused" not in said:
                line = guest.stderr.readline()
                assert line, said
                said += line
            assert "No space left on device" in said
            ballast.unlink()
            said += guest.stderr.read()
            status, one, other, errors = guest.stdout.read().split("\n")[:4]
        assert "machine goes on" in said
        assert (status, one, errors) == ("0", other, "0")
        if form == "qcow2":
            subprocess.run(["qemu-img", "check", "-q", disk], check=True)
    finally:
        subprocess.run(["umount", "-l", small], check=True)
