"""The gate: a process outside the machine's jail, which makes connections for it, and ends with the last of its copies.

``python -m cardcage_egress.gate FD``, with the entries of the policy on its standard input. It believes nothing of who
asks: that may be a process that a guest has taken over.

On the way FD come datagrams ``join`` with a socket, the link of one machine; on a link, datagrams such as
``{"to": "pypi.org", "port": 443}`` with the socket that is to be connected. On that comes one byte first: 0 when the
connection may begin. What is refused is told on the link, in a line. A name is looked up here, at each connection, and
the address that is connected to is the very one that was checked.
"""

from __future__ import annotations

import array
import asyncio
import json
import os
import resource
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from ipaddress import IPv4Address
from typing import TYPE_CHECKING

from cardcage_egress.confined import confine
from cardcage_egress.policy import OPENED, READY, Policy, is_name, is_special
from cardcage_egress.reading import HttpReader, Refused, TlsReader

if TYPE_CHECKING:
    from cardcage_egress.reading import Reader

__all__ = ["Gate", "main"]

LINKS, CONNECTIONS, OF_A_LINK = 1100, 2048, 128
RATE, BURST = 20, 200
"""Connections of a link: a second, and at once."""
REQUEST = 1024
LOOKUPS = 16
ADDRESSES = 4
"""Of a name, that are tried."""
READING, CONNECTING, ENDING = 15.0, 10.0, 300.0
"""Seconds that a guest may take to say whom it means, a server to be there, and the second side to end."""
PIECE = 65536


class Link:
    """One machine's."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self.tasks: set[asyncio.Task[None]] = set()
        self._left, self._at = float(BURST), time.monotonic()

    def may(self) -> bool:
        """One more connection; False where that is too many."""
        now = time.monotonic()
        self._left, self._at = min(self._left + (now - self._at) * RATE, BURST), now
        if self._left < 1 or len(self.tasks) >= OF_A_LINK:
            return False
        self._left -= 1
        return True

    def tell(self, text: str) -> None:
        """Tell the machine of something."""
        with suppress(OSError):  # it does not listen, or is gone
            self.end.send(text.encode("ascii", "backslashreplace")[:400])


class Gate:
    """The process's life."""

    def __init__(self, way: socket.socket, policy: Policy) -> None:
        self._way, self._policy = way, policy
        self._links: set[Link] = set()
        self._over = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._lookups = ThreadPoolExecutor(LOOKUPS, "lookup")

    async def run(self) -> None:
        """Serve until the way is closed."""
        self._way.setblocking(False)
        self._loop.add_reader(self._way, self._joined)
        await self._over.wait()

    def _joined(self) -> None:
        try:
            data, found = received(self._way)
        except BlockingIOError:
            return
        except OSError:
            data, found = b"", []
        if data == b"join" and len(found) == 1 and len(self._links) < LINKS:
            link = Link(found[0])
            link.end.setblocking(False)
            self._links.add(link)
            self._loop.add_reader(link.end, self._asked, link)
            return
        for one in found:
            one.close()
        if not data:
            self._over.set()

    def _asked(self, link: Link) -> None:
        try:
            data, found = received(link.end)
        except BlockingIOError:
            return
        except OSError:
            data, found = b"", []
        if not data:
            self._loop.remove_reader(link.end)
            self._links.discard(link)
            for task in link.tasks:
                task.cancel()
            link.end.close()
        if len(found) != 1 or not data:
            for one in found:
                one.close()
            return
        if not link.may() or sum(len(one.tasks) for one in self._links) >= CONNECTIONS:
            link.tell("too many connections")
            found[0].close()
            return
        task = self._loop.create_task(self._serve(link, data, found[0]))
        link.tasks.add(task)
        task.add_done_callback(link.tasks.discard)

    async def _serve(self, link: Link, data: bytes, guest: socket.socket) -> None:
        """One connection, from its request to its end."""
        where = "a request"
        try:
            guest.setblocking(False)
            to, port = parsed(data)
            where = f"{to}:{port}"
            if is_name(to):
                await self._named(link, to, port, guest)
            else:
                address = IPv4Address(to)
                if not self._may(address, port):
                    raise Refused("not open")
                server = await self._connect([address], port)
                with server:
                    await self._loop.sock_sendall(guest, OPENED)
                    await relay(guest, server, None)
        except (Refused, ValueError) as error:
            link.tell(f"{where}: {error if isinstance(error, Refused) else 'not understood'}")
        except (OSError, TimeoutError) as error:
            link.tell(f"{where}: {error.strerror or 'no answer'}")
        finally:
            guest.close()

    async def _named(self, link: Link, name: str, port: int, guest: socket.socket) -> None:
        kind = self._policy.ports_of(name).get(port)
        if kind is None:
            raise Refused("not open")
        reader: Reader | None = None
        first = b""
        if kind != "tcp":
            reader = TlsReader(name) if kind == "tls" else HttpReader(name, port)
            await self._loop.sock_sendall(guest, OPENED)
            async with asyncio.timeout(READING):
                while not first:
                    if not (piece := await self._loop.sock_recv(guest, PIECE)):
                        return
                    first = reader.feed(piece)
        server = await self._connect(await self._looked_up(name, port), port)
        with server:
            if reader is None:
                await self._loop.sock_sendall(guest, OPENED)
            await self._loop.sock_sendall(server, first)
            await relay(guest, server, reader)

    async def _looked_up(self, name: str, port: int) -> list[IPv4Address]:
        """The addresses of *name* that may be reached, one at least."""

        def look() -> list[IPv4Address]:
            try:
                # as it is: a name with a dot at its end has no domains of this host's put behind it
                absolute = f"{name}." if "." in name and not in_hosts(name) else name
                rows = socket.getaddrinfo(absolute, port, socket.AF_INET, socket.SOCK_STREAM)
            except OSError as error:
                raise Refused(f"its name is not known: {error.strerror or error}") from error
            return list(dict.fromkeys(IPv4Address(row[4][0]) for row in rows))

        found = await self._loop.run_in_executor(self._lookups, look)
        may = [one for one in found if self._may(one, port, named=True)]
        if not may:
            raise Refused(f"its name leads to {', '.join(map(str, found[:ADDRESSES]))}, which is not open")
        return may

    def _may(self, address: IPv4Address, port: int, *, named: bool = False) -> bool:
        """True where *address* is open; by a name that is open, each of the public network is."""
        if is_own(address):
            return self._policy.names_host(address, port)
        return (named and not is_special(address)) or self._policy.opens(address, port)

    async def _connect(self, addresses: list[IPv4Address], port: int) -> socket.socket:
        problem: OSError = TimeoutError()
        for one in addresses[:ADDRESSES]:
            server = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            try:
                server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                async with asyncio.timeout(CONNECTING):
                    await self._loop.sock_connect(server, (str(one), port))
            except OSError as error:
                server.close()
                problem = error
            except BaseException:
                server.close()
                raise
            else:
                return server
        raise problem


