"""Acts of a sandbox, asked for over its machine's control socket."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from cardcage.errors import UsageError
from cardcage_fleet.session import FRAME, Frame, Kind, converse

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Self

    from cardcage_fleet.roster import RosterEntry

__all__ = ["Talk", "act"]


class Talk:
    """One act under way, in a ``with``. Receiving is for one thread; :meth:`hang_up` for any.

    Args:
        entry: the sandbox's machine. name: the sandbox's, for errors. do: the act. keys: its keys; None is left out.
    """

    def __init__(self, entry: RosterEntry, name: str, do: str, **keys: Any) -> None:
        request = json.dumps({"do": do, **{key: value for key, value in keys.items() if value is not None}}).encode()
        if len(request) > FRAME:
            raise UsageError(f"{name}: a request of {len(request)} bytes: expected {FRAME} at most")
        self._name = name
        self._stack = ExitStack()
        self._talk = self._stack.enter_context(converse(entry, "sandbox", {}))
        self.send(request)

    def send(self, data: bytes) -> None:
        """Send bytes of stream 0."""
        with suppress(OSError):  # it has ended: its last frame says why
            self._talk.send(Kind.DATA, data)

    def end(self) -> None:
        """Stream 0 has ended."""
        with suppress(OSError):  # likewise
            self._talk.send(Kind.END)

    def receive(self) -> Frame | None:
        """The next frame; None where the machine hung up."""
        return self._talk.receive()

    def result(self, frame: Frame | None) -> dict[str, Any]:
        """The table of the last frame. Raises what went wrong there: OSErrors of the guest's kernel among them."""
        table = self._talk.result(frame)
        if isinstance(number := table.get("errno"), int):
            raise OSError(number, os.strerror(number), f"{self._name}:{table.get('path', '')}")
        return table

    def began(self) -> dict[str, Any]:
        """The table that tells that it has begun. Raises what it could not begin for."""
        frame = self.receive()
        if frame is None or frame.kind is not Kind.DATA or frame.stream != 3:
            self.result(frame)
            raise UsageError(f"{self._name}: the act ended before it had begun")
        found: dict[str, Any] = json.loads(frame.data)
        return found

    def frames(self) -> Iterator[Frame]:
        """The frames of streams, until the last: its table is :attr:`table` then."""
        while (frame := self.receive()) is not None and frame.kind is Kind.DATA:
            yield frame
        self.table = self.result(frame)

    def fileno(self) -> int:
        """The socket's descriptor, readable when there is a frame."""
        return self._talk.fileno()

    def hang_up(self) -> None:
        """Nothing more is heard: whoever waits for a frame goes on. Any thread."""
        self._talk.hang_up()

    def close(self) -> None:
        """Close it. Idempotent."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def act(entry: RosterEntry, name: str, do: str, data: Iterable[bytes] | None = None, **keys: Any) -> tuple[bytes, Any]:
    """Do one act: what came of stream 1, and its table.

    Args:
        data: pieces of stream 0.
    """
    with Talk(entry, name, do, **keys) as talk:
        if data is not None:
            for piece in data:
                talk.send(piece)
            talk.end()
        found = b"".join(frame.data for frame in talk.frames())
        return found, talk.table
