"""The cost that a migration may have."""

from __future__ import annotations

from typing import Literal, get_args

from attrs import frozen
from cardcage.errors import UsageError

__all__ = ["MODES", "Limits", "Mode"]

Mode = Literal["precopy", "postcopy", "hybrid"]
MODES: tuple[str, ...] = get_args(Mode)


@frozen
class Limits:
    """The cost that a migration may have.

    Attributes:
        bandwidth: bytes a second while the guest runs, None for all there is. downtime: seconds that the guest may
            stand still. timeout: seconds until it stops trying to get there, None for never; then the *strategy* says
            whether it is given up (``cancel``) or the guest stands still for longer (``force``).
        throttle: hold up vCPUs that write faster than it sends.
        patience: seconds that the other side may be silent.
        ram_alone: the downtime is for RAM alone, as QEMU reckons it; what the switch takes besides comes on top, and
            may be more.
        mode: ``precopy``, RAM before the guest; ``postcopy``, the guest first; ``hybrid``, RAM first, and the guest
            before the rest of it once somebody says so, or when it does not converge. told_only: only the former.
    """

    bandwidth: int | None = None
    downtime: float = 0.3
    timeout: float | None = 3600.0
    strategy: Literal["cancel", "force"] = "cancel"
    throttle: bool = True
    patience: float = 30.0
    ram_alone: bool = False
    mode: Mode = "precopy"
    told_only: bool = False

    def __attrs_post_init__(self) -> None:
        if self.bandwidth is not None and self.bandwidth < 4096:
            raise UsageError(f"a bandwidth of {self.bandwidth} bytes a second: expected 4096 at least")
        if self.strategy not in ("cancel", "force"):
            raise UsageError(f'timeout_strategy "{self.strategy}": expected cancel or force')
        if self.mode not in MODES:
            raise UsageError(f'mode "{self.mode}": expected {", ".join(MODES)}')
        for what in ("downtime", "timeout", "patience"):
            value = getattr(self, what)
            if value is not None and not 0 < value < 1e9:
                raise UsageError(f"{what}: expected seconds, more than 0, got {value!r}")
