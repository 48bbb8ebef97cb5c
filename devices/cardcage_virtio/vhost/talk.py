"""Talking to a vhost-user back end on a thread of its own: nobody's lock waits for an answer."""

from __future__ import annotations

from threading import Thread
from typing import TYPE_CHECKING

from cardcage.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage_virtio.vhost.channel import Channel

__all__ = ["Talk"]


class Talk:
    """One conversation, begun at once.

    Args:
        channel: on which it is; nobody else uses it until it is over. say: what is said.
        heard: called with this object at the end, on the thread. name: of the thread.

    Attributes:
        error: why it failed, ``None`` when it did not; once it is over.
    """

    def __init__(self, channel: Channel, say: Callable[[], None], heard: Callable[[Talk], None], name: str) -> None:
        self.channel = channel
        self.error: OSError | HostError | None = None
        self._say, self._heard = say, heard
        self._thread = Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._say()
        except (OSError, HostError) as error:
            self.error = error
        self._heard(self)

    def over(self, seconds: float) -> bool:
        """True if the talk is over, or ends within *seconds*."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def cut(self) -> None:
        """Hang up, which ends it."""
        self.channel.hang_up()
        self._thread.join()
