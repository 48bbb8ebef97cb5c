"""The way to a vhost-user back end: connecting, again when it died; talking to it on a thread; hanging up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.errors import HostError

from cardcage_virtio.vhost.channel import (
    Channel,
)
from cardcage_virtio.vhost.talk import Talk

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.clock import Timer
    from cardcage.device import Slot


__all__ = ["PATIENCE", "Link"]

RETRY = 100_000_000
"""Nanoseconds between two attempts to reach a back end that died."""
PATIENCE = 2.0
"""Seconds that a back end may keep waiting who holds the machine's lock."""


class Link:
    """One front end's way to its back end.

    Args:
        path: AF_UNIX socket. queues: how many it must serve.
        read_config: gives what the guest sees as configuration space.
        returned: called with the channel and the configuration space of a back end that came after one that died.

    Attributes:
        channel: to the back end, ``None`` while there is none. config: what it said when it was asked last.
        barred: what security bars of it.
    """

    def __init__(
        self,
        path: str,
        queues: int,
        read_config: Callable[[Channel], bytes],
        returned: Callable[[Channel, bytes], None],
    ) -> None:
        self._path, self._queues, self.read_config, self._returned = path, queues, read_config, returned
        self.channel: Channel | None = None
        self.config = b""
        self.barred: set[str] = set()
        self._talk: Talk | None = None
        self._slot: Slot
        self._timer: Timer

    def plug(self, slot: Slot) -> None:
        """The device's slot."""
        self._slot, self._timer = slot, slot.clock.timer(self._retry)

    def unplug(self) -> None:
        """Hang up for good."""
        self._timer.cancel()
        self.close()

    def open(self) -> Channel:
        """Connect for the first time. Raises OSError and HostError."""
        channel, config = self._connect(Channel(self._path))
        self.adopt(channel, config)
        return channel

    def later(self) -> None:
        """Connect after a while."""
        self._timer.arm(self._slot.clock.now() + RETRY)

    def listen(self, channel: Channel, on: bool) -> None:
        """True when *channel* now brings the end of the back end; else it brings answers."""
        if on:
            self._slot.loop.add_reader(channel.fileno(), self._spoke)
        else:
            self._slot.loop.remove_reader(channel.fileno())

    def admit(self, why: str) -> None:
        """Security bars it no more for this reason."""
        self.barred.discard(why)
        if not self.barred and self.channel is None and self._talk is None:
            self._retry()

    def _connect(self, channel: Channel) -> tuple[Channel, bytes]:
        """Open *channel*, and read the configuration space."""
        try:
            channel.open()
            if channel.queues is not None and channel.queues < self._queues:
                raise HostError(f"the back end serves {channel.queues} queues, {self._queues} are wanted")
            return channel, self.read_config(channel)
        except BaseException:
            channel.close()
            raise

    def adopt(self, channel: Channel, config: bytes) -> None:
        """This one it is."""
        self.channel, self.config = channel, config
        self._slot.loop.add_reader(channel.fileno(), self._spoke)

    def say(self, channel: Channel, say: Callable[[], None], then: Callable[[], None]) -> None:
        """Have *say* talk on a thread, and do *then*, under the machine's lock, when all was answered."""
        self._then = then

        def heard(talk: Talk) -> None:
            self._slot.loop.call_soon(lambda: self._heard(talk))

        self._talk = Talk(channel, say, heard, f"{self._slot.id}-vhost")

    def _heard(self, talk: Talk) -> None:
        if talk is not self._talk:
            return  # it was cut, or somebody waited for its end
        self._talk = None
        if talk.error is None:
            self._then()
        else:
            talk.channel.close()
            self.died(str(talk.error))

    def free(self) -> Channel | None:
        """The back end, if there is one, once what was being said to it is answered."""
        talk = self._talk
        if self.channel is not None and talk is not None:
            if talk.over(PATIENCE):
                self._heard(talk)
            else:
                self.died("does not answer")
        return self.channel

    def _spoke(self) -> None:
        """The socket is readable: an answer that another thread has read meanwhile, or the end of the back end."""
        if self._talk is None and self.channel is not None and self.channel.ended():
            self.died("hung up")

    def close(self) -> None:
        """Hang up."""
        talk, self._talk = self._talk, None
        if self.channel is not None:
            self._slot.loop.remove_reader(self.channel.fileno())
        if talk is not None:
            talk.cut()
            talk.channel.close()
        if self.channel is not None:
            self.channel.close()
            self.channel = None

    def died(self, why: str) -> None:
        """The back end is gone, or as good as: hang up, and connect again later."""
        known = self.channel is not None
        self.close()
        if known:
            self._slot.log.warning("vhost-user back end is gone, waiting for another", why=why, socket=self._path)
        self.later()

    def _retry(self) -> None:
        self._timer.cancel()
        if self.barred:
            self.later()
            return
        channel = Channel(self._path)
        found: list[tuple[Channel, bytes]] = []
        self.say(channel, lambda: found.append(self._connect(channel)), lambda: self._returned(*found[0]))
