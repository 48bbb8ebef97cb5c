"""The verbs of this card as methods, so that type checkers know them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cardcage.machine import Machine as PlainMachine

from cardcage_snapshot.creating import snapshot
from cardcage_snapshot.restoring import restore

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping
    from typing import Self

    from cardcage.host import Host

    from cardcage_snapshot.creating import Snapshot

__all__ = ["Machine", "Verbs"]


class Verbs:
    """The verbs of snapshots: mixed into :class:`Machine`, and offered to any other."""

    def snapshot(
        self: Any,
        where: str | os.PathLike[str],
        *,
        compress: bool = False,
        replace: bool = False,
        parent: str | os.PathLike[str] | None = None,
    ) -> Snapshot:
        """See :func:`cardcage_snapshot.creating.snapshot`."""
        return snapshot(self, where, compress=compress, replace=replace, parent=parent)

    @classmethod
    def restore(
        cls,
        where: str | os.PathLike[str],
        *,
        name: str | None = None,
        accel: str | Iterable[str] | None = None,
        config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        trust: bool = False,
        verify: bool = False,
        disks: str | os.PathLike[str] | None = None,
        any_cpu: bool = False,
        start: bool = True,
        host: Host | None = None,
    ) -> Self:
        """See :func:`cardcage_snapshot.restoring.restore`."""
        face: Any = cls
        made: Self = restore(
            face,
            where,
            name=name,
            accel=accel,
            config=config,
            trust=trust,
            verify=verify,
            disks=disks,
            any_cpu=any_cpu,
            start=start,
            host=host,
        )
        return made


class Machine(Verbs, PlainMachine):
    """:class:`cardcage.Machine` with the verbs of snapshots; another class has them by ``class M(Verbs, ...)``."""
