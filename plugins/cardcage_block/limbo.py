"""Clusters on their way from used to free."""

from __future__ import annotations

__all__ = ["Limbo"]


class Limbo:
    """Clusters that were given up, until nothing on disk names them and no request can still use them.

    A request notes the epoch that it began in before it looks anything up (``inflight[thread] = epoch``) and takes the
    note back at its end. What was given up before an epoch's end can only be in use by requests of that epoch or older
    ones. All else happens under the image's allocation lock.
    """

    def __init__(self) -> None:
        self.inflight: dict[int, int] = {}
        self.epoch = 0
        self.given_up: list[int] = []
        self._stable: list[tuple[int, list[int]]] = []

    def __bool__(self) -> bool:
        return bool(self.given_up or self._stable)

    def begin(self) -> tuple[int, list[int]]:
        """Take what was given up until now, for the commit that makes it known on disk; ends the epoch."""
        batch = self.epoch, self.given_up
        self.given_up, self.epoch = [], self.epoch + 1
        return batch

    def undo(self, batch: tuple[int, list[int]]) -> None:
        """The commit failed."""
        self.given_up += batch[1]

    def done(self, batch: tuple[int, list[int]]) -> None:
        """Nothing on disk names the clusters of *batch* any more."""
        if batch[1]:
            self._stable.append(batch)

    def ready(self) -> list[int]:
        """The clusters that are free now; each is told once."""
        if not self._stable:
            return []
        oldest = min(list(self.inflight.values()), default=self.epoch)
        found = [cluster for epoch, clusters in self._stable if epoch < oldest for cluster in clusters]
        self._stable = [batch for batch in self._stable if batch[0] >= oldest]
        return found
