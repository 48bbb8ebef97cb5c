"""User-mode networking as a Linux guest of `cardcage boot` sees it."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import threading
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from guest_boot import BOOT

if TYPE_CHECKING:
    from collections.abc import Iterator

sys.path.append(str(Path(__file__).parents[1] / "plugins"))
from net_lab import Namespace, outside_world

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root"),
    pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed"),
]
COOKIE = b"\x63\x82\x53\x63"


@pytest.fixture
def outside() -> Iterator[Namespace]:
    """What user mode leads to."""
    with closing(outside_world()) as made:
        yield made


def boot(outside: Namespace, resolv: Path, *arguments: str, script: str) -> list[str]:
    """Run *script* in a guest of a host that has *resolv* as its ``/etc/resolv.conf``; its lines."""
    command = [*BOOT, *arguments, "--exec", script]
    words = ["unshare", "-m", "sh", "-c", 'mount --bind "$0" /etc/resolv.conf && exec "$@"', str(resolv), *command]
    process = outside.popen(*words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, errors = process.communicate()
    assert process.returncode == 0, output + errors
    return output.splitlines()


def wanted(capture: bytes) -> set[int]:
    """The options that the first DHCP message of *capture* asks for."""
    at = capture.index(COOKIE) + len(COOKIE)
    while capture[at] != 55:
        at += 2 + capture[at + 1]
    return set(capture[at + 2 : at + 2 + capture[at + 1]])


@pytest.mark.usefixtures("kernel")
def test_guest_takes_what_dhcp_tells(outside: Namespace, tmp_path: Path) -> None:
    """The guest asks for MTU and search domains, has what passt tells it of each network, and leaves by the first."""
    resolv, dump = tmp_path / "resolv.conf", tmp_path / "n.pcap"
    resolv.write_text("nameserver 192.0.2.53\nsearch lab.example corp.example\n")
    told = boot(
        outside,
        resolv,
        *("--net", f"user,ipv6=off,dump={dump}"),
        *("--net", "user,ipv6=off,address=10.3.0.9/24,gateway=10.3.0.1,dns=192.0.2.54,mtu=1400"),
        script="cat /sys/class/net/eth?/mtu /etc/resolv.conf;ip -o -4 addr | grep -o 'eth.*/24';ip route get 192.0.2.1",
    )
    assert told[:2] == ["65520", "1400"]
    assert told[2:5] == ["search lab.example corp.example", "nameserver 192.0.2.53", "nameserver 192.0.2.54"]
    assert [one.split() for one in told[5:7]] == [["eth0", "inet", "10.0.2.15/24"], ["eth1", "inet", "10.3.0.9/24"]]
    assert "via 10.0.2.2 dev eth0" in told[7]
    assert {1, 3, 6, 26, 119} <= wanted(dump.read_bytes())


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("more", "mtu"), [("", "65520"), (",mergeable=false", "1500"), (",mergeable=false,mtu=4000", "4000")]
)
def test_large_packets_have_room(outside: Namespace, tmp_path: Path, more: str, mtu: str) -> None:
    """A guest without buffers for large packets keeps to small ones, whatever DHCP says, and gets all of a megabyte."""
    blob = os.urandom(1 << 20)
    with closing(outside.run(lambda: socket.create_server(("127.0.0.1", 8080)))) as server:

        def serve() -> None:
            with suppress(OSError), server.accept()[0] as connection:
                connection.sendall(blob)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            script = "cat /sys/class/net/eth0/mtu; mkfifo p; exec 3<>p; nc 10.0.2.2 8080 <&3 | md5sum"
            told = boot(outside, Path("/etc/resolv.conf"), "--device", f"virtio-net,net=user{more}", script=script)
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
    assert told == [mtu, f"{hashlib.md5(blob, usedforsecurity=False).hexdigest()}  -"]
