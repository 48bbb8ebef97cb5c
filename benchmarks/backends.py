"""Cost of one request through the block and net back ends, beside the bare system call. No guest.

    python benchmarks/backends.py [--count 20000]

Block: 4 KiB at random places of 256 MiB in the page cache, one at a time, and 1 MiB one after another. Net: frames of
1514 bytes through a stream socket (each way) and through a switch.
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import struct
import tempfile
import threading
import time
from typing import TYPE_CHECKING, Any

from cardcage_block.drive import Drive, open_image
from cardcage_block.make import create_qcow2, create_raw
from cardcage_net.framing import FrameStream
from cardcage_net.switch import Port, Switch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SIZE = 256 << 20


def each(act: Callable[[int], Any], places: Sequence[int]) -> float:
    """Microseconds a call, the best of three rounds."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        for place in places:
            act(place)
        best = min(best, time.perf_counter() - start)
    return best / len(places) * 1e6


def call(act: Callable[[int, Sequence[memoryview]], None], buffers: Sequence[memoryview]) -> Callable[[int], None]:
    """*act* with the same *buffers* each time."""
    return lambda place: act(place, buffers)


def show(name: str, microseconds: float) -> None:
    print(f"{name:32} {microseconds:8.2f} µs")


def block(folder: str, count: int) -> None:
    """Rows of the block back ends."""
    choose = random.Random(1)
    places = [choose.randrange(SIZE // 4096) * 4096 for _ in range(count)]
    page, large = [memoryview(bytearray(4096))], [memoryview(bytearray(os.urandom(1 << 20)))]
    raw, qcow2 = f"{folder}/raw", f"{folder}/qcow2"
    create_raw(raw, SIZE)
    create_qcow2(qcow2, SIZE)
    for name, path in (("raw", raw), ("qcow2", qcow2)):
        image = open_image(Drive(path, format="raw" if name == "raw" else "qcow2"), warn=print)
        start = time.perf_counter()
        for place in range(0, SIZE, 1 << 20):
            image.writev(place, large)
        image.flush()
        show(f"{name} first write 1 MiB", (time.perf_counter() - start) / (SIZE >> 20) * 1e6)
        show(f"{name} read 1 MiB", each(call(image.readv, large), range(0, SIZE, 1 << 20)))
        show(f"{name} read 4 KiB", each(call(image.readv, page), places))
        show(f"{name} write 4 KiB", each(call(image.writev, page), places))
        image.close()
    fd = os.open(raw, os.O_RDWR)
    show("preadv 4 KiB", each(lambda at: os.preadv(fd, page, at), places))
    show("pwritev 4 KiB", each(lambda at: os.pwritev(fd, page, at), places))
    os.close(fd)


class Loop:
    """Watches nothing: the rows below call the readers themselves."""

    def add_reader(self, fd: int, callback: Callable[[], None], /) -> None:
        """Keep the callback."""
        self.callback = callback

    def remove_reader(self, fd: int, /) -> None:
        """Nothing."""

    def call_soon(self, callback: Callable[[], None], /) -> None:
        """At once."""
        callback()


def net(count: int) -> None:
    """Rows of the net back ends."""
    frame = b"\2\0\0\0\0\2\2\0\0\0\0\1\x88\xb5" + bytes(1500)
    ours, theirs = socket.socketpair()
    got = 0

    def deliver(data: bytes) -> bool:
        nonlocal got
        got += 1
        return True

    loop = Loop()
    stream = FrameStream(loop, ours, deliver, print)
    stream.start()
    drain = threading.Thread(target=lambda: [None for _ in iter(lambda: theirs.recv(1 << 20), b"")])
    drain.start()
    show("stream send 1514", each(lambda _: stream.send([frame]), range(count)))
    theirs.shutdown(socket.SHUT_RD)
    many = (struct.pack(">I", len(frame)) + frame) * 100
    spent = 0.0
    while got < count:
        theirs.sendall(many)
        start = time.perf_counter()
        loop.callback()
        spent += time.perf_counter() - start
    show("stream receive 1514", spent / got * 1e6)
    stream.close()
    drain.join()
    theirs.close()
    switch = Switch()
    ports = [Port(lambda act: act(), lambda data: True) for _ in range(2)]
    for port in ports:
        switch.plug(port)
    switch.forward(ports[1], frame[6:12] + frame[:6] + frame[12:])
    show("switch 1514", each(lambda _: switch.forward(ports[0], frame), range(count)))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Cost of one request through the block and net back ends.")
    parser.add_argument("--count", type=int, default=20000, help="requests a row")
    parser.add_argument("--folder", help="where the images go, by default a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        block(folder, arguments.count)
    net(arguments.count)


if __name__ == "__main__":
    main()
