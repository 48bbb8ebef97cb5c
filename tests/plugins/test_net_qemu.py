"""Datagram networks beside QEMU's own ``-netdev dgram``: a QEMU without a guest passes on what comes in at one end."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

import pytest
from cardcage_net.inbox import FRAME_MAX
from cardcage_net.sockets import Dgram, open_dgram
from net_lab import Guest, Namespace, Slot, frame

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="qemu is not installed"),
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root"),
]
UDP_MAX = 65507
LEFT, RIGHT = b"\x02\0\0\0\0\1", b"\x02\0\0\0\0\2"
ENDS = {
    "inet": (
        Dgram("127.0.0.1:4001", "127.0.0.1:4002"),
        "local.type=inet,local.host=127.0.0.1,local.port=4001,remote.type=inet,remote.host=127.0.0.1,remote.port=4002",
    ),
    "unix": (
        Dgram("unix:{0}/theirs", "unix:{0}/ours"),
        "local.type=unix,local.path={0}/theirs,remote.type=unix,remote.path={0}/ours",
    ),
    "group": (
        Dgram("239.1.2.3:4003", "127.0.0.1:0"),
        "remote.type=inet,remote.host=239.1.2.3,remote.port=4003,local.type=inet,local.host=127.0.0.1,local.port=0",
    ),
}
FAR = "local.type=inet,local.host=127.0.0.1,local.port=4004,remote.type=inet,remote.host=127.0.0.1,remote.port=4005"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def start_qemu(stack: ExitStack, inside: Namespace, near: str) -> None:
    """A QEMU that joins two datagram networks, ready."""
    words = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none", "-qmp", "stdio"]
    for at, end in enumerate((near, FAR)):
        words += ["-netdev", f"dgram,id=d{at},{end}", "-netdev", f"hubport,id=h{at},hubid=0,netdev=d{at}"]
    process = stack.enter_context(inside.popen(*words, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
    stack.callback(process.kill)
    assert process.stdout is not None
    assert "QMP" in process.stdout.readline()


@pytest.mark.parametrize("kind", list(ENDS))
def test_qemus_datagrams_are_ours(stack: ExitStack, tmp_path: Path, kind: str) -> None:
    """Frames of each length pass through QEMU as they were sent, both ways, by UDP, unix sockets and a group."""
    inside = stack.enter_context(closing(Namespace()))
    inside.shell("ip route add 239.0.0.0/8 dev lo")
    options, near = ENDS[kind]
    remote, local = (text and text.format(tmp_path) for text in (options.remote, options.local))
    slot = stack.enter_context(closing(Slot()))
    left = inside.run(lambda: Guest(slot, open_dgram(slot, Dgram(remote or "", local))))
    right = inside.run(lambda: Guest(slot, open_dgram(slot, Dgram("127.0.0.1:4004", "127.0.0.1:4005"))))
    stack.callback(left.close)
    stack.callback(right.close)
    start_qemu(stack, inside, near.format(tmp_path))
    sizes = [14, 15, 59, 60, 64, 1514, 9014, UDP_MAX]
    for source, target, mac in ((left, right, LEFT), (right, left, RIGHT)):
        sent = [(frame(at, size, by=mac) + bytes(size))[:size] for at, size in enumerate(sizes)]
        for one in sent:
            source.send(one)
            target.expect(lambda got, one=one: got == one)  # one at a time: a full queue loses datagrams
        assert [one for one in target.frames if one[6:12] == mac] == sent
    for one in (left, right):
        one.send(bytes(FRAME_MAX))  # longer than any UDP datagram: it is lost, and all goes on
    left.send(frame(99, by=LEFT))
    right.expect(lambda got: got == frame(99, by=LEFT))