async def relay(guest: socket.socket, server: socket.socket, reader: Reader | None) -> None:
    """Carry what each says to the other, until both have ended, or one is gone. Raises Refused, OSError."""
    loop = asyncio.get_running_loop()

    async def carry(source: socket.socket, target: socket.socket, reading: Reader | None) -> None:
        while data := await loop.sock_recv(source, PIECE):
            if reading is not None:
                data = reading.feed(data)
            if data:
                await loop.sock_sendall(target, data)
        with suppress(OSError):  # it is gone already
            target.shutdown(socket.SHUT_WR)

    both = {loop.create_task(carry(guest, server, reader)), loop.create_task(carry(server, guest, None))}
    try:
        done, left = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if left and not any(one.exception() for one in done):
            more, _ = await asyncio.wait(left, timeout=ENDING)
            done |= more
        for one in done:
            if (error := one.exception()) is not None and not isinstance(error, ConnectionError):
                raise error
    finally:
        for one in both:
            one.cancel()
        await asyncio.gather(*both, return_exceptions=True)


def received(end: socket.socket) -> tuple[bytes, list[socket.socket]]:
    """A datagram, and the sockets that came with it, one at most. Raises OSError."""
    data, told, flags, _ = end.recvmsg(REQUEST, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
    numbers = array.array("i")
    for level, kind, value in told:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            numbers.frombytes(value[: len(value) // 4 * 4])
    found: list[socket.socket] = []
    for fd in numbers:
        try:
            one = socket.socket(fileno=fd)
        except OSError:  # no socket
            os.close(fd)
            continue
        if one.family == socket.AF_UNIX and not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            found.append(one)
        else:
            one.close()
    return data, found


def parsed(data: bytes) -> tuple[str, int]:
    """A request's name or address, and its port. Raises ValueError."""
    try:
        match json.loads(data):
            case {"to": str(to), "port": int(port), **rest} if not rest and 0 < port < 65536 and len(to) < 254:
                return to, int(port)
    except RecursionError as error:
        raise ValueError("not a request") from error
    raise ValueError("not a request")


def is_own(address: IPv4Address) -> bool:
    """True for an address of this host: what is sent there has it for its source."""
    if address.is_loopback:
        return True
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((str(address), 9))
        except OSError:  # no way there
            return False
        return bool(probe.getsockname()[0] == str(address))


def in_hosts(name: str) -> bool:
    """True where the host's own table of names has *name* (hosts(5))."""
    try:
        with open("/etc/hosts", encoding="utf-8", errors="replace") as file:
            return any(name in line.partition("#")[0].lower().split()[1:] for line in file)
    except OSError:
        return False


async def _run(way: socket.socket, policy: Policy) -> None:
    await Gate(way, policy).run()


def main() -> None:
    """Read the policy, say so, and serve."""
    way = socket.socket(fileno=int(sys.argv[1]))
    policy = Policy(json.load(sys.stdin))
    for one in (signal.SIGINT, signal.SIGHUP):
        signal.signal(one, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with suppress(OSError), open("/proc/self/comm", "w") as file:
        file.write("egress-gate")
    confine()
    os.write(1, READY)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    asyncio.run(_run(way, policy))
    os._exit(0)  # a look-up may hang


if __name__ == "__main__":
    main()
