"""The source while its machine runs at the destination, and the rest of its RAM follows: post-copy.

The connection for pages may break, and be made anew, as often as it does: both sides keep what they have meanwhile.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from cardcage.errors import CardcageError, StateError
from cardcage.units import say_size

from cardcage_migrate.hold import Ways, recoverable, standing
from cardcage_migrate.serving import Serving
from cardcage_migrate.wire import RUN, BrokenStream, Kind, LinkLost, Refused, tables_of_runs

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.machine import Machine
    from cardcage_snapshot.pages import Run

    from cardcage_migrate.limits import Limits
    from cardcage_migrate.progress import Progress
    from cardcage_migrate.wire import Channel, Peer

__all__ = ["Following"]


def unheard(progress: Progress) -> None:
    """Tell nobody."""


class Following:
    """RAM of *machine* that follows it to *where*.

    Args:
        secret: by which the destination knows the connection for pages.
        report: tells how far it is. stay: has the machine stand still here, for a reason, with a status and with ways
            to go on. completed: called at the end.

    Attributes:
        goes: the guest was sent before its RAM.
    """

    def __init__(
        self,
        machine: Machine,
        where: str,
        secret: bytes,
        limits: Limits,
        progress: Progress,
        report: Callable[[], object],
        stay: Callable[[str, str, Ways], object],
        completed: Callable[[], object],
    ) -> None:
        self._machine, self._where, self._limits, self._progress = machine, where, limits, progress
        self._report, self._stay, self._completed = report, stay, completed
        block = machine.memory.ranges[0].block
        self._serving = Serving(block, secret, limits.bandwidth, limits.patience)
        self._resuming = threading.Lock()
        self._also: Callable[[Progress], object] = unheard
        self.goes = False

    def join(self, peer: Peer) -> None:
        """Have the connection for pages. Raises LinkLost, BrokenStream."""
        self._serving.join(peer)

    def miss(self, channel: Channel, runs: list[Run]) -> None:
        """Let the destination know, on its first connection, that these are missing. Raises LinkLost."""
        self.goes = True
        for body in tables_of_runs(runs):
            channel.send(Kind.MISSING, body, argument=len(body) // RUN.size)
        self._serving.mark(runs)

    def begin(self) -> None:
        """The destination has its last word before its state, and may ask for pages from now on."""
        self._serving.begin()

    def check(self) -> None:
        """Raise LinkLost where the connection for pages has broken."""
        self._serving.check()

    @property
    def known(self) -> bool:
        """The machine is known to run there."""
        return self._serving.runs

    def await_runs(self) -> bool:
        """Wait until the connection for pages tells that it runs there; False where it does not."""
        return self.goes and self._serving.await_runs(self._limits.patience)

    def follow(self) -> None:
        """Serve until all is there. Raises LinkLost where that broke off, Refused where the machine is lost."""
        progress = self._progress
        progress.status, progress.error = "postcopy-active", ""
        try:
            self._serving.wait(self._tell)
        except Refused as error:
            self._stay(f"it was lost at {self._where}: {error}", "failed", Ways(None))
            raise Refused(f"{self._machine.name} ran at {self._where}, and is lost: {error}") from error
        except (LinkLost, BrokenStream, OSError) as error:
            raise self._paused(error) from error
        finally:
            self._tell()
        recoverable(self._machine, None)
        self._completed()

    def linger(self) -> None:
        """Nobody has said that it runs there; serve all the same, and end here once all has gone there and it does."""

        def serve() -> None:
            try:
                self._serving.wait(lambda: None)
            except CardcageError:  # it goes on here, or the connection broke: it can be made anew
                return
            recoverable(self._machine, None)
            self._completed()

        threading.Thread(target=serve, name=f"{self._machine.name}-lingers", daemon=True).start()

    def _tell(self) -> None:
        self._progress.remaining, self._progress.asked = self._serving.left, self._serving.asked
        self._report()
        self._also(self._progress)

    @property
    def sent(self) -> int:
        """Bytes of pages."""
        return self._serving.sent

    def _paused(self, error: Exception) -> LinkLost:
        """The connection broke in the middle: both keep what they have."""
        left = say_size(self._serving.left)
        self._stay(f"it runs at {self._where}", "postcopy-paused", Ways(None, self.resume, self._where))
        return LinkLost(
            f"{error}: {self._machine.name} runs at {self._where}, and about {left} of its memory are here alone: "
            '"cardcage migrate recover" (migrate_recover) connects anew and sends them'
        )

    def resume(self, link: Callable[[], Peer], tell: Callable[[Progress], object] = unheard) -> None:
        """Connect anew, and send what is missing, on this thread; *tell* hears how far it is now and then.

        Raises LinkLost: it can be tried again.
        """
        if not self._resuming.acquire(blocking=False):
            raise StateError(f"{self._machine.name}: its migration is being recovered already")
        ways, before = standing(self._machine), self._progress.status
        self._also = tell
        try:
            self._progress.status = "postcopy-recover"
            try:
                self._serving.join(link())
            except BaseException:
                self._progress.status = before
                raise
            self._serving.begin()
            if not self._serving.await_runs(self._limits.patience):
                self._progress.status = before
                raise LinkLost(f"{self._machine.name} stands still at {self._where}: recover it there")
            self.follow()
        except BaseException as error:
            self._progress.error = str(error)
            if standing(self._machine) is None and self._progress.status != "completed":
                recoverable(self._machine, ways)
            raise
        finally:
            self._also = unheard
            self._resuming.release()

    def close(self) -> None:
        """Send nothing more. Idempotent."""
        self._serving.close()
