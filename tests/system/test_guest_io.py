"""Linux guests on our disks and networks: what they flushed outlives a kill, and they reach the host and each other."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cardcage_block.check import check
from cardcage_block.drive import Drive, open_image
from cardcage_block.header import Header
from cardcage_block.hostfile import HostFile
from cardcage_block.make import create_qcow2
from cardcage_block.tables import read_bytes
from guest_boot import BOOT

BLOCK = 65536

pytestmark = pytest.mark.usefixtures("kernel")


def pattern(number: int) -> bytes:
    return (f"{number:015d}\n".encode() * (BLOCK // 16))[:BLOCK]


def test_flushed_data_outlives_a_kill(tmp_path: Path) -> None:
    """What a guest has fsynced is on its disk after SIGKILL of the machine, time after time, and the image is sound."""
    path, choose = str(tmp_path / "disk.qcow2"), random.Random(5)
    create_qcow2(path, 256 << 20)
    script = (
        "n=$(cat /proc/cmdline | sed 's/.*first=//; s/ .*//'); while :; do "
        'yes "$(printf %015d $n)" | head -c 65536 | dd of=/dev/vda bs=65536 seek=$((n * 7 % 4000)) conv=fsync,notrunc '
        "2>/dev/null && echo $n; n=$((n + 1)); done"
    )
    flushed: dict[int, int] = {}
    first = 1
    for _ in range(2):
        command = [*BOOT, "--drive", f"file={path},format=qcow2", "--append", f"first={first}", "--exec", script]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout is not None
        last = choose.randint(5, 60) + first
        for line in process.stdout:  # to the end, for what was flushed until the kill took effect
            first = int(line)
            flushed[first * 7 % 4000] = first
            if first == last:
                process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert first >= last
        file = HostFile(path, writable=False)
        report = check(file, Header.parse(lambda at, size, file=file: read_bytes(file, at, size), path))
        file.close()
        assert not report.corruptions, report.problems
        image = open_image(Drive(path, format="qcow2", readonly=True), warn=print)
        data = bytearray(BLOCK)
        for place, number in flushed.items():
            image.readv(place * BLOCK, [memoryview(data)])
            assert data == pattern(number)
        image.close()
        first += 2


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace needs root")


@needs_root
@pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed")
def test_guest_reaches_a_server(tmp_path: Path) -> None:
    """By user mode the guest gets an address from DHCP and fetches a file from a server of the host, byte for byte."""
    blob = random.Random(1).randbytes(5 << 20)
    (tmp_path / "serve.py").write_text(
        "import sys, http.server\n"
        "class Serve(http.server.SimpleHTTPRequestHandler):\n    def log_message(self, *_): pass\n"
        "http.server.HTTPServer(('192.0.2.2', 8080), Serve).serve_forever()\n"
    )
    (tmp_path / "blob").write_bytes(blob)
    script = "ip -4 addr show eth0 | grep -o 10.0.2.15; wget -q -O - http://192.0.2.2:8080/blob | sha256sum"
    (tmp_path / "script").write_text(script)
    shell = (
        "ip link set lo up; ip link add out0 type veth peer name nowhere; ip addr add 192.0.2.2/24 dev out0; "
        "ip link set out0 up; ip link set nowhere up; ip route add default via 192.0.2.1; "
        f'cd "$1"; {sys.executable} serve.py & server=$!; shift; "$@"; status=$?; kill $server; exit $status'
    )
    command = ["unshare", "-n", "sh", "-c", shell, "sh", str(tmp_path), *BOOT, "--net", "user,dump=net.pcap"]
    done = subprocess.run([*command, "--exec", script], capture_output=True, check=False)
    assert done.stdout.decode() == f"10.0.2.15\n{hashlib.sha256(blob).hexdigest()}  -\n", done.stderr.decode()
    assert done.returncode == 0
    assert (tmp_path / "net.pcap").stat().st_size > len(blob)


def test_two_machines_on_one_switch(tmp_path: Path) -> None:
    """A machine's switch carries another process's machine: each sends the other a file."""
    path = tmp_path / "lan"
    setup = "ip addr add 10.3.0.{} /24 dev eth0; ".replace(" /", "/")
    serving = setup.format(1) + "(echo from the first | nc -l -p 7 | sed 's/^/got: /') ; sleep 1"
    asking = setup.format(2) + "until echo from the second | nc 10.3.0.1 7; do :; done"
    first = subprocess.Popen(
        [*BOOT, "--net", f"switch,lan,listen={path},mac=52:54:00:00:00:01", "--exec", serving],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    second = subprocess.Popen(
        [*BOOT, "--net", f"stream,unix:{path},mac=52:54:00:00:00:02", "--exec", asking],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    said, why = second.communicate()
    heard, problem = first.communicate()
    assert said == b"from the first\n", why.decode()
    assert heard == b"got: from the second\n", problem.decode()
    assert not path.exists()
