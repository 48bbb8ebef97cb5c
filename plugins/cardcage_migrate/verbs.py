"""The verbs of this card as methods, so that type checkers know them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from cardcage.machine import Machine as PlainMachine

from cardcage_migrate.hold import migrate_recover
from cardcage_migrate.incoming import incoming
from cardcage_migrate.leaving import migrate, migrate_cancel, migrate_start_postcopy
from cardcage_migrate.progress import migrate_progress

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Mapping
    from typing import Self

    from cardcage.host import Host

    from cardcage_migrate.progress import Progress
    from cardcage_migrate.reach import Waiting

__all__ = ["Machine", "Verbs"]


class Verbs:
    """The verbs of migration: mixed into :class:`Machine`, and offered to any other."""

    def migrate(
        self: Any,
        uri: str,
        *,
        bandwidth: int | None = None,
        downtime: float = 0.3,
        timeout: float | None = 3600.0,
        timeout_strategy: Literal["cancel", "force"] = "cancel",
        throttle: bool = True,
        patience: float = 30.0,
        mode: Literal["precopy", "postcopy", "hybrid"] = "precopy",
        tls_dir: str | os.PathLike[str] | None = None,
        tls_hostname: str = "",
        progress: Callable[[Progress], object] | None = None,
    ) -> Progress:
        """See :func:`cardcage_migrate.leaving.migrate`."""
        return migrate(
            self,
            uri,
            bandwidth=bandwidth,
            downtime=downtime,
            timeout=timeout,
            timeout_strategy=timeout_strategy,
            throttle=throttle,
            patience=patience,
            mode=mode,
            tls_dir=tls_dir,
            tls_hostname=tls_hostname,
            progress=progress,
        )

    def migrate_cancel(self: Any) -> None:
        """See :func:`cardcage_migrate.leaving.migrate_cancel`."""
        migrate_cancel(self)

    def migrate_start_postcopy(self: Any) -> None:
        """See :func:`cardcage_migrate.leaving.migrate_start_postcopy`."""
        migrate_start_postcopy(self)

    def migrate_progress(self: Any) -> Progress | None:
        """See :func:`cardcage_migrate.progress.migrate_progress`."""
        return migrate_progress(self)

    def migrate_recover(
        self: Any, uri: str | None = None, *, tls_dir: str | os.PathLike[str] | None = None, tls_hostname: str = ""
    ) -> None:
        """See :func:`cardcage_migrate.hold.migrate_recover`."""
        migrate_recover(self, uri, tls_dir=tls_dir, tls_hostname=tls_hostname)

    @classmethod
    def incoming(
        cls,
        uri: str,
        *,
        name: str | None = None,
        accel: str | Iterable[str] | None = None,
        config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        trust: bool = False,
        any_cpu: bool = False,
        tls_dir: str | os.PathLike[str] | None = None,
        timeout: float | None = None,
        waiting: Callable[[Waiting], object] | None = None,
        host: Host | None = None,
    ) -> Self:
        """See :func:`cardcage_migrate.incoming.incoming`."""
        face: Any = cls
        made: Self = incoming(
            face,
            uri,
            name=name,
            accel=accel,
            config=config,
            trust=trust,
            any_cpu=any_cpu,
            tls_dir=tls_dir,
            timeout=timeout,
            waiting=waiting,
            host=host,
        )
        return made


class Machine(Verbs, PlainMachine):
    """:class:`cardcage.Machine` with the verbs of migration; another class has them by ``class M(Verbs, ...)``."""
