"""TLS on behalf of a machine in its jail: what comes on one connection goes out on the other."""

from __future__ import annotations

import select
import selectors
import socket
import ssl
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from cardcage.errors import CardcageError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["relayed", "relayed_later"]

PIECE = 1 << 18


def relayed(secure: ssl.SSLSocket) -> socket.socket:
    """A plain connection that ends in *secure*, for as long as this process lives or one of them is closed."""
    ours, theirs = socket.socketpair()
    threading.Thread(target=_carry, args=(ours, secure), name="migrate-tls", daemon=True).start()
    return theirs


def relayed_later(connect: Callable[[], ssl.SSLSocket]) -> socket.socket:
    """The same, of a connection that is made once something is said on this one: at its other end somebody may only
    then be there to agree on the keys. It ends where that fails."""
    ours, theirs = socket.socketpair()

    def run() -> None:
        with ours, suppress(OSError, CardcageError):  # who waits for it hears that it has ended
            select.select([ours], [], [])
            _carry(ours, connect())

    threading.Thread(target=run, name="migrate-tls", daemon=True).start()
    return theirs


def _carry(plain: socket.socket, secure: ssl.SSLSocket) -> None:
    """On one thread: an object of OpenSSL's is not for two."""
    for one in (plain, secure):
        one.setblocking(False)
    out, back = bytearray(), bytearray()  # towards the secure one, and from it
    ended = False
    with suppress(OSError), plain, secure, selectors.DefaultSelector() as selector:
        selector.register(plain, selectors.EVENT_READ)
        selector.register(secure, selectors.EVENT_READ)
        while True:
            moved = False
            if not ended and not out:
                data = _read(plain)
                ended, moved = data == b"", data is not None
                out += data or b""
            if out:
                with suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
                    del out[: secure.send(out)]
                    moved = True
            elif ended:
                return
            if not back:
                data = _read(secure)
                if data == b"":
                    return
                moved = moved or data is not None
                back += data or b""
            if back:
                with suppress(BlockingIOError):
                    del back[: plain.send(back)]
                    moved = True
            if not moved:
                wanted = selectors.EVENT_READ
                selector.modify(secure, wanted | (selectors.EVENT_WRITE if out else 0))
                first = (0 if out or ended else wanted) | (selectors.EVENT_WRITE if back else 0)
                selector.modify(plain, first or selectors.EVENT_WRITE)
                selector.select(60)


def _read(peer: socket.socket) -> bytes | None:
    """Some bytes, none at the end; None where there are none yet."""
    try:
        return peer.recv(PIECE)
    except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
        return None
