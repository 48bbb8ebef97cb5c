"""Character back end ``pty``: a new pseudo-terminal, whose name is logged, for screen, minicom and their like."""

from __future__ import annotations

import os
import select
import tty
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import frozen
from cardcage.config import HostPath
from cardcage.security import Needs

from cardcage_pc.char.fd import Sink

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.device import Slot

__all__ = ["Pty", "PtyOptions", "open_pty"]

LOOK_AGAIN = 250_000_000
"""Nanoseconds between looks whether somebody opened the terminal: the kernel has no event for it."""


@frozen
class PtyOptions:
    """Options of ``char:pty``.

    Attributes:
        link: a symbolic link to make to the terminal, replacing an existing link; empty for none.
    """

    link: HostPath = ""


class Pty:
    """The master's side. While nobody has the terminal open, the guest's bytes are dropped.

    Attributes:
        path: the terminal, such as ``/dev/pts/3``.
    """

    def __init__(self, slot: Slot, options: PtyOptions) -> None:
        self._slot = slot
        if options.link:
            slot.host.ask("image", options.link, ("create",))
        self._master, slave = os.openpty()
        try:
            tty.setraw(slave)
            self.path = os.ttyname(slave)
        finally:
            os.close(slave)
        os.set_blocking(self._master, False)
        self._link = Path(options.link) if options.link else None
        if self._link is not None:
            self._link.unlink(missing_ok=True)
            self._link.symlink_to(self.path)
        self._poll = select.poll()
        self._poll.register(self._master, 0)  # hang-up is always told
        self._sink: Sink | None = None
        self._timer = slot.clock.timer(self._look)
        slot.log.warning("character device is a pty", path=self.path)  # nobody could find it otherwise

    def start(self, received: Callable[[bytes], None], /) -> None:
        """Begin; see CharBackend."""
        self._received = received
        self._look()

    def _look(self) -> None:
        """Watch the terminal when somebody has it open, else look again later."""
        if self._sink is not None or self._poll.poll(0):
            self._timer.arm(self._slot.clock.now() + LOOK_AGAIN)
            return
        self._sink = Sink(self._master, self._slot.log)
        self._slot.loop.add_reader(self._master, self._readable)

    def _readable(self) -> None:
        try:
            data = os.read(self._master, 4096)
        except BlockingIOError:
            return
        except OSError:  # EIO: the last user closed it
            self._slot.loop.remove_reader(self._master)
            self._sink = None
            self._look()
            return
        self._received(data)

    def write(self, data: bytes, /) -> None:
        if self._sink is None and not self._poll.poll(0):
            self._look()
        if self._sink is not None:
            self._sink.write(data)
            if self._sink.dead:  # hung up between two looks; the reader notices too
                self._sink = Sink(self._master, self._slot.log)

    def needs(self) -> Needs:
        """The link is removed at the end."""
        return Needs(remove=(str(self._link.absolute().parent),) if self._link is not None else ())

    def close(self) -> None:
        """Take the terminal away."""
        self._timer.cancel()
        if self._sink is not None:
            self._slot.loop.remove_reader(self._master)
        os.close(self._master)
        if self._link is not None:
            self._link.unlink(missing_ok=True)


def open_pty(slot: Slot, options: PtyOptions) -> Pty:
    """Back end ``char:pty``. Raises OSError."""
    return Pty(slot, options)
